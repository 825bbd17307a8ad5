"""Tries to break the command line with kills, damaged files and senseless values, each case in a process of its own.

    python benchmarks/robustness.py --only recipes --count 300 --seed 0 --work /tmp/robust
    python benchmarks/robustness.py --work /tmp/robust            all campaigns; goes on where it stopped

A case is a pure function of campaign and seed, and runs in a fork of this process, which has imported everything.
`WORK/cases.csv` gets a row a case: `fine` is exit code 0 or 2, or 130 or 143 after a signal, in a few lines; all else
is a fault: `traceback` (or a crash), `wordy`, `hang`, `payload` (a file was executed), `differs` (a run that was killed
and resumed is not one that never stopped).
"""
import argparse
import collections
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from _damage import NUMBERS, WORDS, damage, draw_image, mutate_yaml  # noqa: E402
from _fork import ROOT, Case  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import timm_amf.engine.evaluate_runs  # noqa: E402, F401  forks need not import it
import timm_amf.export  # noqa: E402, F401
import timm_amf.search.advise  # noqa: E402, F401
import train_amf  # noqa: E402
from timm_amf.cli import main as command  # noqa: E402
from timm_amf.engine.options import build_parser, parse_args  # noqa: E402
from timm_amf.errors import run_command  # noqa: E402

PLAIN = ['--img-size', '32', '-b', '8', '--epochs', '3', '--workers', '0', '--warmup-epochs', '0', '--cpu',
         '--tracker', 'none', '--lr', '0.02', '--recovery-interval', '2']
RUNS = {
    'amf': [
        *PLAIN, '--model', 'amf', '--model-kwargs', "backbones=('test_resnet','test_resnet')", 'policy=test_resnet',
        '--branch-lr', '0.01', '0.05', '--model-ema', '--model-ema-decay', '0.9', '--mixup', '0.4', '--drop', '0.3',
        '--reprob', '0.5', '--aa', 'rand-m5-mstd0.5', '--grad-accum-steps', '2', '--role', 'policy.start_epoch=1',
        '--sched', 'plateau', '--patience-epochs', '0'],
    'l2sp': [*PLAIN, '--model', 'test_resnet', '--l2sp-alpha', '0.1', '--initial-checkpoint', 'start.safetensors'],
    'spottune': [
        *PLAIN, '--model', 'spottune', '--model-kwargs', 'backbone=test_resnet', 'policy=test_resnet', '--policy-lr',
        '0.5', '--global-k', '1', '--global-k-weights', '1', '1', '--global-k-window', '30'],
}
FILES = ('last/model.safetensors', 'last/ema.safetensors', 'model_best.safetensors', 'last/state.json', 'summary.csv',
         'policy.csv')


def kills(case: Case, base: Path) -> str:
    rng = case.rng
    kind = rng.choice(list(RUNS))
    whole, seconds = base / kind, json.loads((base / 'seconds.json').read_text())[kind]
    argv = train_argv(kind, base, case.folder) + ['--resume', 'auto']
    said = [kind]
    for _ in range(rng.choice((1, 1, 2, 3))):
        signum = rng.choice((signal.SIGKILL,) * 4 + (signal.SIGTERM, signal.SIGINT))
        after = rng.uniform(0, seconds)
        said.append(f'{signum.name} {after:.2f} {case.run(lambda: train_amf.main(argv), signum=signum, after=after)}')
    if case.run(lambda: train_amf.main(argv)) != 0:
        case.fault('differs', f'does not resume: {case.last}')
    run = case.folder / 'run'
    for name in FILES if case.outcome == 'fine' else ():
        one, two = run / name, whole / name
        if one.exists() != two.exists() or one.exists() and one.read_bytes() != two.read_bytes():
            case.fault('differs', f'{name}, {", ".join(said)}')
    if case.outcome == 'fine':
        states = [torch.load(folder / 'last/optimizer.pt', weights_only=True) for folder in (run, whole)]
        if not _same(*states):
            case.fault('differs', f'optimizer.pt, {", ".join(said)}')
    return ', '.join(said)


def recipes(case: Case, base: Path) -> str:
    rng = case.rng
    source = rng.choice(['demo.yaml'] + sorted(p.name for p in (ROOT / 'hub_configs').glob('*.yaml')))
    whole = rng.random() < 0.3
    source = 'demo.yaml' if whole else source
    (case.folder / 'recipe.yaml').write_text(
        mutate_yaml((ROOT / 'hub_configs' / source).read_text(), rng), encoding='utf-8', errors='surrogatepass')
    folder = [] if whole else ['--data-dir', str(base / 'data')]
    argv = ['--config', 'recipe.yaml', '--cpu', '--tracker', 'none', *folder]
    if whole:
        case.run(lambda: train_amf.main([*argv, '--dry-run', '--workers', '0']))
    else:
        case.run(lambda: run_command('train_amf.py', lambda: parse_args(argv) and None), 20)
    return f'{source}: {case.last}'


