"""`timm-amf search` and `search_blocks`, from images to a run of train_amf.py."""
import contextlib
import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest_advise import dry_run, reset_accelerate
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_amf
from timm_amf import cli
from timm_amf.engine.checkpoint import Checkpointer
from timm_amf.engine.loop import Trainer
from timm_amf.errors import UserError
from timm_amf.parsers import PARSERS
from timm_amf.search import block_search, training
from timm_amf.search.candidates import Candidate, Traced, candidate_parameters
from timm_amf.search.results import SearchResults

# At which candidates differ after a few steps.
LR = ['--lr', '0.02', '--warmup-epochs', '0']
BLOCKS = ['stem', 'layer1.0', 'layer2.0', 'layer3.0', 'layer4.0']


def call(*argv, verb='search'):
    reset_accelerate()
    return cli.main([verb, *map(str, argv)])


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> Path:
    """In place of the common ones, whose residual paths end in norms of weight zero: little before them learns."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet')
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp('weights') / 'test_resnet.safetensors'
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def base(flags, images, tmp_path) -> list[str]:
    """A search that is over in a second."""
    return [str(images / 'colours'), *flags, '--output', str(tmp_path), *LR]


@pytest.fixture
def search(base, tmp_path, capsys, monkeypatch):
    """search(*flags, name=...) -> (exit code, what it printed, its folder), without the figure."""
    monkeypatch.setattr(block_search, 'write_figure', lambda *args: [])

    def run(*extra, name: str = 's'):
        capsys.readouterr()
        code = call(*base, '--experiment', name, *extra)
        captured = capsys.readouterr()
        return code, captured.out + captured.err, tmp_path / name
    return run


def curves(folder: Path, phase: str = 'results') -> dict:
    """(epoch, top1, loss) of each evaluation, by way and name of the candidate."""
    found = json.loads((folder / 'results.json').read_text())[phase]
    return {(r['candidate']['way'], r['candidate']['name']): r['curve'] for r in found}


def assert_close(one: dict, two: dict, tolerance: float = 1e-3) -> None:
    assert one.keys() == two.keys() and one
    for key, curve in one.items():
        for (epoch, top1, loss), (epoch2, top2, loss2) in zip(curve, two[key], strict=True):
            assert (epoch, top1) == (epoch2, top2), key
            assert loss == pytest.approx(loss2, rel=tolerance), key


@pytest.fixture(scope='module')
def everything(tmp_path_factory, images, weights) -> tuple[Path, str]:
    """A search of all ways, its folder and what it printed."""
    output = tmp_path_factory.mktemp('everything')
    flags = [
        '--model', 'test_resnet', '--pretrained-path', weights, '--img-size', '32', '-b', '16', '--workers', '0',
        '--cpu', '--tracker', 'none', '--no-progress', '--epochs', '2', *LR]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        code = call(
            images / 'colours', *flags, '--output', output, '--experiment', 'all', '--ways', 'layer', 'block', 'window',
            'top3')
    assert code == 0
    return output / 'all', text.getvalue()


def test_files(everything):
    folder, _ = everything
    assert {p.name for p in folder.iterdir()} == {
        'search.yaml', 'args.yaml', 'environment.yaml', 'results.json', 'candidates.csv', 'search.png', 'best.yaml'}
    with Image.open(folder / 'search.png') as figure:
        assert min(figure.size) > 300 and len(figure.convert('L').getcolors()) > 5


def test_report(everything, tmp_path, capsys):
    """A chart for each way, the tables, and how to run the best."""
    folder, _ = everything
    assert call(folder, '--output', tmp_path, verb='report') == 0
    page = (tmp_path / 'index.html').read_text(encoding='utf-8')
    for way in ('layer', 'block', 'window'):
        assert f'id="search_{way}"' in page and (tmp_path / f'search_{way}.png').is_file()
        with open(tmp_path / f'search_{way}.csv', newline='') as file:
            drawn = [(row['candidate'], float(row['accuracy'])) for row in csv.DictReader(file)]
        found = SearchResults.read(folder / 'results.json').of_way(way)
        assert drawn == [(r.candidate.name, r.top1) for r in found]
    for words in ('level with the best', 'baseline II', f'train --config {folder / "best.yaml"}', 'Beside the'):
        assert words in page
    capsys.readouterr()
    (tmp_path / 'search.yaml').touch()
    assert call(tmp_path, verb='report') == 2 and 'the search has not ended' in capsys.readouterr().err


def test_every_way_is_there(everything, weights):
    folder, _ = everything
    results = SearchResults.read(folder / 'results.json')
    model = timm.create_model('test_resnet', num_classes=3)
    layers = [n for n, p in model.named_modules() if isinstance(p, torch.nn.Conv2d)]
    assert sorted(r.candidate.name for r in results.of_way('layer')) == sorted(layers)
    assert [r.candidate.name for r in results.of_way('block')] == BLOCKS
    assert len(results.of_way('window')) == len(layers) - 2
    for result in results.results:
        names = [f for f, _ in model.named_parameters() if not f.startswith('fc')]
        if result.candidate.way not in ('classifier', 'all'):
            names = candidate_parameters(model, result.candidate)
        names = [] if result.candidate.way == 'classifier' else names
        count = sum(model.get_parameter(n).numel() for n in [*names, 'fc.weight', 'fc.bias'])
        assert result.parameters == count, result.candidate
        assert result.epochs == 2 and [e for e, *_ in result.curve] == [1, 2] and result.images == 18
        assert (result.top1, result.loss) == result.curve[-1][1:]
        assert result.top1 * 18 / 100 == pytest.approx(round(result.top1 * 18 / 100))
    assert results.train_images == 24 and results.classes == 3 and results.role == 'backbone'


def test_candidates_differ(everything):
    """Else what follows would say little."""
    results = SearchResults.read(everything[0] / 'results.json')
    model = timm.create_model('test_resnet')
    losses = [r.loss for r in results.results]
    tuned = [candidate_parameters(model, r.candidate) for r in results.results]
    assert all(math.isfinite(v) for v in losses)
    # The layers of a window may be those of a block; no others are the same.
    assert len(set(losses)) == len({frozenset(names) for names in tuned}) > 25


def test_top_layers_are_the_best(everything):
    results = SearchResults.read(everything[0] / 'results.json')
    (top,) = results.of_way('top3')
    layers = results.of_way('layer')
    best = sorted(layers, key=lambda r: (r.top1, r.candidate.position))[-3:]
    assert set(top.candidate.modules) == {m for r in best for m in r.candidate.modules}


def test_ranking(everything):
    """Table and CSV have the same order: the best first, of equal ones the smaller."""
    folder, text = everything
    found = json.loads((folder / 'results.json').read_text())['results']
    expected = [
        r['candidate']['name'] for r in sorted(found, key=lambda r: (-r['top1'], r['parameters']))]
    with open(folder / 'candidates.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [r['candidate'] if 'candidate' in r else r['name'] for r in rows] == expected
    lines = [line.split() for line in text.splitlines()]
    ranked = [line for line in lines if line and line[0].isdigit()]
    assert ranked[0][0] == '1' and expected[0] in ranked[0] and ranked[0][-1] == 'best'
    for line in ranked:
        assert expected[int(line[0]) - 1] in line
    for word in ('classifier (baseline I)', 'all (baseline II)', '95 % interval', 'Run it: timm-amf train --config'):
        assert word in text
    best = (folder / 'best.yaml').read_text().splitlines()
    assert f' {expected[0]}: ' in best[1]


@pytest.mark.parametrize('name', ['stem', 'classifier'])
def test_best_runs_unchanged(name, search, monkeypatch, weights):
    """Of the network, exactly the candidate and the classifier are other than at the start."""
    monkeypatch.setattr(SearchResults, 'winner', lambda self, way=None: next(
        r for r in self.results if r.candidate.name == (way if way in ('classifier', 'all') else name)))
    code, text, folder = search('--epochs', '1')
    assert code == 0, text
    assert call('--config', folder / 'best.yaml', '--experiment', 'run', verb='train') == 0
    run = folder.parent / 'run'
    trained, start = load_file(run / 'model_best.safetensors'), load_file(weights)
    model = timm.create_model('test_resnet', num_classes=3)
    found = [c for c in Traced(model, (3, 32, 32)).blocks() if c.name == name]
    tuned = {n for c in found for n in candidate_parameters(model, c)} | {'fc.weight', 'fc.bias'}
    changed = {n for n, _ in model.named_parameters() if n.startswith('fc') or not torch.equal(trained[n], start[n])}
    assert changed == tuned
    moved = {n for n, b in model.named_buffers() if 'running' in n and not torch.equal(trained[n], start[n])}
    assert moved == {n for n, _ in model.named_buffers() if 'running' in n and any(
        n.startswith(f'{m}.') for c in found for m in c.modules)}
    assert len((run / 'summary.csv').read_text().splitlines()) == 2  # a header and an epoch


def test_python(images, weights, tmp_path, everything):
    state = torch.random.get_rng_state()
    found = timm_amf.search_blocks(
        'test_resnet', images / 'colours', pretrained_path=str(weights), img_size=32, batch_size=16, workers=0,
        cpu=True, tracker=['none'], epochs=2, lr=0.02, warmup_epochs=0, output=str(tmp_path), experiment='api',
        progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    of_command = {k: v for k, v in curves(everything[0]).items() if k[0] in ('classifier', 'all', 'block')}
    assert_close(curves(tmp_path / 'api'), of_command)
    assert found.best.candidate == found.results.ranked()[0].candidate and found.folder == tmp_path / 'api'
    assert 'baseline II' in str(found)
    found.to_yaml(tmp_path / 'mine.yaml')
    assert yaml.safe_load((tmp_path / 'mine.yaml').read_text())['plan'] == found.plan.to_dict()
    with pytest.raises(UserError, match='cannot be written'):
        found.to_yaml(tmp_path / 'mine.yaml' / 'below.yaml')
    with pytest.raises(UserError, match='no_such_option') as caught:
        timm_amf.search_blocks('test_resnet', images / 'colours', no_such_option=1)
    assert 'options.yaml' not in str(caught.value)


@pytest.mark.parametrize('extra', [[], ['--mixup', '0.4', '--opt', 'adamw', '--lr', '0.002']])
def test_one_by_one(extra, search):
    """Each candidate in a network of its own, step by step the same."""
    extra = ['--epochs', '1', *extra]
    code, text, together = search(*extra, name='together')
    assert code == 0 and 'one after the other' not in text
    code, text, apart = search(*extra, '--one-by-one', name='apart')
    assert code == 0 and 'Candidates were trained one after the other: as asked for.' in text
    assert_close(curves(together), curves(apart))


def test_chunks(search, monkeypatch):
    sizes: list[int] = []
    train = training.CandidateRuns._train

    def counting(self, members, *args):
        sizes.append(sum(not m.alone for m in members))
        return train(self, members, *args)

    monkeypatch.setattr(training.CandidateRuns, '_train', counting)
    found = {}
    limits = {'whole': [], 'three': ['--chunk', '3'], 'little': ['--memory', '1e-6']}
    for name, extra in limits.items():
        sizes.clear()
        code, text, folder = search('--epochs', '1', *extra, name=name)
        assert code == 0, text
        found[name] = curves(folder)
        # Five blocks and the classifier; the network that is tuned as a whole has its own.
        assert sorted(s for s in sizes if s) == dict(whole=[6], three=[3, 3], little=[1] * 6)[name]
    for other in ('three', 'little'):
        assert_close(found[other], found['whole'], 1e-4)


def test_final_share(search):
    code, text, folder = search(
        '--search-share', '0.25', '--final-share', '0.75', '--epochs', '2', '--search-epochs', '1')
    assert code == 0, text
    results = SearchResults.read(folder / 'results.json')
    assert (results.train_images, results.final_images) == (6, 18) and 'on 18 images' in text
    assert {r.epochs for r in results.results} == {1} and {r.epochs for r in results.final} == {2}
    assert [r.candidate for r in results.final] == [
        Candidate('classifier', 'classifier', 0, ()), Candidate('all', 'all', 0, ('',)),
        results.winner('block').candidate]


def test_schedule_is_drawn_together(search, monkeypatch):
    """Two of ten epochs at the LRs of all ten: the schedule ends where the search does."""
    lrs = []
    step = Trainer._train_step

    def noting(self, *args):
        lrs.append([g['lr'] for g in self.bare_optimizer.param_groups])
        return step(self, *args)

    monkeypatch.setattr(Trainer, '_train_step', noting)
    code, text, _ = search('--epochs', '10', '--search-epochs', '2', '--sched', 'step', '--decay-epochs', '5')
    assert code == 0, text
    assert {round(v, 6) for lr in lrs for v in lr} == {0.02, 0.002}


def test_paper_head_of_a_network_with_layers_behind_its_features(images, tmp_path):
    """All candidates train something, in lockstep; nothing that the classifier does not read counts as trained."""
    model = timm.create_model('mobilenetv3_small_050')
    save_file(model.state_dict(), tmp_path / 'v3.safetensors')
    found = timm_amf.search_blocks(
        'mobilenetv3_small_050', images / 'colours', pretrained_path=str(tmp_path / 'v3.safetensors'), img_size=32,
        batch_size=12, workers=0, cpu=True, tracker=['none'], epochs=1, lr=0.02, warmup_epochs=0, output=str(tmp_path),
        experiment='v3', progress=False, search_head='mlp', cut='activation', ways=('block', 'random3'))
    assert not found.notes and len(found.results.of_way('block')) > 30 and len(found.results.of_way('random3')) == 1
    results, baseline = found.results.results, found.results.winner('classifier')
    assert not any('conv_head' in m for r in results for m in r.candidate.modules)
    assert all(r.loss != baseline.loss for r in results if r is not baseline)
    behind = sum(p.numel() for n, p in model.named_parameters() if n.startswith(('conv_head', 'classifier')))
    assert found.results.winner('all').parameters - baseline.parameters == sum(
        p.numel() for p in model.parameters()) - behind


def branch_flags(weights: Path) -> list[str]:
    return [
        '--model', 'amf', '--model-kwargs', "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
        f"backbone_kwargs={{'pretrained_cfg_overlay': {{'file': '{weights}'}}}}",
        f"policy_kwargs={{'pretrained_cfg_overlay': {{'file': '{weights}'}}}}", '--img-size', '32', '-b', '16',
        '--workers', '0', '--cpu', '--tracker', 'none', '--no-progress', '--epochs', '1', '--lr', '0.1']


@pytest.mark.parametrize('head', ['own', 'mlp'])
def test_branch_of_an_amf(head, images, weights, tmp_path, capsys):
    code = call(
        images / 'colours', *branch_flags(weights), '--search-role', 'branch.1', '--search-head', head, '--output',
        tmp_path, '--experiment', 'amf')
    text = ''.join(capsys.readouterr())
    assert code == 0 and 'Candidates were trained one after the other: ' in text
    results = SearchResults.read(tmp_path / 'amf' / 'results.json')
    assert results.role == 'branch.1' and len(results.of_way('block')) == 5
    modules = {m for r in results.of_way('block') for m in r.candidate.modules}
    assert modules and all(m.startswith('branches.1.') for m in modules)
    branch = sum(p.numel() for n, p in timm.create_model('test_resnet').named_parameters() if not n.startswith('fc'))
    assert results.winner('all').parameters - results.winner('classifier').parameters == branch
    roles = {g['role'] for g in dry_run(tmp_path / 'amf' / 'best.yaml')}
    assert roles <= {'branch.1', 'head'} and 'head' in roles


def interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C right after some state was written."""
    save, calls = Checkpointer.save_last, []

    def saving(self, *args):
        save(self, *args)
        calls.append(args)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, 'save_last', saving)


