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
from timm_amf.errors import UserError
from timm_amf.search import search_flags, taps
from timm_amf.search.candidates import Candidate, block_candidates, candidate_parameters
from timm_amf.search.contest import Contest
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
def search(base, tmp_path, capsys):
    """search(*flags, name=...) -> (exit code, what it printed, its folder)."""
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
        'search.yaml', 'args.yaml', 'results.json', 'candidates.csv', 'search.png', 'best.yaml'}
    with Image.open(folder / 'search.png') as figure:
        assert min(figure.size) > 300 and len(figure.convert('L').getcolors()) > 5


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
    for word in ('classifier (baseline I)', 'all (baseline II)', '95 % interval', 'Run it: train_amf.py --config'):
        assert word in text
    best = (folder / 'best.yaml').read_text().splitlines()
    assert f' {expected[0]}: ' in best[1]


@pytest.mark.parametrize('name', ['layer3.0', 'stem', 'classifier'])
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
    found = [c for c in block_candidates(model, (3, 32, 32)) if c.name == name]
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
    code, text, together = search(*extra, name='together')
    assert code == 0 and 'one after the other' not in text
    code, text, apart = search(*extra, '--one-by-one', name='apart')
    assert code == 0 and 'Candidates were trained one after the other: as asked for.' in text
    assert_close(curves(together), curves(apart))


def test_chunks(search, monkeypatch):
    sizes: list[int] = []
    train_chunk = Contest._train_chunk

    def counting(self, part, *args):
        sizes.append(sum(not c.member.alone for c in part))
        return train_chunk(self, part, *args)

    monkeypatch.setattr(Contest, '_train_chunk', counting)
    found = {}
    limits = {'whole': [], 'one': ['--chunk', '1'], 'three': ['--chunk', '3'], 'little': ['--memory', '1e-6']}
    for name, extra in limits.items():
        sizes.clear()
        code, text, folder = search(*extra, name=name)
        assert code == 0, text
        found[name] = curves(folder)
        # Five blocks and the classifier; the network that is tuned as a whole has its own.
        assert sorted(s for s in sizes if s) == dict(whole=[6], one=[1] * 6, three=[3, 3], little=[1] * 6)[name]
    for other in ('one', 'three', 'little'):
        assert_close(found[other], found['whole'], 1e-4)


def test_halving(search):
    code, text, whole = search('--epochs', '4', name='whole')
    assert code == 0, text
    code, text, halved = search('--epochs', '4', '--halving', '0.5', name='halved')
    assert code == 0 and ' stopped' in text
    every, found = curves(whole), curves(halved)
    assert found.keys() == every.keys()
    at = {e: {k: c[e - 1][1] for k, c in every.items() if k[0] == 'block'} for e in (1, 2)}
    epochs = {k: c[-1][0] for k, c in found.items()}
    # Rungs after 1 and 2 of 4 epochs: of five blocks three go on, then two; baselines always do.
    assert epochs['classifier', 'classifier'] == epochs['all', 'all'] == 4
    assert sorted(e for k, e in epochs.items() if k[0] == 'block') == [1, 1, 2, 4, 4]
    for rung, accuracies in at.items():
        going = [v for k, v in accuracies.items() if epochs[k] > rung]
        left = [v for k, v in accuracies.items() if epochs[k] == rung]
        assert min(going) >= max(left)
    assert_close(found, {k: c[:epochs[k]] for k, c in every.items()}, 1e-4)
    results = SearchResults.read(halved / 'results.json')
    assert {r.candidate.name for r in results.results if r.stopped} == {k[1] for k, e in epochs.items() if e < 4}
    assert [r.stopped for r in results.ranked()] == sorted(r.stopped for r in results.results)


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


def test_schedule_is_drawn_together(search):
    """Two of ten epochs at the LRs of all ten: the schedule ends where the search does."""
    lrs = []
    update = Contest._update

    def noting(self, part, scaler):
        lrs.append([g['lr'] for g in part[0].optimizer.param_groups])
        return update(self, part, scaler)

    Contest._update = noting
    try:
        code, text, _ = search('--epochs', '10', '--search-epochs', '2', '--sched', 'step', '--decay-epochs', '5')
    finally:
        Contest._update = update
    assert code == 0, text
    assert {round(v, 6) for lr in lrs for v in lr} == {0.02, 0.002}


