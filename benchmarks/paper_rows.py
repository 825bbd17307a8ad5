"""Starts the commands of docs/papers.md as smoke runs: on a few synthetic images, for one epoch, from random weights.

    python benchmarks/paper_rows.py                     # all of them; --list prints them
    python benchmarks/paper_rows.py --only cub_last     # those whose command contains this

A line says of each whether it ran, with what loss: of random weights at the LRs of pretrained ones, and of untrained
statistics of norms, it can be no number, which is said. Nothing is learned of what a row comes to.
"""
import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import timm
import yaml
from PIL import Image
from safetensors.torch import save_model

import timm_amf  # noqa: F401  registers the models
from timm_amf.data import data_spec_from_args
from timm_amf.engine.config_file import find_config
from timm_amf.engine.options import parse_args
from timm_amf.yaml_text import load_yaml

ROOT = Path(__file__).resolve().parents[1]
# Of a row's command what says where its data and weights are; a smoke run has its own.
OF_PLACE = ('--data-dir', '--dataset', '--component', '--data-preset', '--val-share', '--backbone-weights',
            '--pretrained-path', '--source-dir')
# Warm-up, since the LRs of the rows are for pretrained weights: the loss of random ones would not stay finite.
SMALL = ['-b', '4', '--epochs', '1', '--workers', '0', '--cpu', '--tracker', 'none', '--no-progress',
         '--warmup-epochs', '1']


def commands() -> list[str]:
    """The distinct commands of the page that train, in its order."""
    rows = (line for line in (ROOT / 'docs/papers.md').read_text(encoding='utf-8').splitlines() if line[:1] == '|')
    found = [text for row in rows for text in re.findall(r'`([^`]+)`', row.split('|')[2])]
    starts = ('timm-amf train ', 'timm-amf advise ', 'python benchmarks/')
    return list(dict.fromkeys(c for c in found if c.startswith(starts)))


def without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The words of a command without some flags, each of one value."""
    left = list(words)
    for flag in flags:
        while flag in left:
            i = left.index(flag)
            del left[i:i + 2]
    return left


def write_images(folder: Path) -> None:
    """Three classes of noise around a colour, four images each in train, two in val and test."""
    rng = np.random.RandomState(0)
    for split, count in (('train', 4), ('val', 2), ('test', 2)):
        for k in range(3):
            (folder / split / f'{folder.name}{k}').mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.randint(0, 120, (72, 72, 3)) + 120 * np.eye(3, dtype=int)[k]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / f'{folder.name}{k}' / f'{i}.png')


def smoke_words(command: str, folder: Path) -> list[str]:
    """The words of the smoke run of a command, whose files go into the folder."""
    program, *words = shlex.split(command)
    if program == 'python':
        model = words[words.index('--models') + 1]
        write_images(folder / 'flowers')
        save_model(timm.create_model(model), str(folder / 'weights.safetensors'))
        small = ['img_size=32', 'epochs=1', 'search_epochs=1', 'batch_size=4', 'workers=0', 'cpu=True', 'tracker=none',
                 'progress=False', 'chunk=40', f'pretrained_path={folder}/weights.safetensors', f'output={folder}']
        return [str(ROOT / words[0]), str(folder / 'flowers'), '--models', model, '--options', *small]
    verb, *words = words
    name = words[words.index('--config') + 1]
    given = [f for f in ('--component', '--data-preset', '--dataset') if f in words]
    data = [w for flag in given for w in (flag, words[words.index(flag) + 1])]
    args = parse_args(['--config', name, '--data-dir', '.', *data])
    spec = data_spec_from_args(args)
    components = [dict(name=c.name, root=str(folder / c.name)) for c in spec.components]
    for component in components:
        write_images(Path(component['root']))
    recipe = {k: v for k, v in load_yaml(find_config(name)).items() if k not in ('expected', 'card')}
    recipe = {**recipe, 'pretrained': False, 'data': dict(components=components)}
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(recipe), encoding='utf-8')
    words = without(words, [*OF_PLACE, '--config', '--epochs', '-b', '--random-init'])
    # Inception's maps vanish below this.
    size = ['--img-size', '128'] if 'inception' in args.model else ['--img-size', '64'] if args.img_size == 224 else []
    words = ['-m', 'timm_amf.cli', verb, '--config', str(folder / 'recipe.yaml'), *words, *SMALL, *size]
    if verb == 'advise' or 'l2sp' in f'{recipe["plan"]} {words}':  # they refuse a random start, unless it has a file
        save_model(timm.create_model(args.model), str(folder / 'weights.safetensors'))
        words += ['--pretrained-path', f'{folder}/weights.safetensors']
    if verb == 'advise':
        return [*words, '--random-init', '1', '--pilot-epochs', '1', '--source-dir', components[0]['root'] + '/train',
                '--advice-file', f'{folder}/advice.yaml', '--cache-dir', str(folder)]
    return [*words, '--output', str(folder), '--experiment', 'run']


def run(chosen: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Each command, whether it `ran`, `ran to a loss that is not finite` or `failed`, and its last line if not."""
    for command in chosen:
        with tempfile.TemporaryDirectory() as folder:
            result = subprocess.run(
                [sys.executable, *smoke_words(command, Path(folder))], capture_output=True, text=True, cwd=ROOT)
        text = (result.stderr.strip() or result.stdout.strip() or 'no output').splitlines()[-1]
        if not result.returncode:
            yield command, 'ran', ''
        else:
            wild = 'the evaluation loss is not finite after epoch 1' in text
            yield command, 'ran to a loss that is not finite' if wild else 'failed', text


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='a part of the commands to run')
    parser.add_argument('--list', action='store_true', help='print the commands and run none')
    args = parser.parse_args(argv)
    chosen = [c for c in commands() if args.only in c]
    if args.list:
        print('\n'.join(chosen))
        return 0
    found = []
    for command, end, text in run(chosen):
        found.append(end)
        print(f'{end}: {command}' + (f'\n    {text}' if text else ''), flush=True)
    print('; '.join(f'{found.count(end)} {end}' for end in dict.fromkeys(found)))
    return int('failed' in found)


if __name__ == '__main__':
    sys.exit(main())