@pytest.mark.parametrize('after,extra', [
    (4, ['--chunk', '2', '--mixup', '0.2', '--opt', 'adamw', '--sched', 'plateau']),
    pytest.param(
        4, ['--ways', 'layer', 'top3', '--chunk', '8', '--final-share', '0.5'], marks=pytest.mark.slow),
    (3, ['--one-by-one', '--recovery-interval', '1']),
])
def test_resume(after, extra, search, monkeypatch):
    """The same to the bit as without a stop; what was done is not done again."""
    trained: list[int] = []
    step = Trainer._train_step
    monkeypatch.setattr(Trainer, '_train_step', lambda self, *args: (trained.append(1), step(self, *args))[1])
    code, text, whole = search(*extra, name='whole')
    assert code == 0, text
    in_one, trained[:] = sum(trained), []
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        code, text, folder = search(*extra, name='stopped')
    assert code == 130 and not (folder / 'results.json').exists()
    first, trained[:] = sum(trained), []
    code, text, folder = search(*extra, '--resume', 'auto', name='stopped')
    assert code == 0, text
    assert 0 < first < in_one and first + sum(trained) == in_one
    assert curves(folder) == curves(whole) and curves(folder, 'final') == curves(whole, 'final')
    assert not (folder / 'state').exists()


