"""The train script with a SpotTune: small real runs."""
import json

import pytest
import safetensors.torch
import timm
import torch
from conftest_engine import assert_same_run, rows
from test_resume import Killed, kill_at

import train_amf
from timm_amf import UserError
from timm_amf.models.method import method_of

BASE = [
    '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet',
    '--img-size', '32', '-b', '12', '--epochs', '2', '--workers', '0', '--lr', '0.02', '--warmup-epochs', '0', '--cpu',
    '--tracker', 'none', '--policy-lr', '0.02', '--head-lr', '0.05',
]
GLOBAL_K = ['--global-k', '1', '--global-k-weights', '1', '1', '--global-k-window', '30', '--policy-lr', '0.5']


@pytest.fixture
def spottune():
    torch.manual_seed(0)
    return timm.create_model('spottune', backbone='test_resnet', policy='test_resnet', num_classes=5)


def test_run(trained):
    folder = trained('run', base=BASE)
    table = rows(folder / 'policy.csv')
    assert [r['epoch'] for r in table] == ['0', '1']
    blocks = sum(name.startswith('block_') for name in table[0])
    for row in table:
        # What images used adds up to what blocks were used, over the 25 validation and 45 training images.
        for prefix, total in (('', 25), ('train_', 45)):
            histogram = [int(row[f'{prefix}images_{i}']) for i in range(blocks + 1)]
            shares = [float(row[f'{prefix}block_{i}']) for i in range(blocks)]
            assert sum(histogram) == total
            used = sum(i * n for i, n in enumerate(histogram)) / total
            assert used == pytest.approx(sum(shares)) == pytest.approx(float(row[f'{prefix}tuned_blocks']))
            assert f'{prefix}stripes_block_0' in row and f'{prefix}blobs_tuned_blocks' in row
    assert 'assignment_accuracy' not in table[0]
    assert {'lr_tuned', 'lr_policy', 'lr_head'} <= rows(folder / 'summary.csv')[0].keys()


def test_frozen_path_and_stem_stay(run, trained):
    first = run('first', '--stop-epoch', '1', base=BASE)
    second = trained('run', base=BASE)
    a, b = (safetensors.torch.load_file(f / 'last' / 'model.safetensors') for f in (first, second))
    for name in a:
        moved = not torch.equal(a[name], b[name])
        fixed = '.frozen.' in name or name.startswith(('backbone.stem', 'backbone.conv1', 'backbone.bn1'))
        if fixed:
            assert not moved, name
    assert any(not torch.equal(a[n], b[n]) for n in a if '.tuned.' in n)
    assert any(not torch.equal(a[n], b[n]) for n in a if n.startswith('policy.'))


@pytest.mark.parametrize('flags', [
    ['--grad-accum-steps', '2', '--recovery-interval', '2', '--temperature', '5', '--temperature-end', '1'],
    [*GLOBAL_K, '--model-ema', '--recovery-interval', '2'],
])
def test_resume_restores_the_noise(run, monkeypatch, flags):
    whole = run('whole', *flags, base=BASE)
    with monkeypatch.context() as patch:
        kill_at(patch, 1, 3)
        with pytest.raises(Killed):
            run('killed', *flags, base=BASE)
    assert_same_run(whole, run('killed', *flags, '--resume', 'auto', base=BASE))


def test_global_k_writes_a_model_that_needs_no_package(run):
    folder = run('run', *GLOBAL_K, base=BASE)
    last = rows(folder / 'policy.csv')[-1]
    blocks = sum(name.startswith('block_') for name in last)
    # Evaluated under the constraint: every image takes the tuned copy of the same one block.
    assert sorted(float(last[f'block_{i}']) for i in range(blocks)) == [0.] * (blocks - 1) + [1.]
    config = json.loads((folder / 'compact' / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet' and 'file' not in config['pretrained_cfg']
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]  # the run's, not the architecture's
    plain = timm.create_model(f'local-dir:{folder / "compact"}', pretrained=True).eval()
    assert plain.num_classes == 5 and not any(type(m).__module__.startswith('timm_amf') for m in plain.modules())
    tuned = timm.create_model(
        'spottune', backbone='test_resnet', policy='test_resnet', num_classes=5,
        checkpoint_path=str(folder / 'model_best.safetensors')).eval()
    tuned.set_blocks(tuned.chosen_blocks(1))
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), tuned(x), rtol=1e-4, atol=1e-5)


