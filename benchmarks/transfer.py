"""Methods of fine-tuning compared on folders of images: one CSV row a (set, method, seed), appended.

    python benchmarks/transfer.py --set dtd=DIR --set flowers=DIR,80 --model tf_efficientnet_lite0 --weights FILE

A set is a folder of splits of class folders, and the most images taken of each class; a mixture is several with `+`
between. Where a folder has no `test`, its validation images are the test images, and a fifth of the training images
validates. All methods have the same images, size, batches, augmentation and epochs. With the first seed each LR of a
method's grid is trained, and the best on the validation images is chosen; other seeds take this LR. The test images are
looked at once. An interrupted table goes on where it stopped.

    python benchmarks/transfer.py --costs --model tf_efficientnet_lite0
    python benchmarks/transfer.py --report

print what a trained model of each kind costs (parameters, time of an evaluation) and, from the CSV, the tables of
docs/results.md: mean and deviation over the seeds, cost of the training, and average rank. `fastai` is fastai's
`fine_tune` with its own head (pip install fastai), on the same images in the same augmentation.
"""
import argparse
import contextlib
import csv
import importlib
import io
import os
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import Accelerator
from scipy.stats import rankdata

import train_amf
from timm_amf.engine import build
from timm_amf.engine.checkpoint import read_state
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs
from timm_amf.engine.options import parse_args
from timm_amf.engine.run_folder import best_epoch
from timm_amf.parsers import parse
from timm_amf.search import advise, block_search, fit
from timm_amf.text import read_rows
from timm_amf.tuning import Plan

_FROM_PROBE = ('--head-start', 'probe', '--norms', 'frozen', '--opt', 'adamw', '--weight-decay', '0.01',
               '--sched-on-updates', '--warmup-epochs', '0.5')
_SGD = ('--opt', 'sgd', '--weight-decay', '1e-4', '--warmup-epochs', '0')
_ADAMW = ('--opt', 'adamw', '--weight-decay', '0.01', '--warmup-epochs', '0')
_BASE = 'AdamW, probe, norms frozen'  # whose one training is the unit of cost
_SGD_LRS = ('0.001', '0.005', '0.02', '0.08')
_ADAM_LRS = ('1e-4', '3e-4', '1e-3', '3e-3')

# Name -> its flags, and its grid of LRs.
METHODS = {
    'frozen features': (_FROM_PROBE, ()),
    "standard SGD, timm's start": ((*_SGD, '--head-start', 'timm'), _SGD_LRS),
    'standard SGD, zero head': ((*_SGD, '--head-start', 'zero'), _SGD_LRS),
    "standard AdamW, timm's start": ((*_ADAMW, '--head-start', 'timm'), _ADAM_LRS),
    'standard AdamW, zero head': ((*_ADAMW, '--head-start', 'zero'), _ADAM_LRS),
    'AdamW, zero head, norms frozen': ((*_ADAMW, '--head-start', 'zero', '--norms', 'frozen'), _ADAM_LRS),
    'AdamW, probe, norms trained': (
        (*_ADAMW, '--head-start', 'probe', '--sched-on-updates', '--warmup-epochs', '0.5'), _ADAM_LRS),
    'AdamW, probe, norms frozen': (_FROM_PROBE, _ADAM_LRS),
    'last block': ((*_FROM_PROBE, '--role', 'backbone.train=[-1,tail]'), _ADAM_LRS),
    'last 2 blocks': ((*_FROM_PROBE, '--role', 'backbone.train=[-2,-1,tail]'), _ADAM_LRS),
    'last 3 blocks': ((*_FROM_PROBE, '--role', 'backbone.train=[-3,-2,-1,tail]'), _ADAM_LRS),
    'L2-SP': ((*_FROM_PROBE, '--l2sp-alpha', '0.01'), _ADAM_LRS),
    'low blocks slower': ((*_FROM_PROBE, '--low-blocks', '8', '--low-lr-scale', '0.1'), _ADAM_LRS),
    'layer decay 0.75': ((*_FROM_PROBE, '--layer-decay', '0.75'), _ADAM_LRS),
    'LoRA of rank 8': ((*_FROM_PROBE, '--lora-rank', '8'), _ADAM_LRS),
    'non-binary as advised': ((), ()),
    'block-wise winner': (_FROM_PROBE, _ADAM_LRS),
    'twice the epochs': (_FROM_PROBE, _ADAM_LRS),
    'ensemble of two': (_FROM_PROBE, _ADAM_LRS),
    'SpotTune': (_FROM_PROBE, _ADAM_LRS),
    "SpotTune, timm's start": ((*_SGD, '--head-start', 'timm'), _SGD_LRS),
    'SpotTune global-3': ((*_FROM_PROBE, '--global-k', '3'), _ADAM_LRS),
    'MultiTune': ((*_FROM_PROBE, '--branch-loss', '1'), _ADAM_LRS),
    'AMF': ((*_FROM_PROBE, '--branch-loss', '1'), _ADAM_LRS),
    'fastai': ((), ('5e-4', '2e-3', '8e-3', '3e-2')),
    'fit': ((), ()),
}
SCALES = {
    'small': dict(img_size=96, batch_size=32, epochs=5),  # hours on two cores
    'full': dict(img_size=224, batch_size=64, epochs=30),  # of a GPU
}
COLUMNS = (
    'set', 'model', 'img_size', 'epochs', 'method', 'seed', 'lr', 'images', 'val', 'test', 'test_images', 'seconds',
    'seconds_all')


