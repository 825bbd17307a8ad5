"""Methods of fine-tuning compared on folders of images: one CSV row a (set, method, seed), appended.

    python benchmarks/transfer.py --set dtd=DIR --set flowers=DIR,80 --model tf_efficientnet_lite0 --weights FILE

A set is a folder of splits of class folders, and the most images taken of each class. Where it has no `test`, its
validation images are the test images, and a fifth of the training images validates. All methods have the same images,
size, batches, augmentation and epochs. Each LR of a method's grid is trained, the best on the validation images is
chosen, and the test images are looked at once. An interrupted table goes on where it stopped. docs/results.md has its
figures.
"""
import argparse
import contextlib
import csv
import io
import os
import shutil
import time
from pathlib import Path

import train_amf
from timm_amf.engine.checkpoint import read_state
from timm_amf.engine.evaluate_runs import RunOptions, evaluate_runs
from timm_amf.search import fit

_FROM_PROBE = ('--head-start', 'probe', '--norms', 'frozen', '--opt', 'adamw', '--weight-decay', '0.01',
               '--sched-on-updates', '--warmup-epochs', '0.5')
_SGD = ('--opt', 'sgd', '--weight-decay', '1e-4', '--warmup-epochs', '0')
_ADAMW = ('--opt', 'adamw', '--weight-decay', '0.01', '--warmup-epochs', '0')
_SGD_LRS = ('0.001', '0.005', '0.02')
_ADAM_LRS = ('1e-4', '3e-4', '1e-3')

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
    'last 2 blocks': ((*_FROM_PROBE, '--role', 'backbone.train=[-2,-1,tail]'), _ADAM_LRS),
    'L2-SP': ((*_FROM_PROBE, '--l2sp-alpha', '0.01'), _ADAM_LRS),
    'layer decay 0.75': ((*_FROM_PROBE, '--layer-decay', '0.75'), _ADAM_LRS),
    'SpotTune': ((*_FROM_PROBE,), ('1e-4', '3e-4')),
    'AMF': ((*_FROM_PROBE, '--branch-loss', '1'), ('1e-4', '3e-4')),
    'fit': ((), ()),
}
COLUMNS = (
    'set', 'model', 'img_size', 'epochs', 'method', 'seed', 'lr', 'images', 'val', 'test', 'test_images', 'seconds',
    'seconds_all')


def model_flags(args: argparse.Namespace, method: str) -> list[str]:
    """Flags that name the network of a method, with its pretrained weights."""
    part = f"dict(pretrained_cfg_overlay=dict(file='{args.weights}'))" if args.weights else 'dict()'
    policy = [f'policy={args.policy}', f"policy_kwargs=dict(pretrained_cfg_overlay=dict(file='{args.policy_weights}'))"]
    policy = policy if args.policy else []
    if method == 'SpotTune':
        kwargs = [f'backbone={args.model}', f'backbone_kwargs={part}', *policy]
        return ['--model', 'spottune', '--pretrained', '--model-kwargs', *kwargs]
    if method == 'AMF':
        kwargs = [f"backbones=('{args.model}','{args.model}')", f'backbone_kwargs={part}', *policy]
        return ['--model', 'amf', '--pretrained', '--model-kwargs', *kwargs]
    return ['--model', args.model, '--pretrained', *(['--pretrained-path', args.weights] if args.weights else [])]


def data_flags(text: str) -> tuple[str, list[str]]:
    name, _, rest = text.partition('=')
    root, _, number = rest.partition(',')
    component = f'name={name},path={root}' + (f',per_class={number}' if number else '')
    if os.path.isdir(os.path.join(root, 'test')):
        return name, ['--component', component]
    return name, ['--component', f'{component},splits.test=val', '--val-share', '0.2']


def train(words: list[str], folder: Path) -> float:
    """Train into a folder; the seconds that it took."""
    start = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        train_amf.train([*words, '--output', str(folder.parent), '--experiment', folder.name, '--overwrite'])
    return time.monotonic() - start


def best_of(folder: Path) -> float:
    with open(folder / 'summary.csv', newline='', encoding='utf-8') as file:
        return max(float(row['eval_top1']) for row in csv.DictReader(file))


def run(args: argparse.Namespace, words: list[str], method: str, seed: int, scratch: Path) -> dict:
    """Train every LR of a method, and test the best."""
    flags, lrs = METHODS[method]
    common = [
        *model_flags(args, method), *words, '--img-size', str(args.img_size), '-b', str(args.batch_size), '--epochs',
        str(args.epochs), '--seed', str(seed), '--tracker', 'none', '-j', str(args.workers), '--cache-images',
        '--no-check-images', *(['--cpu'] if args.cpu else [])]
    start = time.monotonic()
    if method == 'fit':
        with contextlib.redirect_stdout(io.StringIO()):
            found = fit._fit([*common, '--output', str(scratch), '--experiment', 'fit', '--overwrite'], None)
        best = (found.metric, found.winner.name, found.folder, found.winner.seconds)
    elif method == 'frozen features':  # an epoch that changes nothing
        seconds = train([*common, *flags, '--lr', '1e-30', '--epochs', '1'], scratch / 'frozen')
        best = (best_of(scratch / 'frozen'), '', scratch / 'frozen', seconds)
    else:
        tried = []
        for lr in lrs:
            folder = scratch / f'lr-{lr}'
            seconds = train([*common, *flags, '--lr', lr], folder)
            tried.append((best_of(folder), lr, folder, seconds))
        best = max(tried, key=lambda entry: entry[0])
    val, lr, folder, seconds = best
    total = time.monotonic() - start
    test = evaluate_runs([folder], RunOptions(split='test'))[0]
    identity = read_state(folder / 'last')['identity']
    return dict(lr=lr, images=identity['samples'], val=round(val, 2), test=round(test.top1, 2), test_images=test.images,
                seconds=round(seconds, 1), seconds_all=round(total, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--set', action='append', required=True, metavar='NAME=DIR[,N]', help='a set, and the most images a class')
    add('--model', default='tf_efficientnet_lite0')
    add('--weights', default='', metavar='FILE', help='its pretrained weights (default: from the Hub)')
    add('--policy', default='', metavar='NAME', help="policy network of AMF and SpotTune (default: the model's)")
    add('--policy-weights', default='', metavar='FILE')
    add('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='NAME', help=', '.join(METHODS))
    add('--epochs', type=int, default=5)
    add('--img-size', type=int, default=96)
    add('--batch-size', type=int, default=32)
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--workers', type=int, default=2)
    add('--cpu', action='store_true')
    add('--csv', type=Path, default=Path('benchmarks/transfer.csv'))
    add('--scratch', type=Path, default=Path('output/transfer'))
    add('--minutes', type=float, default=float('inf'), help='begin no further row after so long')
    args = parser.parse_args()
    rows = []
    if args.csv.exists():
        with open(args.csv, newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file))
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
                row = dict(zip(COLUMNS, key), **run(args, words, method, seed, args.scratch))
                new = not args.csv.exists()
                with open(args.csv, 'a', newline='', encoding='utf-8') as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(*(f'{key} {value}' for key, value in row.items()), sep=', ', flush=True)


if __name__ == '__main__':
    main()