def test_protocol(search):
    code, text, folder = search('--protocol', 'paper', '--epochs', '1', '--ways', 'block', 'top3', '--lr', '1e-4')
    assert code == 0, text
    results = SearchResults.read(folder / 'results.json')
    # 14 images of each of three classes, of both splits together: 1, 10 and 3 of each.
    assert (results.train_images, results.final_images, results.results[0].images) == (3, 30, 9)
    assert results.ways == ['layer', 'block', 'top3']  # which needs the layers
    assert [r.candidate.way for r in results.final] == ['classifier', 'all', *results.ways]
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (args['opt'], args['sched'], args['no_aug'], args['smoothing']) == ('adam', 'plateau', True, 0)
    assert args['epochs'] == 1 and {r.epochs for r in (*results.results, *results.final)} == {1}  # what is given wins
    features = timm.create_model('test_resnet').eval().forward_features(torch.zeros(1, 3, 32, 32)).numel()
    assert results.winner('classifier').parameters == features * 128 + 128 + 128 * 64 + 64 + 64 * 3 + 3
    assert {g['role']: g['lr'] for g in dry_run(folder / 'best.yaml')}['head'] == 1e-4


def test_protocol_of_the_paper_without_more(base):
    own, args = search_flags.parse_search_args([base[0], '--model', 'vgg16', '--protocol', 'paper'])
    assert own.ways == ['layer', 'block', 'window', 'top3', 'top5'] and own.search_head == 'mlp'
    assert (own.search_share, own.final_share, own.search_epochs) == (0.1, 0.7, 50)
    assert (args.epochs, args.batch_size, args.opt, args.sched, args.pretrained) == (50, 4, 'adam', 'plateau', True)
    argv = [base[0], '--model', 'vgg16', '--protocol', 'paper', '-b', '8', '--sched=cosine']
    own, args = search_flags.parse_search_args(argv)
    assert (args.batch_size, args.sched, args.opt) == (8, 'cosine', 'adam')


def test_protocol_in_python(images, weights, tmp_path):
    """Here, too, what is given wins."""
    found = timm_amf.search_blocks(
        'test_resnet', images / 'colours', ways=['block'], protocol='paper', epochs=1, pretrained_path=str(weights),
        img_size=32, workers=0, cpu=True, tracker=['none'], output=str(tmp_path), experiment='api', progress=False)
    args = yaml.safe_load((tmp_path / 'api' / 'args.yaml').read_text())
    assert (args['epochs'], args['batch_size'], args['opt'], args['lr']) == (1, 4, 'adam', 1e-4)
    assert found.results.train_images == 3 and found.results.ways == ['block']


def test_budget(search, monkeypatch):
    """Images and epochs as `fit_budget` has them, at costs that are set here."""
    monkeypatch.setattr(Contest, 'costs', lambda self, candidates, stage, steps: (1., 1.))
    # 10 minutes, of which 540 s count: 18 of them validate 18 images, and 522 are 21 epochs of 24.
    code, text, folder = search('--budget', '10', '--epochs', '3', name='long')
    assert code == 0 and 'For 10 minutes: 3 epochs on 24 images, validated on 18.' in text
    assert {len(c) for c in curves(folder).values()} == {1}  # one validation, at the end
    # 42 s: 14 validate 14 of 18 images (4 or 5 of each class), and 28 are one epoch on 24 images, or 2 on 14.
    code, text, folder = search('--budget', str(42 / 54), '--epochs', '2', '--cache-images', name='short')
    assert code == 0 and 'For 0.777778 minutes: 2 epochs on 15 images, validated on 15.' in text
    assert SearchResults.read(folder / 'results.json').results[0].images == 15
    code, text, folder = search('--budget', '0.1', name='none')
    assert code == 2 and text.count('\n') == 1 and '--budget: 0.1 minutes are too short' in text


def test_budget_is_measured(search):
    code, text, folder = search('--budget', '5', '--epochs', '2')
    assert code == 0 and 'For 5 minutes: 2 epochs on 24 images, validated on 18.' in text
    fit = yaml.safe_load((folder / 'budget.yaml').read_text())
    assert 0 < fit['seconds'] < 300


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
    save, calls = Contest._save, []

    def saving(self, *args):
        save(self, *args)
        calls.append(args)
        if len(calls) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Contest, '_save', saving)