def model_flags(args: argparse.Namespace, method: str) -> list[str]:
    """Flags that name the network of a method, with its pretrained weights."""
    kind = next((k for k in ('SpotTune', 'AMF', 'MultiTune') if method.startswith(k)), None)
    if kind is None:
        return ['--model', args.model, '--pretrained', *(['--pretrained-path', args.weights] if args.weights else [])]
    names = f"backbones=('{args.model}','{args.model}')" if kind != 'SpotTune' else f'backbone={args.model}'
    policy = [f'policy={args.policy}'] if args.policy and kind != 'MultiTune' else []
    files = ['--backbone-weights', args.weights] if args.weights else []
    files += ['--policy-weights', args.policy_weights] if policy and args.policy_weights else []
    return ['--model', kind.lower(), '--pretrained', '--model-kwargs', names, *policy, *files]


def data_flags(text: str) -> tuple[str, list[str]]:
    name, _, folders = text.partition('=')
    words, tested = [], []
    for folder in folders.split('+'):
        root, _, number = folder.partition(',')
        tested.append(os.path.isdir(os.path.join(root, 'test')))
        words += ['--component', f'name={os.path.basename(os.path.normpath(root))},path={root}'
                  + (f',per_class={number}' if number else '') + ('' if tested[-1] else ',splits.test=val')]
    if any(tested) and not all(tested):
        raise SystemExit(f'{text}: only some of these folders have a split `test`')
    return name, words if all(tested) else [*words, '--val-share', '0.2']


def train(words: list[str], folder: Path) -> float:
    """Train into a folder; the seconds that it took."""
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        train_amf.train([*words, '--output', str(folder.parent), '--experiment', folder.name, '--overwrite'])
    return time.monotonic() - start