LEFT = ('pretrained', 'dataset_download', 'help', 'dry_run', 'cpu', 'config', 'tracker', 'log_wandb', 'workers')


def command_lines(case: Case, base: Path) -> str:
    rng, words = case.rng, []
    flags = [action for action in build_parser()._actions if action.option_strings and action.dest not in LEFT]
    for action in rng.sample([a for a in flags if 'publish' not in a.dest], rng.choice((1, 1, 2, 3))):
        words.append(rng.choice(action.option_strings))
        number = rng.randint(0, 3) if action.nargs in ('+', '*', '?') else {None: 1}.get(action.nargs, action.nargs)
        kind = getattr(action.type, '__name__', '')
        wanted = {'int': [w for w in NUMBERS if w.isdigit()], 'float': [w for w in NUMBERS if w]}.get(kind, WORDS)
        values = WORDS if rng.random() < 0.1 else action.choices or wanted
        words += [str(rng.choice(list(values))) for _ in range(number)]
    words += ['--aug-splits', '1000000'] * (rng.random() < 0.05)
    model = rng.choice((['--model', 'test_resnet'], RUNS['amf'][len(PLAIN):], RUNS['spottune'][len(PLAIN):]))
    steps = ['--train-batches-per-epoch', '1', '--output', str(case.folder), '--experiment', 'run', '--stop-epoch', '1']
    dry = rng.random() < 0.6 or '--torchcompile' in words  # compiling takes minutes
    argv = [str(base / 'data'), *PLAIN, *model, *(['--dry-run'] if dry else steps), *words]
    case.run(lambda: train_amf.main(argv))
    return f'{argv[len(PLAIN) + 2]} {" ".join(word[:40] for word in words)}: {case.last}'


# Flags of the other subcommands: # takes numbers, ! takes nothing, a word with commas takes one of them.
OTHERS = {
    'evaluate': '--split --split=train,val,test --data-dir --weights=best,last,ema,raw --ten-crop! --ensemble! '
                '--blocks --blocks=tuned,frozen,policy --sampling-seed# --confidence# -b# --amp! --results-file',
    'export': '--output --weights=last,ema,raw --img-size# --blocks --data-dir --class-names --batch# --opset# '
              '--format=onnx,torchscript,safetensors --overwrite!',
    'search': '--ways --ways=layer,block,window,top2,top0 --cut=residual,activation,pooling --window# '
              '--separate-norms! --search-role --search-epochs# --search-share# --final-share# '
              '--search-head=own,mlp --chunk# --memory# --one-by-one!',
    'advise': '--models --models=test_resnet,test_vit --source-dir --random-init# --policy --advice-file '
              '--no-source-classifier!',
}


def other_commands(case: Case, base: Path) -> str:
    """As command_lines, of the other subcommands; numbers are small, for what is asked for is also done."""
    rng, name, words = case.rng, case.rng.choice(list(OTHERS)), []
    for flag in rng.sample(OTHERS[name].split(), rng.choice((1, 2, 2, 3))):
        flag, _, values = flag.partition('=')
        numbers = [n for n in NUMBERS if n and (len(n) < 4 or len(n) > 300 and '--img' not in flag)]
        values = numbers if flag.endswith('#') else values.split(',') if values and flag != '--models' else WORDS
        words += [flag.rstrip('#!'), *[rng.choice(values)] * (not flag.endswith('!'))]
    run = [str(case.folder / kind) for kind in rng.sample(list(RUNS), 2 if '--ensemble' in words else 1)]
    for folder in run:
        shutil.copytree(base / Path(folder).name, folder)
    train = [str(base / 'data'), *PLAIN, '--model', 'test_resnet', '--output', str(case.folder),
             '--pretrained-path', str(base / 'source.safetensors'), '--train-batches-per-epoch', '1']
    first = {'evaluate': [*run, '--cpu'], 'export': [*run[:1], '--format', 'safetensors', '--output', 'x.safetensors'],
             'search': [*train, '--experiment', 'run', '--epochs', '1'], 'advise': train}
    case.run(lambda: command([name, *first[name], *words]))
    return f'{name} {" ".join(word[:40] for word in words)}: {case.last}'


def checkpoints(case: Case, base: Path) -> str:
    rng = case.rng
    kind, run = rng.choice(list(RUNS)), case.folder / 'run'
    shutil.copytree(base / kind, run)
    if rng.random() < 0.6:
        (run / 'last/digests.json').unlink()
    if rng.random() < 0.5:
        shutil.rmtree(run / 'last.old', ignore_errors=True)
    action = rng.choice(('resume', 'resume', 'evaluate', 'export'))
    wanted = 'last/*' if action == 'resume' and rng.random() < 0.8 else '*' if rng.random() < 0.6 else 'last/*'
    said = []
    for _ in range(rng.choice((1, 1, 2))):
        files = [p for p in sorted(run.glob(wanted)) if p.is_file()]
        if files:
            said.append(damage(rng.choice(files), rng))
    weights = rng.choice(('best', 'best', 'last', 'raw'))
    argv = {
        'resume': ['train', *train_argv(kind, base, case.folder), '--resume', 'auto', '--epochs', '4'],
        'evaluate': ['evaluate', str(run), '--weights', weights, '--cpu'],
        'export': ['export', str(run), '--weights', weights, '--format', rng.choice(('safetensors', 'torchscript'))],
    }[action]
    case.run(lambda: command(argv))
    return f'{action} {kind} {", ".join(said)}: {case.last}'