@pytest.mark.parametrize('after,extra', [
    (1, []),
    (3, ['--chunk', '2', '--mixup', '0.2', '--opt', 'adamw', '--sched', 'plateau']),
    (3, ['--halving', '0.5', '--epochs', '3']),
    pytest.param(
        4, ['--ways', 'layer', 'top3', '--chunk', '8', '--final-share', '0.5'], marks=pytest.mark.slow),
    (1, ['--one-by-one']),
    (1, ['--budget', '5']),
])
def test_resume(after, extra, search, monkeypatch):
    """The same to the bit as without a stop; what was done is not done again."""
    if '--budget' in extra:
        monkeypatch.setattr(Contest, 'costs', lambda *args: (1., 1.))
    trained: list[int] = []
    train = Contest._train_epoch
    monkeypatch.setattr(Contest, '_train_epoch', lambda self, part, *args: (
        trained.append(len(part)), train(self, part, *args))[1])
    code, text, whole = search(*extra, '--cache-gb', '0', name='whole')
    assert code == 0, text
    in_one, trained[:] = sum(trained), []
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        code, text, folder = search(*extra, '--cache-gb', '0', name='stopped')
    assert code == 130 and '--resume auto' in text and not (folder / 'results.json').exists()
    first, trained[:] = sum(trained), []
    code, text, folder = search(*extra, '--cache-gb', '0', '--resume', 'auto', name='stopped')
    assert code == 0, text
    assert 0 < first < in_one and first + sum(trained) == in_one
    assert curves(folder) == curves(whole) and curves(folder, 'final') == curves(whole, 'final')
    assert not (folder / 'state').exists()


def test_resume_with_the_cache(search, monkeypatch):
    monkeypatch.setattr(taps, '_MARGIN', 0)
    flags = ['--no-aug', '--epochs', '3', '--chunk', '3']
    _, _, whole = search(*flags, name='whole')
    _, _, computed = search(*flags, '--cache-gb', '0', name='computed')
    assert_close(curves(whole), curves(computed), 1e-4)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert search(*flags, name='stopped')[0] == 130
    code, text, folder = search(*flags, '--resume', 'auto', name='stopped')
    assert code == 0, text
    assert_close(curves(folder), curves(whole), 1e-4)


def test_folder_of_another_search(search, monkeypatch):
    def training(*args):
        raise AssertionError('trains again')

    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert search('--chunk', '3')[0] == 130
    code, text, folder = search('--chunk', '3')
    assert code == 2 and 'holds a search already; go on with --resume auto' in text
    code, text, _ = search('--lr', '0.2', '--resume', 'auto', '--chunk', '3')
    assert code == 2 and 'other settings' in text
    code, text, _ = search('--window', '2', '--resume', 'auto', '--chunk', '3')
    assert code == 2 and 'other settings' in text
    code, text, _ = search('--resume', 'auto', '--chunk', '2')
    assert code == 2 and '--chunk and --memory stay as they were' in text
    assert search('--resume', 'auto')[0] == 0  # the chunks of the first start
    finished = (folder / 'results.json').read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Contest, '_train_epoch', training)
        code, text, _ = search('--resume', 'auto')  # nothing is left
    assert code == 0 and 'baseline II' in text and (folder / 'results.json').read_bytes() == finished
    code, text, _ = search('--lr', '0.2', '--overwrite')
    assert code == 0 and (folder / 'results.json').read_bytes() != finished


