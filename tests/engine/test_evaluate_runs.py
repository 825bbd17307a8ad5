"""Runs evaluated from their folders: the run's own figures, ten crops, the mean, the ensemble, a SpotTune's paths."""
import csv
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest_engine import rows
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torchvision import transforms

from timm_amf.cli import main
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs
from timm_amf.errors import UserError

SIZES = ((50, 40), (40, 44), (41, 60))
PLAIN = [
    '--model', 'test_resnet', '--img-size', '32', '--crop-pct', '0.8', '-b', '20', '--epochs', '2', '--workers', '0',
    '--lr', '0.1', '--warmup-epochs', '0', '--cpu', '--tracker', 'none', '--smoothing', '0',
]
SPOTTUNE = [
    *PLAIN[2:], '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet', '--lr', '0.1',
    '--policy-lr', '0.1', '--role', 'stem.train=all',
]


@pytest.fixture(scope='module')
def oblong(tmp_path_factory):
    """Six classes of images that are not square: corners and centre differ along both axes."""
    root = tmp_path_factory.mktemp('oblong')
    rng = np.random.default_rng(1)
    for split, count in (('train', 12), ('validation', 5), ('test', 3)):
        for k in range(6):
            folder = root / split / f'class{k}'
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = SIZES[i % 3]
                image = rng.normal(110 + 20 * (k % 3), 50, (height, width, 3))
                image[:height // 2, :, k // 3] += 60
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return root


@pytest.fixture
def plain(trained, oblong):
    def _run(name, *flags, base=PLAIN):
        return trained(name, *flags, base=base, data=['--data-dir', str(oblong)])
    return _run


def network(folder, weights='model_best.safetensors'):
    model = timm.create_model('test_resnet', num_classes=6).eval()
    model.load_state_dict(load_file(folder / weights))
    return model


def images(root, split):
    return [(path, k) for k in range(6) for path in sorted((root / split / f'class{k}').iterdir())]


def probabilities(model, root, split, ten_crop):
    """(images, classes), image by image, by torchvision alone."""
    crop = transforms.TenCrop(32) if ten_crop else transforms.Compose([transforms.CenterCrop(32), lambda x: [x]])
    cfg = model.pretrained_cfg
    mode = transforms.InterpolationMode(cfg['interpolation'])
    steps = transforms.Compose([transforms.Resize(40, mode), crop])
    last = transforms.Compose([transforms.ToTensor(), transforms.Normalize(cfg['mean'], cfg['std'])])
    result = []
    for path, _ in images(root, split):
        crops = [last(c) for c in steps(Image.open(path).convert('RGB'))]
        with torch.no_grad():
            result.append(model(torch.stack(crops)).double().softmax(1).mean(0).numpy())
    return np.array(result)


def accuracy(p, targets, k=1):
    return 100 * np.mean([t in np.argsort(-row)[:k] for row, t in zip(p, targets)])


def assert_row(row, p, targets):
    assert row.images == len(targets)
    assert row.loss == pytest.approx(-np.log(p[np.arange(len(p)), targets]).mean(), rel=1e-5)
    assert row.top1 == pytest.approx(accuracy(p, targets)) and row.top5 == pytest.approx(accuracy(p, targets, 5))
    hits = round(row.top1 * len(targets) / 100)
    wilson = stats.binomtest(hits, len(targets)).proportion_ci(0.95, 'wilson')
    assert (row.top1_low, row.top1_high) == pytest.approx((100 * wilson.low, 100 * wilson.high))


def test_crops_mean_and_ensemble(plain, oblong, tmp_path, capsys):
    runs = [plain(f's{seed}', '--seed', str(seed)) for seed in range(3)]
    for ten_crop, split in ((False, 'validation'), (True, 'test')):
        targets = np.array([k for _, k in images(oblong, split)])
        each = [probabilities(network(run), oblong, split, ten_crop) for run in runs]
        got = evaluate_runs(runs, RunOptions(split=split, ten_crop=ten_crop, cpu=True), ensemble=True)
        assert [row.run for row in got] == [*map(str, runs), 'mean of 3 runs', 'ensemble of 3 runs']
        for row, p in zip(got, each):
            assert_row(row, p, targets)
        values = [row.top1 for row in got[:3]]
        assert got[3].top1 == pytest.approx(np.mean(values))
        assert got[3].top1_std == pytest.approx(np.std(values, ddof=1))
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert (got[3].top1_low, got[3].top1_high) == pytest.approx((max(low, 0), min(high, 100)))
        assert got[3].loss == pytest.approx(np.mean([row.loss for row in got[:3]]))
        assert_row(got[4], np.mean(each, 0), targets)
    one = evaluate_runs(runs[:1], RunOptions(split='test', cpu=True))[0]
    assert one.loss != pytest.approx(got[0].loss, rel=2e-4)  # ten crops are not one

    results = tmp_path / 'new/results.csv'
    words = [*map(str, runs), '--ten-crop', '--ensemble', '--split', 'test', '--cpu', '-b', '7', '--results-file']
    assert main(['evaluate', *words, str(results)]) == 0
    text = capsys.readouterr().out
    assert f'{got[3].top1:.2f}' in text and f'{got[3].top1_std:.2f}' in text and 'ddof 1' in text
    with open(results, newline='') as file:
        lines = list(csv.DictReader(file))
    assert [float(line['top1']) for line in lines] == pytest.approx([row.top1 for row in got])
    assert [float(line['loss']) for line in lines] == pytest.approx([row.loss for row in got], rel=1e-5)
    assert lines[3]['top1_std'] and not lines[0]['top1_std']
    assert {(line['split'], line['crops'], line['weights']) for line in lines} == {('test', '10', 'best')}


def test_a_mixture_by_component(run):
    folder = run('mixed', '--epochs', '2')
    best = max(rows(folder / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    got = evaluate_runs([folder], RunOptions(cpu=True))
    assert [(row.component, row.images) for row in got] == [('', 25), ('stripes', 15), ('blobs', 10)]
    for row, name in zip(got, ('eval_top1', 'eval_top1_stripes', 'eval_top1_blobs')):
        assert row.top1 == pytest.approx(float(best[name]))
    assert got[0].loss == pytest.approx(float(best['eval_loss']), rel=1e-4)
    assert got[0].top5 == pytest.approx(float(best['eval_top5']))
    with pytest.raises(UserError, match="--split holdout: .*component 'stripes'"):
        options = yaml.safe_load((folder / 'args.yaml').read_text())
        options['component'] = [f'{text},splits.val=val' for text in options['component']]
        (folder / 'args.yaml').write_text(yaml.safe_dump(options))
        evaluate_runs([folder], RunOptions(split='holdout', cpu=True))


def test_which_weights(plain, oblong):
    folder = plain('a')
    state = load_file(folder / 'last/model.safetensors')
    save_file({**state, 'fc.weight': -state['fc.weight']}, folder / 'last/model.safetensors')
    (folder / 'last/digests.json').unlink()  # as of a run of an older version
    targets = np.array([k for _, k in images(oblong, 'validation')])
    for weights, file in (('best', 'model_best.safetensors'), ('last', 'last/model.safetensors')):
        row, = evaluate_runs([folder], RunOptions(weights=weights, cpu=True))
        assert_row(row, probabilities(network(folder, file), oblong, 'validation', False), targets)
    with pytest.raises(UserError, match='kept no moving average'):
        evaluate_runs([folder], RunOptions(weights='ema', cpu=True))
    shutil.copy(folder / 'model_best.safetensors', folder / 'last/ema.safetensors')
    best, last, ema, raw = (
        evaluate_runs([folder], RunOptions(weights=weights, cpu=True))[0].loss
        for weights in ('best', 'last', 'ema', 'raw'))
    assert best == ema == last != raw


def test_bfloat16(plain):
    folder = plain('a')
    exact, = evaluate_runs([folder], RunOptions(cpu=True))
    rough, = evaluate_runs([folder], RunOptions(cpu=True, precision=torch.bfloat16))
    assert exact.loss != rough.loss and exact.loss == pytest.approx(rough.loss, rel=0.05)


def test_the_paths_of_a_spottune(plain, oblong):
    folder = plain('spot', base=SPOTTUNE)

    def loss(**options):
        return evaluate_runs([folder], RunOptions(cpu=True, **options))[0].loss

    targets = np.array([k for _, k in images(oblong, 'validation')])
    model = timm.create_model('spottune', backbone='test_resnet', policy='test_resnet', num_classes=6).eval()
    model.load_state_dict(load_file(folder / 'model_best.safetensors'))
    for blocks, asked in (('tuned', 'tuned'), ('frozen', 'frozen'), ('0,2', [0, 2])):
        model.set_blocks(asked)
        row, = evaluate_runs([folder], RunOptions(cpu=True, blocks=blocks))
        assert_row(row, probabilities(model, oblong, 'validation', False), targets)
    fixed = {blocks: loss(blocks=blocks) for blocks in ('tuned', 'frozen', '0,2')}
    assert len(set(fixed.values())) == 3
    assert loss() == loss(blocks='policy')

    drawn = [loss(sampling_seed=seed) for seed in (1, 2, 3, 1)]
    assert drawn[0] == drawn[3] and len(set(drawn[:3])) == 3 and loss() not in drawn
    # What the run itself evaluates with is what it is evaluated with.
    options = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({**options, 'eval_blocks': 'tuned'}))
    assert loss() == fixed['tuned'] != loss(blocks='policy') and loss(blocks='frozen') == fixed['frozen']
    with pytest.raises(UserError, match='no routed block 99'):
        loss(blocks='0,99')


def test_a_global_policy(plain, oblong):
    folder = plain('global', '--global-k', '2', base=SPOTTUNE)
    best = max(rows(folder / 'summary.csv'), key=lambda row: float(row['eval_top1']))
    assert evaluate_runs([folder], RunOptions(cpu=True))[0].top1 == pytest.approx(float(best['eval_top1']))
    compact = timm.create_model(f'local-dir:{folder / "compact"}', pretrained=True).eval()
    p = probabilities(compact, oblong, 'validation', False)
    targets = np.array([k for _, k in images(oblong, 'validation')])
    assert_row(evaluate_runs([folder], RunOptions(cpu=True))[0], p, targets)


def test_what_cannot_be_averaged(plain, run, oblong, tmp_path, capsys):
    a, b = plain('a'), plain('b', '--epochs', '1', '--num-classes', '8')
    mixed = run('mixed', '--epochs', '1')
    other = tmp_path / 'other'
    shutil.copytree(oblong, other)
    (other / 'validation/class0/0.png').unlink()
    less = run('less', '--epochs', '1', base=PLAIN, data=['--data-dir', str(other)])
    third = tmp_path / 'third'
    shutil.copytree(oblong, third)
    elsewhere = run('elsewhere', '--epochs', '1', base=PLAIN, data=['--data-dir', str(third)])
    for words, message in (
            ([a, mixed, '--ensemble'], 'differ in their classes (6 and 5 of them); an ensemble needs the same'),
            ([a, less, '--ensemble'], 'differ in their images (30 and 29 of them); an ensemble needs the same'),
            ([a, b, '--ensemble'], 'has 6 outputs and'),
            ([a, '--ensemble'], 'there is one run; give two or more'),
            ([a, a], 'is given twice'),
            ([a, tmp_path / 'nowhere'], 'nowhere: no such file or folder'),
            ([a, oblong], f'{oblong}: no args.yaml there; give the folder of a run'),
            ([a, '--blocks', 'tuned'], 'do not act on ResNet'),
            ([a, '--data-dir', tmp_path / 'gone'], 'gone does not exist'),
            ([mixed, '--data-dir', other], "names the folder of component 'stripes' itself"),
            ([a, elsewhere, '--ensemble'], f'images ({oblong}/validation/class0/0.png and {third}/'),
            ([a, '--amp', '--cpu'], '--amp: float16 needs a GPU'),
            ([a, '--confidence', '100'], '--confidence: must be between 0 and 100'),
            ([a, '--batch-size', '0'], '--batch-size: must be at least 1'),
            ([a, '--weights', 'worst'], 'invalid choice'),
            (['--ten-crop'], 'arguments are required: RUN'),
            ([a, '--crop-mode', 'border'], 'unknown flag --crop-mode'),
    ):
        assert main(['evaluate', *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1 and error.startswith('timm-amf evaluate: error: ')
    moved = ['--ensemble', '--data-dir', str(third), '--cpu']
    assert main(['evaluate', str(a), str(elsewhere), *moved]) == 0
    # Each alone they can be evaluated, without a mean: that is of runs that differ in nothing but their seed.
    for third, what in ((less, f'data_dir ({oblong} and {other})'), (b, 'epochs (2 and 1)')):
        assert main(['evaluate', str(a), str(third), '--cpu']) == 0
        out = capsys.readouterr().out
        assert 'mean of' not in out and f'no mean: {a} and ' in out and f'differ in their {what}' in out
    with pytest.raises(UserError, match='--ten-crop: .*shows whole images'):
        border = plain('border', '--epochs', '1', '--pretrained-cfg-overlay', 'crop_mode=border')
        evaluate_runs([border], RunOptions(ten_crop=True, cpu=True))
    folder = tmp_path / 'file'
    folder.write_text('')
    assert main(['evaluate', str(a), '--cpu', '--results-file', str(folder / 'x.csv')]) == 2
    assert 'cannot be written' in capsys.readouterr().err


def test_the_flags_of_the_train_script(plain, oblong, tmp_path, capsys):
    folder = plain('a')
    words = [str(oblong), *PLAIN, '--initial-checkpoint', str(folder / 'model_best.safetensors')]
    assert main(['evaluate', *words, '--output', str(tmp_path), '--experiment', 'x']) == 0
    row, = evaluate_runs([folder], RunOptions(cpu=True))
    assert f'top1 {row.top1:.2f}' in capsys.readouterr().out