def images(case: Case, base: Path) -> str:
    rng, data, said = case.rng, case.folder / 'data', []
    suffixes = rng.sample(('.png', '.jpg', '.gif', '.bmp', '.tif', '.webp', '.ppm', '.ico', '.jp2', '.tga', '.pcx'), 4)
    shutil.copytree(base / 'data', data)
    for i in range(rng.randint(1, 4)):
        path = data / rng.choice(('train', 'val')) / 'b' / f'0{i}{rng.choice(suffixes)}'
        said.append(draw_image(path, rng, base / 'data/train/a/0.png'))
    argv = [str(data), *PLAIN, '--epochs', '1', '--model', 'test_resnet', '--output', str(case.folder), '--experiment',
            'run', '--input-key', ';'.join({*suffixes, '.png'}), *['--skip-bad-images'] * rng.randint(0, 1)]
    case.run(lambda: train_amf.main(argv))
    return f'{", ".join(said)}: {case.last}'


CAMPAIGNS = {f.__name__.replace('_', '-'): f for f in (
    kills, recipes, command_lines, other_commands, checkpoints, images)}


def train_argv(kind: str, base: Path, folder: Path) -> list[str]:
    words = [str(base / word) if word == 'start.safetensors' else word for word in RUNS[kind]]
    return [str(base / 'data'), *words, '--output', str(folder), '--experiment', 'run']


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(_same, a, b)) if isinstance(a, (list, tuple)) else a == b


def prepare(base: Path) -> None:
    """Images, and a whole run of each kind with the seconds that it took."""
    if (base / 'seconds.json').exists():
        return
    shutil.rmtree(base, ignore_errors=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', 15), ('val', 6)):
        for k, name in enumerate('abc'):
            folder = base / 'data' / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 100, (40, 40, 3)) + np.eye(3, dtype=int)[k] * 100
                Image.fromarray(image.astype(np.uint8)).save(folder / f'{i}.png')
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), base / 'start.safetensors')
    save_file(timm.create_model('test_resnet').state_dict(), base / 'source.safetensors')
    seconds = {}
    for kind in RUNS:
        folder = base / f'{kind}-case'
        folder.mkdir()
        case, started = Case(folder, random.Random(0)), time.monotonic()
        argv = train_argv(kind, base, folder)
        if case.run(lambda: train_amf.main(argv), 600) != 0:  # noqa: B023  runs at once
            raise SystemExit(f'{kind}: {case.outcome} {case.detail} {case.last}')
        seconds[kind] = time.monotonic() - started
        os.rename(folder / 'run', base / kind)
    (base / 'seconds.json').write_text(json.dumps(seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=CAMPAIGNS, help='one campaign (default: all)')
    parser.add_argument('--count', type=int, default=100, help='cases of each (default: 100)')
    parser.add_argument('--seed', type=int, default=0, help='the first seed (default: 0)')
    parser.add_argument('--work', type=Path, default=Path(tempfile.gettempdir()) / 'timm_amf-robustness', metavar='DIR')
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, table = args.work.resolve() / 'base', args.work / 'cases.csv'
    prepare(base)
    rows = list(csv.reader(open(table, newline=''))) if table.exists() else []
    done = {(row[0], int(row[1])) for row in rows}
    for name in [args.only] if args.only else CAMPAIGNS:
        for seed in range(args.seed, args.seed + args.count):
            if (name, seed) in done:
                continue
            folder = args.work.resolve() / f'{name}-{seed}'
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            case = Case(folder, random.Random(f'{name} {seed}'))
            detail = CAMPAIGNS[name](case, base)
            row = [name, seed, case.outcome, f'{case.detail} <- {detail}' if case.detail else detail]
            rows.append(row)
            with open(table, 'a', newline='', encoding='utf-8', errors='backslashreplace') as file:
                csv.writer(file).writerow([str(v).replace('\0', '')[:600] for v in row])
            if case.outcome != 'fine':
                print(*row, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    counts = collections.Counter((row[0], row[2]) for row in rows)
    for (name, outcome), number in sorted(counts.items()):
        print(f'{name:15}{outcome:10}{number:6}')
    return int(any(outcome != 'fine' for _, outcome in counts))


if __name__ == '__main__':
    sys.exit(main())
