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
import copy
import csv
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import timm_amf.engine.evaluate_runs  # noqa: E402
import timm_amf.export  # noqa: E402
import train_amf  # noqa: E402
from timm_amf.cli import main as command  # noqa: E402
from timm_amf.engine.options import build_parser, parse_args  # noqa: E402
from timm_amf.errors import run_command  # noqa: E402

LIMIT, MEMORY, LINES = 60, 10 << 30, 20  # seconds, bytes and lines that a case may take
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


class Case:
    """Forks commands in a folder of its own and keeps the worst outcome of them."""

    def __init__(self, folder: Path, rng: random.Random):
        self.folder, self.rng, self.outcome, self.detail = folder, rng, 'fine', ''

    def fault(self, outcome: str, detail: str) -> None:
        if self.outcome == 'fine':
            self.outcome, self.detail = outcome, detail

    def run(self, work, limit: float = LIMIT, signum: int = 0, after: float = 0.) -> int:
        """The exit code of a function in a fork, which gets a signal `after` some seconds if `signum` is given."""
        out, started, sent = self.folder / 'out.txt', time.monotonic(), False
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(work, self.folder, out)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if done:
                break
            if signum and not sent and seconds >= after:
                os.kill(pid, signum)
                sent = True
            if seconds > limit:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.fault('hang', f'{limit:g} s')
                return -signal.SIGKILL
            time.sleep(0.01)
        code, text = os.waitstatus_to_exitcode(status), out.read_text(errors='replace')
        errors = [line for line in text.splitlines() if not line.startswith(('epoch ', 'done in '))]
        if 'Traceback (most' in text or code not in (0, 2) and not (sent and code in (130, 143, -signum)):
            files = sorted(self.folder.glob('timm_amf-traceback-*'), key=os.path.getmtime)
            self.fault('traceback', f'{code}: {_brief(files[-1].read_text() if files else text)}')
        elif code == 2 and (len(errors) > LINES or max(map(len, errors), default=0) > 2000 or not errors):
            self.fault('wordy', f'{len(errors)} lines: {text[:200]!r}')
        if (self.folder / 'marker').exists():
            self.fault('payload', text[-200:])
        self.last = (errors or [''])[-1]
        return code


def _child(work, folder: Path, out: Path) -> None:
    code = 1
    try:
        os.setsid()
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.chdir(folder)
        os.environ['XDG_CACHE_HOME'] = str(folder / 'cache')
        tempfile.tempdir = str(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = work() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _brief(text: str) -> str:
    lines = text.strip().splitlines()
    where = [line.split(str(ROOT) + '/')[-1].strip() for line in lines if line.strip().startswith('File ')]
    ours = [w for w in where if w.startswith(('timm_amf', 'train_amf'))]
    return ' | '.join([*ours[-1:], *where[-1:], (lines or [''])[-1][:200]])


# ---- what is damaged

# YAML as it is written; NEST, BOMB and LONG are made below.
WEIRD = (
    'null', '~', '', 'true', 'no', '-1', '0', '1.5', '.nan', '.inf', '-.inf', '1e999', '1e-400', '9' * 400, '9' * 5000,
    '0x' + 'f' * 400, '0o17', '12:30:45', '2024-01-01', '2024-01-01 10:00:00+02:00', '2024-99-99', '[]', '{}', "''",
    '[1, 2, 3]', '[[1]]', '{a: 1}', '{1: 2}', '{[1, 2]: 3}', '{null: 1}', '{a: {a: {a: 1}}}', '!!binary aGVsbG8=',
    '!!set {a, b}', '!!omap [a: 1]', '!!str 5', '!!int x', '!!float x', '!!timestamp x', '&x [*x]', '&x {a: *x}',
    '*undefined', '{<<: {a: 1}}', '{<<: 5}', '"\\0"', '"\\ud800"', '"\U0001f600 ünï"', '"../../x"', '/dev/zero', '/',
    '!!python/object/apply:os.system ["touch marker"]', '!!python/name:os.system', '"%s %d {0}"', '=', '<<', '@x', '!x',
    '"' + 'x' * 5000 + '"', '[' * 3000, '[' * 500 + ']' * 500, '{a: ' * 3000, '"a\\nb"', '1_000', '+1', '|\n  text')
BOMB = 'a0: &a0 [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, 9))


def _places(tree, found=None) -> list:
    found = [] if found is None else found
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((tree, key))
        if isinstance(value, (dict, list)):
            _places(value, found)
    return found


def mutate_yaml(text: str, rng: random.Random) -> str:
    tree, marks = yaml.safe_load(text), []
    for _ in range(rng.randint(0, 3)):
        holder, key = rng.choice(_places(tree) or [({}, 'x')])
        how = rng.choice(('value', 'value', 'value', 'key', 'wrap', 'drop', 'new'))
        marks.append(rng.choice(WEIRD))
        mark = f'MARK{len(marks) - 1}MARK'
        if how == 'value':
            holder[key] = mark
        elif how == 'wrap':
            holder[key] = rng.choice(([holder[key]], {'x': holder[key]}))
        elif how == 'drop':
            del holder[key]
        elif isinstance(holder, dict):
            holder[mark] = holder.pop(key) if how == 'key' else None
    if rng.random() < 0.1:
        return rng.choice(WEIRD)
    text = yaml.safe_dump(tree, allow_unicode=True)
    for i, mark in enumerate(marks):
        text = text.replace(f'MARK{i}MARK', mark)
    if rng.random() < 0.1:
        name = rng.choice(('model_kwargs', 'plan', 'data', 'mean', 'opt_kwargs', 'card'))
        text = BOMB + text if rng.random() < 0.3 else text + f'\n{BOMB.replace(chr(10), chr(10))}{name}: *a8\n'
    lines = text.splitlines()
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines or ['']))
    text = '\n'.join(lines)
    if rng.random() < 0.1:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(('\t', '\0', '\ufeff', ':', '- ', '}', '\x85', '%', '\udcff', '---\n')) + text[at:]
    return text