def run(args: argparse.Namespace, words: list[str], method: str, seed: int, scratch: Path, chosen: str) -> dict:
    """Train every LR of a method, or those chosen with an earlier seed, and test the best."""
    flags, lrs = METHODS[method]
    lrs = chosen.split(' and ') if chosen and lrs else lrs
    own = ['--epochs', str(2 * args.epochs)] if method == 'twice the epochs' else []
    common = [
        *model_flags(args, method), *words, '--img-size', str(args.img_size), '-b', str(args.batch_size), '--epochs',
        str(args.epochs), '--seed', str(seed), '--tracker', 'none', '-j', str(args.workers), '--cache-images',
        '--no-check-images', *(['--cpu'] if args.cpu else [])]
    start = time.monotonic()
    if method == 'block-wise winner':
        with contextlib.redirect_stdout(io.StringIO()):
            block_search.main(parse('search', [
                *common, *flags, '--lr', '3e-4', '--output', str(scratch), '--experiment', 'search']))
        flags = ('--config', str(scratch / 'search' / 'best.yaml'))
    if method == 'fit':
        with contextlib.redirect_stdout(io.StringIO()):
            found = fit.fit_words([*common, '--output', str(scratch), '--experiment', 'fit', '--overwrite'])
        best = (found.metric, found.winner.name, found.folder, time.monotonic() - start)
    elif method == 'frozen features':  # an epoch that changes nothing
        seconds = train([*common, *flags, '--lr', '1e-30', '--epochs', '1'], scratch / 'frozen')
        best = (best_epoch(scratch / 'frozen')['top1'], '', scratch / 'frozen', seconds)
    elif method == 'non-binary as advised':
        advice = scratch / 'advice.yaml'
        with contextlib.redirect_stdout(io.StringIO()):
            advise.main(parse('advise', [*common, '--advice-file', str(advice)]))
        seconds = train([*common, '--config', str(advice)], scratch / 'advised')
        best = (best_epoch(scratch / 'advised')['top1'], f'{Plan.from_yaml(advice).lr:g}', scratch / 'advised', seconds)
    elif method == 'fastai':
        row = fastai_row([*common, '--val-split', 'validation'], lrs, args, seed)
        return {**row, 'seconds_all': ''} if chosen else row
    else:
        tried = []
        for lr in lrs:
            folder = scratch / f'lr-{lr}'
            low = f'{float(lr) / 10:g}'  # as in the papers, of one branch, or of a policy that routes
            parts = ['--policy-lr', low] if method.startswith('SpotTune') else (
                ['--branch-lr', low, lr] if method in ('AMF', 'MultiTune') else [])
            seconds = train([*common, *flags, '--lr', lr, *parts, *own], folder)
            tried.append((best_epoch(folder)['top1'], lr, folder, seconds))
        tried.sort(key=lambda entry: -entry[0])
        best = tried[0]
    val, lr, folder, seconds = best
    total = time.monotonic() - start
    if method == 'ensemble of two':
        (_, lr, one, seconds), (_, other, two, more) = tried[:2]
        val, test = (next(row for row in evaluate_runs([one, two], RunOptions(split=split), ensemble=True)
                          if row.run.startswith('ensemble')) for split in ('validation', 'test'))
        lr, seconds, val = f'{lr} and {other}', seconds + more, val.top1
    else:
        test = evaluate_runs([folder], RunOptions(split='test'))[0]
    identity = read_state(folder / 'last')['identity']
    return dict(lr=lr, images=identity['samples'], val=round(val, 2), test=round(test.top1, 2), test_images=test.images,
                seconds=round(seconds, 1), seconds_all='' if chosen else round(total, 1))


class _Batches:
    """One of our loaders as fastai takes one."""

    def __init__(self, loader):
        self.loader, self.epoch, self.dataset, self.device = loader, 0, loader.dataset, torch.device('cpu')

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        self.loader.set_epoch(self.epoch, 0)
        self.epoch += 1
        return ((batch.input, batch.target) for batch in self.loader)

    def to(self, device):
        return self