def test_damaged_state(search, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        _, _, folder = search()
    for path in (folder / 'state').glob('*.pt'):
        path.write_bytes(path.read_bytes()[:100])
    code, text, _ = search('--resume', 'auto')
    assert code == 2 and 'start anew with --overwrite' in text and text.count('\n') == 1


def test_starting_weights_are_the_files(search, monkeypatch, weights):
    """Bit for bit in the network that all share when all is done: parameters, and statistics of its norms."""
    networks = []
    init = Contest.__init__
    monkeypatch.setattr(Contest, '__init__', lambda self, model, *args, **kwargs: (
        networks.append(model), init(self, model, *args, **kwargs))[1])
    code, text, _ = search('--search-head', 'mlp', '--final-share', '0.5', '--search-share', '0.5')
    assert code == 0, text
    start = load_file(weights)
    (network,) = networks
    for name, tensor in network.state_dict().items():
        assert name.startswith('fc.') or torch.equal(tensor, start[name]), name


@pytest.mark.parametrize('extra,message', [
    (['--ways', 'blocks'], '--ways blocks: unknown'),
    (['--ways', 'top0'], '--ways top0: unknown'),
    (['--ways', 'top40'], '--ways top40: the model has 15 layers'),
    (['--ways', 'window', '--window', '16'], 'window of 16 layers: the model has 15'),
    (['--ways', 'window', '--window', '0'], 'window of 0 layers'),
    (['--cut', 'conv'], '--cut conv: unknown'),
    (['--search-role', 'branch.0'], '--search-role branch.0: the model has no blocks there; it has backbone, head'),
    (['--search-role', 'head'], '--search-role head'),
    (['--search-share', '0'], '--search-share 0: must be above 0'),
    (['--search-share', '1.5'], '--search-share 1.5'),
    (['--final-share', '-0.1'], '--final-share -0.1'),
    (['--halving', '1'], '--halving 1: must be above 0 and below 1'),
    (['--budget', '-3'], '--budget -3: must be above 0'),
    (['--search-epochs', '0'], '--search-epochs 0'),
    (['--chunk', '0'], '--chunk 0'),
    (['--memory', '0'], '--memory 0'),
    (['--cache-gb', '-1'], '--cache-gb -1'),
    (['--protocol', 'paper', '--budget', '3'], '--budget changes'),
    (['--protocol', 'paper', '--search-share', '0.2'], '--search-share: --protocol fixes it'),
    (['--model', 'resnet_18'], 'resnet_18'),
    (['--pretrained-path', 'missing.safetensors'], 'missing.safetensors'),
    (['--grad-accum-steps', '2'], '--grad-accum-steps'),
    (['--bce-loss'], '--loss'),
    (['--dry-run'], '--dry-run'),
    (['--role', 'head.train=none'], 'the classifier must train in a search'),
    (['--role', 'backbone.start_epoch=1'], 'role backbone must train from the start'),
    (['--freeze', 'head'], 'the classifier must train in a search'),
    (['--no-such-flag'], '--no-such-flag'),
    (['--window', 'x'], '--window'),
])
def test_mistakes(extra, message, search, monkeypatch):
    monkeypatch.setattr(Contest, '_train_epoch', lambda *args: pytest.fail('trains'))
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
    assert "class 'a' has 2 images, too few for 3 parts" in error(tmp_path / 'few', *base[1:], '--protocol', 'paper')
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
         'search', *base, *flags, '--experiment', 'two', '--budget', '30'],
        cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count('Run it: train_amf.py') == 1 and found.stderr.count('For 30 minutes: 2 epochs on 24') == 1
    _, _, one = search(*flags, '-b', '16', '--val-interval', '2', name='one')
    assert_close(curves(tmp_path / 'two'), curves(one))


def test_compare(everything, tmp_path, capsys):
    folder, _ = everything
    assert call('--compare', folder, '--table-file', tmp_path / 'table.csv') == 0
    text = capsys.readouterr().out
    assert 'Baseline I' in text and 'test_resnet' in text and 'variance' in text
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [r['network'] for r in rows] == ['test_resnet', 'mean', 'variance'] and (tmp_path / 'table.png').exists()
    results = SearchResults.read(folder / 'results.json')
    assert float(rows[0]['block']) == pytest.approx(results.winner('block').top1 / 100, abs=1e-6)
    assert call('--compare', tmp_path / 'nowhere') == 2
    text = ''.join(capsys.readouterr())
    assert 'nowhere' in text and text.count('\n') == 1


def test_what_candidates_do_without_is_said(search):
    code, text, _ = search('--model-ema', '--epochs', '1')
    assert code == 0 and 'Candidates were trained without --model-ema.' in text


def test_help(capsys):
    assert call('--help') == 0
    text = capsys.readouterr().out
    for flag in ('--ways', '--cut', '--budget', '--halving', '--one-by-one', '--protocol', '--cache-gb', '--compare'):
        assert flag in text
    page = (Path(__file__).parents[2] / 'docs' / 'search.md').read_text()
    own = [o for a in search_flags.build_search_parser()._actions for o in a.option_strings if o.startswith('--')]
    assert all(f'`{o}' in page or f' {o} ' in page for o in own if o != '--help')