def test_folder_of_another_search(search, monkeypatch):
    def training(*args):
        raise AssertionError('trains again')

    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert search('--chunk', '3')[0] == 130
    code, text, folder = search('--chunk', '3')
    assert code == 2 and 'holds a search already; go on with --resume auto' in text
    code, text, _ = search('--lr', '0.2', '--resume', 'auto', '--chunk', '3')
    assert code == 2 and 'other settings (lr 0.02 before, 0.2 now)' in text
    code, text, _ = search('--window', '2', '--resume', 'auto', '--chunk', '3')
    assert code == 2 and 'other settings (window 3 before, 2 now)' in text
    code, text, _ = search('--resume', 'auto', '--chunk', '2')
    assert code == 2 and '--chunk and --memory stay as they were' in text
    assert search('--resume', 'auto')[0] == 0  # the chunks of the first start
    finished = (folder / 'results.json').read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_train_step', training)
        patch.setattr('timm_amf.search.block_search.start_head', training)  # nor are features computed
        code, text, _ = search('--resume', 'auto')  # nothing is left
    assert code == 0 and 'baseline II' in text and (folder / 'results.json').read_bytes() == finished
    code, text, _ = search('--lr', '0.2', '--overwrite')
    assert code == 0 and (folder / 'results.json').read_bytes() != finished