def fastai_row(words: list[str], lrs: tuple[str, ...], args: argparse.Namespace, seed: int) -> dict:
    """fastai's `fine_tune` of the same network: an epoch of its head, then one cycle of all of it."""
    from fastai.callback.schedule import Learner
    from fastai.data.core import DataLoaders
    from fastai.losses import CrossEntropyLossFlat
    from fastai.vision.learner import TimmBody, apply_init, create_head

    options = parse_args(words)
    accelerator = Accelerator(cpu=args.cpu)
    train_set, val_set = build.build_data(options, accelerator)
    tested = parse_args([*words, '--val-split', 'test'])
    test_set = build.build_data(tested, accelerator)[1]
    start, tried = time.monotonic(), []
    for lr in lrs:
        build.seed_step(seed, 0, 0, 0)
        overlay = dict(pretrained_cfg_overlay=dict(file=args.weights)) if args.weights else {}
        body = timm.create_model(args.model, pretrained=True, num_classes=0, global_pool='', **overlay)
        head = create_head(body.num_features, train_set.num_classes)
        apply_init(head)
        model = torch.nn.Sequential(TimmBody(body), head)
        model.pretrained_cfg = model.default_cfg = body.pretrained_cfg
        train_loader, val_loader = build.build_loaders(options, model, train_set, val_set, accelerator)
        loaders = DataLoaders(_Batches(train_loader), _Batches(val_loader))
        learner = Learner(
            loaders, model, CrossEntropyLossFlat(), path=args.scratch, splitter=lambda m: [
                list(part.parameters()) for part in m])
        began = time.monotonic()
        with learner.no_bar(), learner.no_logging():
            learner.fine_tune(args.epochs - 1, float(lr))
        seconds = time.monotonic() - began
        test_loader = build.build_loaders(tested, model, train_set, test_set, accelerator)[1]
        tried.append((accuracy(model, val_loader), lr, seconds, accuracy(model, test_loader)))
        for loader in (train_loader, val_loader, test_loader):
            loader.close()
    val, lr, seconds, test = max(tried, key=lambda entry: entry[0])
    return dict(lr=lr, images=len(train_set), val=round(val, 2), test=round(test, 2), test_images=len(test_set),
                seconds=round(seconds, 1), seconds_all=round(time.monotonic() - start, 1))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, loader) -> float:
    model.eval()
    right = sum(int((model(batch.input).argmax(1) == batch.target).sum()) for batch in loader)
    return 100 * right / len(loader.dataset)


@torch.inference_mode()
def costs(args: argparse.Namespace) -> str:
    """A table in Markdown: parameters and time of an evaluation as ratios to the plain network, by what is left."""
    words = ['--img-size', str(args.img_size), '--tracker', 'none', '--epochs', '1', '--data-dir', '.']
    models = {
        kind: build.build_model(parse_args([*model_flags(args, kind), *words]), 10).eval()
        for kind in ('one network', 'MultiTune', 'AMF', 'SpotTune')}
    models['SpotTune global-3, compact'] = models['SpotTune'].compact(3)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(11):  # by turns; the first warms up
        for kind, model in models.items():
            start = time.perf_counter()
            model(images)
            seconds[kind].append(time.perf_counter() - start)
    plain = sum(p.numel() for p in models['one network'].parameters())
    lines = ['| what is left | parameters | evaluation |', '|---|---|---|']
    for kind, model in models.items():
        ratio = statistics.median(own / one for own, one in zip(seconds[kind][1:], seconds['one network'][1:]))
        lines.append(f'| {kind} | {sum(p.numel() for p in model.parameters()) / plain:.2f} | {ratio:.2f} |')
    return '\n'.join([*lines, '| ensemble of two | 2.00 | 2.00 |'])


