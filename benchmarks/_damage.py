"""Senseless values and damaged files, for `robustness.py`."""
import json
import os
import pickle
import random
import zlib
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

__all__ = ['BOMB', 'NUMBERS', 'WORDS', 'damage', 'draw_image', 'mutate_yaml']

# YAML as it is written.
WEIRD = (
    'null', '~', '', 'true', 'no', '-1', '0', '1.5', '.nan', '.inf', '-.inf', '1e999', '1e-400', '9' * 400, '9' * 5000,
    '0x' + 'f' * 400, '0o17', '12:30:45', '2024-01-01', '2024-01-01 10:00:00+02:00', '2024-99-99', '[]', '{}', "''",
    '[1, 2, 3]', '[[1]]', '{a: 1}', '{1: 2}', '{[1, 2]: 3}', '{null: 1}', '{a: {a: {a: 1}}}', '!!binary aGVsbG8=',
    '!!set {a, b}', '!!omap [a: 1]', '!!str 5', '!!int x', '!!float x', '!!timestamp x', '&x [*x]', '&x {a: *x}',
    '*undefined', '{<<: {a: 1}}', '{<<: 5}', '"\\0"', '"\\ud800"', '"\U0001f600 ünï"', '"../x"', 'zero', 'null_device',
    '!!python/object/apply:os.system ["touch marker"]', '!!python/name:os.system', '"%s %d {0}"', '=', '<<', '@x', '!x',
    '"' + 'x' * 5000 + '"', '[' * 3000, '[' * 500 + ']' * 500, '{a: ' * 3000, '"a\\nb"', '1_000', '+1', '|\n  text')
BOMB = 'a0: &a0 [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 9)}]\n' for i in range(1, 9))
# Words of a command line.
NUMBERS = (
    '', '0', '1', '-1', '2', '3', '7', '0.5', '1.5', '1e-3', '1e9', '-0.0', 'nan', 'inf', '-inf', '1000000', '9' * 18,
    '9' * 30, '9' * 400, '9' * 5000)
WORDS = NUMBERS + (
    'x', 'None', 'none', 'all', 'true', 'a=b', '=', 'a=', 'a=[' * 50, 'a=' + '(' * 500, '[1,2', 'ünï\U0001f600',
    '\udcff', '%s', '{0}', '.', '..', 'zero', 'null_device', 'nowhere/at/all', 'x' * 5000, 'fifo', '--', '0,1',
    'rand-m9-mstd0.5-inc1', 'rand-m99999999-n999999', 'original', 'augmix-m5', 'adamw', 'lookahead_sgd', 'sgd', 'L',
    'resnet18', 'test_vit', 'amf', 'spottune', 'test_resnet.r160_in1k', 'backbone.lr=1', 'backbone.train=[-1]',
    'backbone.train=[99]', 'head.lr=x', 'backbone.schedule.sched=step', 'backbone.lr=&x [*x]', 'policy', 'head',
    'backbone', 'name=a,path=.', 'path=fifo', 'name=a,classes=1e9', 'RGBA', 'CMYK')


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
        text = BOMB + text if rng.random() < 0.3 else f'{text}\n{BOMB}{name}: *a8\n'
    lines = text.splitlines()
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines or ['']))
    text = '\n'.join(lines)
    if rng.random() < 0.1:
        at = rng.randrange(len(text) + 1)
        odd = rng.choice(('\t', '\0', '\ufeff', ':', '- ', '}', '\x85', '%', '\udcff', '---\n'))
        text = text[:at] + odd + text[at:]
    return text


def mutate_json(tree, rng: random.Random):
    holder, key = rng.choice(_places(tree) or [({}, 'x')])
    value = rng.choice((
        None, True, -1, 0, 1.5, 1e308, float('nan'), 10 ** 400, '', 'x', [], {}, [[]], {'x': 1}, [None]))
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
    try:
        if how == 'kind' and _damage_by_kind(path, rng):
            return f'{how} {path.name}'
    except Exception:  # it was damaged before
        how = 'flip'
    if how in ('flip', 'kind'):
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


def _damage_by_kind(path: Path, rng: random.Random) -> bool:
    """Writes a file of the same kind with other content; False where the kind is unknown."""
    if path.suffix == '.yaml':
        text = mutate_yaml(path.read_text(encoding='utf-8'), rng)
        path.write_text(text, encoding='utf-8', errors='surrogateescape')
    elif path.suffix == '.json':
        tree = mutate_json(json.loads(path.read_text()), rng)
        path.write_text('[' * 100_000 if rng.random() < 0.1 else json.dumps(tree))
    elif path.suffix == '.pt':
        state = torch.load(path, weights_only=True)
        torch.save(rng.choice(([1, 2], {'state': []}, mutate_json(state, rng), mutate_json(state, rng))), path)
    elif path.suffix == '.safetensors':
        tensors = load_file(path)
        name = rng.choice(sorted(tensors))
        value = tensors.pop(name)
        made = rng.choice((None, value.double(), value[None].clone(), value.double() * float('nan'), torch.zeros(0)))
        tensors.update({} if made is None else {name: made.to(value.dtype) if rng.random() < 0.5 else made})
        names = rng.choice(('5', '[', '[1, 2]', '{}', 'null', '["a"]', '[' * 100_000, '[null, [], {}, 4, 5]'))
        save_file(tensors, path, rng.choice(({'format': 'pt'}, {'class_names': names}, {'timm_amf': names}, None)))
    else:
        return False
    return True


def draw_image(path: Path, rng: random.Random, whole: Path) -> str:
    """Writes an image of an unusual mode or size, or what only pretends to be one; returns what."""
    mode = rng.choice(('RGB', 'L', '1', 'P', 'RGBA', 'LA', 'CMYK', 'I', 'F', 'YCbCr'))
    size = rng.choice(((40, 40), (1, 1), (1, 3000), (7, 5)))
    pixels = np.random.default_rng(rng.randrange(99)).integers(0, 255, (size[1], size[0], 3), np.uint8)
    frames = path.suffix in ('.gif', '.tif', '.webp') and rng.random() < 0.5
    how = rng.choice(('damage', 'damage', 'damage', 'whole', 'bomb', 'fifo', 'text'))
    try:
        Image.fromarray(pixels).convert(mode).save(path, save_all=frames)
    except (OSError, ValueError, KeyError):  # the format has no such mode
        path.write_bytes(whole.read_bytes())
    if how == 'damage':
        how = damage(path, rng)
    elif how == 'bomb':
        header = b'IHDR' + rng.choice((30_000, 2 ** 31 - 1)).to_bytes(4, 'big') * 2 + b'\x08\x02\0\0\0'
        checksum = zlib.crc32(header).to_bytes(4, 'big')
        path.write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\x0d' + header + checksum + b'\0' * 50)
    elif how == 'fifo':
        path.unlink()
        os.mkfifo(path)
    elif how == 'text':
        path.write_text(rng.choice(('P6\n99999 99999\n255\n', 'GIF89a no image', '<svg/>')))
    return f'{mode} {size[0]}x{size[1]} {path.suffix} {how}'