def test_damaged_state(search, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        _, _, folder = search()
    for path in (folder / 'state').glob('*/last/optimizer.pt'):
        path.write_bytes(path.read_bytes()[:100])
    code, text, _ = search('--resume', 'auto')
    assert code == 2 and 'is damaged' in text and text.count('\n') == 1


def test_starting_weights_are_the_files(search, monkeypatch, weights):
    """Bit for bit in the network that all share when all is done: parameters, and statistics of its norms."""
    networks = []
    init = training.CandidateRuns.__init__
    monkeypatch.setattr(training.CandidateRuns, '__init__', lambda self, traced, *args, **kwargs: (
        networks.append(traced.model), init(self, traced, *args, **kwargs))[1])
    code, text, _ = search('--search-head', 'mlp', '--final-share', '0.5', '--search-share', '0.5')
    assert code == 0, text
    start = load_file(weights)
    (network,) = networks
    for name, tensor in network.state_dict().items():
        assert name.startswith('fc.') or torch.equal(tensor, start[name]), name


@pytest.mark.parametrize('extra,message', [
    (['--ways', 'blocks'], 'blocks: unknown; choose from layer'),
    (['--ways', 'top0'], 'top0: unknown'),
    (['--ways', 'top40'], '--ways top40: the model has 15 layers'),
    (['--ways', 'window', '--window', '16'], 'window of 16 layers: the model has 15'),
    (['--ways', 'window', '--window', '0'], 'window of 0 layers'),
    (['--cut', 'conv'], 'activation'),
    (['--search-role', 'branch.0'], '--search-role branch.0: the model has no blocks there; it has backbone, head'),
    (['--search-role', 'head'], '--search-role head'),
    (['--search-share', '0'], '--search-share: must be above 0'),
    (['--search-share', '1.5'], '--search-share: must be between 0 and 1, not 1.5'),
    (['--final-share', '-0.1'], '--final-share: must be between 0 and 1'),
    (['--search-epochs', '0'], '--search-epochs: must be at least 1'),
    (['--chunk', '0'], '--chunk: must be at least 1'),
    (['--memory', '0'], '--memory: must be above 0'),
    (['--model', 'resnet_18'], 'resnet_18'),
    (['--pretrained-path', 'missing.safetensors'], 'missing.safetensors'),
    (['--dry-run'], '--dry-run'),
    (['--role', 'head.train=none'], 'the classifier must train in a search'),
    (['--role', 'backbone.start_epoch=1'], 'role backbone must train from the start'),
    (['--freeze', 'head'], 'the classifier must train in a search'),
    (['--no-such-flag'], '--no-such-flag'),
    (['--window', 'x'], '--window'),
])
def test_mistakes(extra, message, search, monkeypatch):
    monkeypatch.setattr(Trainer, '_train_step', lambda *args: pytest.fail('trains'))
    code, text, folder = search(*extra)
    assert code == 2 and message in text, text
    assert text.count('\n') == 1 and text.startswith('timm-amf search: error: '), text
    assert not (folder / 'results.json').exists()


def test_mistakes_without_a_folder(base, images, weights, tmp_path, capsys):
    def error(*argv: Sequence[str]) -> str:
        assert call(*argv) == 2
        text = ''.join(capsys.readouterr())
        assert text.count('\n') == 1
        return text

    assert 'no model' in error(images / 'colours', '--cpu')
    assert 'nowhere' in error(images / 'nowhere', *base[1:])
    assert '--experiment' in error(*base, '--resume', 'auto')
    for split in ('train', 'val'):
        for label in 'ab':
            (tmp_path / 'few' / split / label).mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(tmp_path / 'few' / split / label / '0.png')
    assert "class 'a' has 1 images, too few for 2 parts" in error(
        tmp_path / 'few', *base[1:], '--search-share', '0.5', '--final-share', '0.5')


def test_two_classifiers(images, tmp_path, capsys):
    model = timm.create_model('deit_tiny_distilled_patch16_224', depth=1, img_size=32)
    save_file(model.state_dict(), tmp_path / 'deit.safetensors')
    code = call(
        images / 'colours', '--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'depth=1', 'img_size=32',
        '--img-size', '32', '--pretrained-path', tmp_path / 'deit.safetensors', '--cpu', '--workers', '0', '--output',
        tmp_path)
    assert code == 2 and 'has 2 classifiers; search a model with one' in ''.join(capsys.readouterr())


def test_size_that_the_network_does_not_take(images, tmp_path, capsys):
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    save_file(model.state_dict(), tmp_path / 'vit.safetensors')
    code = call(
        images / 'colours', '--model', 'vit_tiny_patch16_224', '--model-kwargs', 'depth=1', '--img-size', '32',
        '--pretrained-path', tmp_path / 'vit.safetensors', '--cpu', '--workers', '0', '--output', tmp_path)
    text = ''.join(capsys.readouterr())
    assert code == 2 and text.count('\n') == 1 and '--img-size: vit_tiny_patch16_224 takes no images of 3x32x32' in text


@pytest.mark.slow
def test_two_processes(base, search, tmp_path):
    """Each with half of every batch; norms have the statistics of their half, so that without them all is the same."""
    root = Path(__file__).resolve().parents[2]
    code = 'import sys; from timm_amf.cli import main; sys.exit(main())'
    (tmp_path / 'verb.py').write_text(code)
    flags = ['--freeze-bn', 'backbone', '-b', '8']
    found = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', tmp_path / 'verb.py',
         'search', *base, *flags, '--experiment', 'two'],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count('Run it: timm-amf train') == 1
    _, _, one = search(*flags, '-b', '16', name='one')
    assert_close(curves(tmp_path / 'two'), curves(one))


def test_what_candidates_do_without_is_said(search):
    code, text, _ = search('--model-ema', '--epochs', '1')
    assert code == 0 and 'Candidates were trained without --model-ema.' in text


def test_help(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        call('--help')
    text = capsys.readouterr().out
    for flag in ('--ways', '--cut', '--one-by-one'):
        assert flag in text
    page = (Path(__file__).parents[2] / 'docs' / 'search.md').read_text()
    own = [o for a in PARSERS['search']()._actions for o in a.option_strings if o.startswith('--')]
    assert all(f'`{o}' in page or f' {o} ' in page for o in own if o != '--help')