def report(rows: list[dict]) -> str:
    """The tables in Markdown, one for each backbone and budget: methods by average rank of their test accuracy."""
    lines = []
    for key in sorted({(row['model'], row['img_size'], int(row['epochs'])) for row in rows}):
        own = [row for row in rows if (row['model'], row['img_size'], int(row['epochs'])) == key]
        sets = sorted({row['set'] for row in own})
        found = {}
        for row in own:
            found.setdefault((row['method'], row['set']), []).append(row)
        methods = [m for m in METHODS if any((m, s) in found for s in sets)]
        # Ranks are over the sets that all methods have.
        tests = [[statistics.mean(float(row['test']) for row in found[m, s]) for m in methods]
                 for s in sets if all((m, s) in found for m in methods)]
        ranks = dict(zip(methods, rankdata(-np.array(tests), axis=1).mean(axis=0))) if tests else {}
        lines += [f'**{key[0]}, {key[1]} px, {key[2]} epochs**', '',
                  f'| method | {" | ".join(sets)} | cost | with all LRs | average rank |',
                  '|---' * (len(sets) + 4) + '|']
        for m in sorted(methods, key=lambda m: ranks.get(m, 0)):
            cells, costs = [], []
            for name in sets:
                cells.append(_cell(found.get((m, name), [])))
                base = found.get((_BASE, name), [])
                for row in found.get((m, name), []):
                    plain = [float(r['seconds']) for r in base if r['seed'] == row['seed']]
                    costs += [[float(row[key]) / p if row[key] else None for key in ('seconds', 'seconds_all')]
                              for p in plain]
            # The median, for a machine that does something else now and then.
            cost = [statistics.median([c for c in column if c is not None]) for column in zip(*costs)]
            cost = [f'{c:.2f}' for c in cost] or ['', '']
            rank = f'{ranks[m]:.1f}' if ranks else ''
            lines.append(f'| {m} | {" | ".join([*cells, *cost, rank])} |')
        lines.append('')
    return '\n'.join(lines)


def _cell(rows: list[dict]) -> str:
    if not rows:
        return ''
    values = [float(row['test']) for row in rows]
    spread = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread} ({len(values)})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--set', action='append', default=[], metavar='NAME=DIR[,N]', help='a set, and the most images a class')
    add('--model', default='tf_efficientnet_lite0')
    add('--import', dest='module', metavar='MODULE', help='import this first: it registers a model that timm lacks')
    add('--weights', default='', metavar='FILE', help='its pretrained weights (default: from the Hub)')
    add('--policy', default='', metavar='NAME', help="policy network of AMF and SpotTune (default: the model's)")
    add('--policy-weights', default='', metavar='FILE')
    add('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME', help=', '.join(METHODS))
    add('--scale', choices=SCALES, default='small', help=f'what the three flags below are if not given: {SCALES}')
    add('--epochs', type=int)
    add('--img-size', type=int)
    add('--batch-size', type=int)
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--workers', type=int, default=2)
    add('--cpu', action='store_true')
    add('--csv', type=Path, default=Path('benchmarks/transfer.csv'))
    add('--scratch', type=Path, default=Path('output/transfer'))
    add('--minutes', type=float, default=float('inf'), help='begin no further row after so long')
    add('--costs', action='store_true', help='print what models of each kind cost to use, and leave')
    add('--report', action='store_true', help='print the tables of the CSV, and leave')
    parser.set_defaults(**SCALES[parser.parse_known_args()[0].scale])
    args = parser.parse_args()
    rows = read_rows(args.csv) if args.csv.exists() else []
    if args.report:
        print(report(rows))
        return
    if args.module:
        importlib.import_module(args.module)
    if args.costs:
        print(costs(args))
        return
    done = {tuple(row[key] for key in COLUMNS[:6]) for row in rows}
    started = time.monotonic()
    for seed in args.seeds:
        for text in args.set:
            name, words = data_flags(text)
            for method in args.methods:
                key = (name, args.model, str(args.img_size), str(args.epochs), method, str(seed))
                if key in done or time.monotonic() - started > 60 * args.minutes:
                    continue
                shutil.rmtree(args.scratch, ignore_errors=True)
                first = [row['lr'] for row in rows if tuple(row[k] for k in COLUMNS[:5]) == key[:5]][:1]
                row = dict(zip(COLUMNS, key), **run(args, words, method, seed, args.scratch, *first or ['']))
                rows.append(row)
                new = not args.csv.exists()
                with open(args.csv, 'a', newline='', encoding='utf-8') as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(*(f'{key} {value}' for key, value in row.items()), sep=', ', flush=True)


if __name__ == '__main__':
    main()