def test_evaluation_by_chosen_paths(run, trained, capsys):
    folder = trained('run', base=BASE)
    lines = []
    for flags in ([], ['--eval-blocks', 'tuned'], ['--eval-blocks', '0,2'], ['--eval-sampling-seed', '3']):
        capsys.readouterr()
        run('eval', '--eval-only', '--resume', str(folder / 'last'), *flags, base=BASE)
        lines.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert all('tuned blocks' in line for line in lines)
    blocks = sum(name.startswith('block_') for name in rows(folder / 'policy.csv')[0])
    assert f'tuned blocks {blocks}.00' in lines[1] and 'tuned blocks 2.00' in lines[2]


PLAIN = ['--model', 'test_resnet', *BASE[BASE.index('--img-size'):BASE.index('--policy-lr')]]


@pytest.mark.parametrize('base, flags, words', [
    (BASE, ['--eval-blocks', '99'], 'no routed block'),
    (BASE, ['--global-k', '99'], '99'),
    (BASE, ['--temperature', '-1'], 'temperature must be above 0'),
    (PLAIN, ['--eval-blocks', 'tuned'], '--eval-blocks'),
    (PLAIN, ['--global-k', '1'], '--global-k does not act'),
    (PLAIN, ['--temperature', '1'], '--temperature does not act'),
])
def test_refused_before_any_work(components, tmp_path, base, flags, words):
    with pytest.raises(UserError, match=words):
        train_amf.train([*base, *components, '--output', str(tmp_path), '--experiment', 'x', *flags])
    assert not (tmp_path / 'x').exists()


def test_paths_are_given_back(spottune):
    spottune.set_blocks([1])
    with spottune.evaluation(global_k=2, blocks='frozen', sampling_seed=1):
        assert spottune.fixed_blocks == () and spottune.sampling is not None
    assert spottune.fixed_blocks == (1,) and spottune.sampling is None
    assert spottune.fixed_path(blocks='0,-1') == [0, len(spottune.block_names) - 1] and spottune.fixed_path() is None


def test_record_against_a_loop(spottune):
    record = spottune.create_record(['a', 'b'])
    generator = torch.Generator().manual_seed(0)
    blocks = len(spottune.block_names)
    seen, likely = [], []
    for size in (5, 3):
        shares = (torch.rand(size, blocks, generator=generator) > 0.5).float()
        component = torch.randint(0, 2, (size,), generator=generator)
        probabilities = torch.rand(size, blocks, generator=generator)
        record.update(dict(shares=shares, probabilities=probabilities), component)
        seen += list(zip(component.tolist(), shares.tolist()))
        likely += list(zip(component.tolist(), probabilities.tolist()))
    row = record.row()
    for i in range(blocks):
        assert row[f'block_{i}'] == pytest.approx(sum(s[i] for _, s in seen) / len(seen))
        of_b = [s[i] for c, s in seen if c == 1]
        assert row[f'b_block_{i}'] == pytest.approx(sum(of_b) / len(of_b))
        assert row[f'probability_{i}'] == pytest.approx(sum(p[i] for _, p in likely) / len(likely))
        assert row[f'a_probability_{i}'] == pytest.approx(
            sum(p[i] for c, p in likely if c == 0) / sum(c == 0 for c, _ in likely))
    for n in range(blocks + 1):
        assert row[f'images_{n}'] == sum(sum(s) == n for _, s in seen)
    assert method_of(timm.create_model('test_resnet')).create_record(['a']) is None