def mutate_json(tree, rng: random.Random):
    holder, key = rng.choice(_places(tree) or [({}, 'x')])
    value = rng.choice((None, True, -1, 0, 1.5, 1e308, float('nan'), 10 ** 400, '', 'x', [], {}, [[]], {'x': 1}, [None]))
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = value
    return tree


class Payload:
    def __reduce__(self):
        return os.system, ('touch marker',)


def damage(path: Path, rng: random.Random) -> str:
    """Damages a file, by its kind or by bytes; returns how."""
    how = rng.choice(('flip', 'cut', 'empty', 'folder', 'gone', 'five', 'payload', 'loop', *['kind'] * 8))
    data = bytearray(path.read_bytes())
    if how == 'kind' and path.suffix in ('.json', '.yaml'):
        if path.suffix == '.yaml':
            path.write_text(mutate_yaml(data.decode(), rng), encoding='utf-8', errors='surrogateescape')
        else:
            deep = '[' * 100_000
            path.write_text(deep if rng.random() < 0.1 else json.dumps(mutate_json(json.loads(data), rng)))
    elif how == 'kind' and path.suffix == '.pt':
        state = torch.load(path, weights_only=True)
        torch.save(rng.choice(([1, 2], {'state': []}, mutate_json(state, rng), mutate_json(state, rng))), path)
    elif how == 'kind' and path.suffix == '.safetensors':
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        value = tensors.pop(name)
        made = rng.choice((None, value.double(), value[None].clone(), torch.full_like(value, float('nan')) if
                           value.is_floating_point() else value, torch.zeros(0), value))
        tensors.update({} if made is None else {name: made})
        names = rng.choice(('5', '[', '[1, 2]', '{}', 'null', '["a"]', '[' * 100_000, '[null, [], {}, 4, 5]'))
        save_file(tensors, path, rng.choice(({'format': 'pt'}, {'class_names': names}, {'timm_amf': names}, None)))
    elif how in ('flip', 'kind'):
        for _ in range(rng.choice((1, 1, 5, 50))):
            at = rng.randrange(min(len(data), rng.choice((16, 200, len(data))))) if data else 0
            data[at:at + 1] = bytes([rng.randrange(256)])
        path.write_bytes(data)
    elif how == 'cut':
        path.write_bytes(data[:rng.randrange(len(data) + 1)])
    elif how == 'payload':
        torch.save(Payload(), path) if rng.random() < 0.5 else path.write_bytes(pickle.dumps(Payload()))
    elif how in ('empty', 'five'):
        path.write_bytes(b'' if how == 'empty' else rng.choice((b'12345', b'\xff' * 5, b'\xff' * 9)))
    else:
        path.unlink()
        if how == 'folder':
            path.mkdir()
        elif how == 'loop':
            path.symlink_to(path)
    return f'{how} {path.name}'


# ---- the campaigns


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
    argv = ['--config', 'recipe.yaml', '--cpu', '--tracker', 'none', *(['--data-dir', str(base / 'data')] * (not whole))]
    if whole:
        case.run(lambda: train_amf.main([*argv, '--dry-run', '--workers', '0']))
    else:
        case.run(lambda: run_command('train_amf.py', lambda: parse_args(argv) and None), 20)
    return f'{source}: {case.last}'


WORDS = ('', '0', '1', '-1', '2', '3', '0.5', '1.5', '1e-3', '1e9', '-0.0', 'nan', 'inf', '-inf', '1000000', '9' * 30, '9' * 400,
         '9' * 5000, 'x', 'None', 'none', 'all', 'true', 'a=b', '=', 'a=', "a=[" * 50, 'a=' + '(' * 500, '[1,2', 'ünï\U0001f600', '\udcff', '%s', '{0}',
         '.', '..', '/', '/dev/zero', '/dev/null', 'nowhere/at/all', 'x' * 5000, 'fifo', '--', 'rand-m9-mstd0.5-inc1',
         'rand-m99999999-n999999', 'original', 'augmix-m5', 'adamw', 'lookahead_sgd', 'sgd', 'resnet18', 'test_vit', 'amf', 'spottune',
         'test_resnet.r160_in1k', 'backbone.lr=1', 'backbone.train=[-1]', 'backbone.train=[99]', 'head.lr=x', 'backbone.schedule.sched=step',
         'backbone.lr=&x [*x]', 'policy', 'head', 'backbone', 'name=a,path=.', 'path=fifo', 'name=a,classes=1e9', '0,1', 'L', 'RGBA', 'CMYK')
LEFT = ('publish', 'dataset_download', 'pretrained', 'help', 'dry_run', 'cpu', 'config', 'tracker', 'log_wandb', 'workers')


def command_lines(case: Case, base: Path) -> str:
    rng, argv = case.rng, []
    os.mkfifo(case.folder / 'fifo')
    actions = [a for a in build_parser()._actions if a.option_strings and a.dest not in LEFT and 'publish' not in a.dest]
    for action in rng.sample(actions, rng.randint(1, 4)):
        argv.append(rng.choice(action.option_strings))
        number = {None: 1, 0: 0, '?': rng.randint(0, 1)}.get(action.nargs, action.nargs)
        for _ in range(number if isinstance(number, int) else rng.choice((0, 1, 1, 1, 2, 3))):
            numeric = action.type in (int, float)
            words = action.choices if action.choices and rng.random() < 0.8 else WORDS[:20] if numeric else WORDS
            argv.append(str(rng.choice(list(words))))
    if rng.random() < 0.05:
        argv += ['--aug-splits', '1000000']
    model = ['--model', 'test_resnet'] if rng.random() < 0.7 else RUNS[rng.choice(('amf', 'spottune'))][16:]
    argv = [str(base / 'data'), '--img-size', '32', '-b', '8', *model, *argv, '--cpu', '--dry-run', '--workers', '0',
            '--tracker', 'none']
    case.run(lambda: train_amf.main(argv))
    return f'{" ".join(argv[5:-7])[:200]}: {case.last}'


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
    rng, said = case.rng, []
    data = case.folder / 'data'
    suffixes = rng.sample(('.png', '.jpg', '.gif', '.bmp', '.tif', '.webp', '.ppm', '.ico', '.jp2', '.tga', '.pcx'), 4)
    shutil.copytree(base / 'data', data)
    for _ in range(rng.randint(1, 4)):
        suffix, mode = rng.choice(suffixes), rng.choice(('RGB', 'L', '1', 'P', 'RGBA', 'LA', 'CMYK', 'I', 'F', 'I;16'))
        size = rng.choice(((40, 40), (1, 1), (1, 3000), (7, 5)))
        folder = data / rng.choice(('train', 'val')) / 'b'
        path = folder / f'0{len(said)}{suffix}'
        try:
            picture = Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(
                0, 255, (size[1], size[0], 3), np.uint8)).convert(mode if mode != 'I;16' else 'I')
            picture.save(path, save_all=suffix in ('.gif', '.tif', '.webp') and rng.random() < 0.5)
        except (OSError, ValueError, KeyError):
            shutil.copyfile(next((base / 'data/train/a').iterdir()), path)
        how = rng.choice(('damage', 'damage', 'damage', 'whole', 'bomb', 'fifo', 'text'))
        if how == 'damage':
            how = damage(path, rng)
        elif how == 'bomb':
            header = b'IHDR' + rng.choice((30_000, 2 ** 31 - 1)).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0'
            crc = __import__('zlib').crc32(header).to_bytes(4, 'big')
            path.write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\x0d' + header + crc + b'\0' * 50)
        elif how == 'fifo':
            path.unlink()
            os.mkfifo(path)
        elif how == 'text':
            path.write_text('P6\n99999 99999\n255\n' if rng.random() < 0.5 else 'GIF89a no image')
        said.append(f'{mode} {size[0]}x{size[1]} {suffix} {how}')
    argv = [str(data), *PLAIN, '--epochs', '1', '--model', 'test_resnet', '--output', str(case.folder), '--experiment',
            'run', '--input-key', ';'.join(suffixes + ['.png']), *['--skip-bad-images'] * rng.randint(0, 1)]
    case.run(lambda: train_amf.main(argv))
    return f'{", ".join(said)}: {case.last}'


CAMPAIGNS = {f.__name__.replace('_', '-'): f for f in (kills, recipes, command_lines, checkpoints, images)}


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
    seconds = {}
    for kind in RUNS:
        case, started = Case(base, random.Random(0)), time.monotonic()
        argv = train_argv(kind, base, base)
        if case.run(lambda: train_amf.main(argv), 600) != 0:  # noqa: B023  runs at once
            raise SystemExit(f'{kind}: {case.outcome} {case.detail} {case.last}')
        seconds[kind] = time.monotonic() - started
        os.rename(base / 'run', base / kind)
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
