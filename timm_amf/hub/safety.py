"""What is read from a repository is checked before anything is built from it.

A repository is somebody else's. Read from it are files of names that are known here, of a size that is bounded, and of
formats that carry data alone: JSON, YAML without tags and aliases, safetensors. What its `config.json` asks to build is
held against a whitelist of types, names and sizes, then built on the meta device, where nothing is allocated, and its
tensors compared with those of the weights; only then is the model built.
"""
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg

from timm_amf.errors import UserError

__all__ = ['PICKLES', 'WEIGHTS', 'check_config', 'check_digest', 'check_fits', 'read_config', 'read_yaml']

WEIGHTS = 'model.safetensors'
# Endings of files that torch reads by running what is in them.
PICKLES = ('.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.npz', '.npy')

_MAX_CONFIG = 16_000_000  # bytes; the names and descriptions of ImageNet-21k's classes are some 2 million
_MAX_YAML, _MAX_YAML_DEPTH = 200_000, 20
_MAX_CLASSES = 1_000_000
_MAX_TEXT = 2_000
# Of model_args: how large a number, how many entries of a list, how deep, how many values in all.
_MAX_NUMBER, _MAX_LENGTH, _MAX_DEPTH, _MAX_VALUES = 65_536, 256, 5, 2_000

_NAME = re.compile(r'[A-Za-z_]\w{0,63}')
# Names of architectures, layers, activations, poolings. No slash: neither a path nor an address of the Hub.
_WORD = re.compile(r'(?!.*\.\.)[\w.,:+\- ]{0,128}')
# Arguments that say where to load from, or how far to trust what is loaded; none describes a network.
_REFUSED = {
    'cache_dir', 'checkpoint_path', 'custom_load', 'device', 'dtype', 'file', 'filter_fn', 'hf_hub_filename',
    'hf_hub_id', 'kwargs_filter', 'model_cfg', 'out_indices', 'features_only', 'feature_cls', 'feature_cfg', 'source',
    'state_dict', 'url',
}
# Of a network that is a part of another: the statistics that its input has.
_OF_PARTS = ('pretrained_cfg', 'pretrained_cfg_overlay')


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Reads a `config.json` and checks it.

    Args:
        path: The file.
        where: Whose it is, for messages.

    Raises:
        UserError: If it is too large, no JSON, or not fit to be built.
    """
    text = _read(path, f'{where}: config.json', _MAX_CONFIG)
    try:
        config = json.loads(text, parse_constant=lambda name: float(name))
    except (ValueError, RecursionError) as e:
        raise UserError(f'{where}: config.json is damaged ({" ".join(str(e).split())[:100]})') from None
    check_config(config, where)
    return config


def _read(path: Path, what: str, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise UserError(f'{what}: is {path.stat().st_size} bytes long; such a file has at most {limit}')
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{what}: cannot be read ({type(e).__name__})') from None


def read_yaml(path: Path, where: str) -> Any:
    """Reads YAML that may have neither tags, which make objects, nor aliases, which make a little text very much.

    Raises:
        UserError: If it cannot be read so.
    """
    text = _read(path, f'{where}: {path.name}', _MAX_YAML)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f'{where}: {path.name} has aliases, which are not read from a repository')
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_YAML_DEPTH:  # further down the reader takes the square of the time
                raise UserError(f'{where}: {path.name} is nested too deeply; it is not read')
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise UserError(f'{where}: {path.name} is damaged ({" ".join(str(e).split())[:100]})') from None


def check_config(config: Any, where: str) -> None:
    """Holds the contents of a `config.json` against what timm and this package read from one.

    Args:
        config: The contents.
        where: Whose they are, for messages.

    Raises:
        UserError: If the architecture is unknown, or an argument is not plainly the description of a network.
    """
    if not isinstance(config, dict):
        raise UserError(f'{where}: config.json holds no mapping')
    name = config.get('architecture')
    if not isinstance(name, str) or not _WORD.fullmatch(name) or not timm.is_model(name):
        raise UserError(
            f'{where}: its architecture {_short(name)} is unknown here; a newer timm or timm_amf may have it')
    cfg = config.get('pretrained_cfg')
    if not isinstance(cfg, dict):
        raise UserError(f'{where}: config.json has no pretrained_cfg')
    _check_pretrained_cfg(cfg, where)
    _check_count(config.get('num_classes'), f'{where}: num_classes')
    args = config.get('model_args', {})
    if not isinstance(args, dict):
        raise UserError(f'{where}: model_args of config.json must be a mapping')
    _check_args(args, f'{where}: model_args', [0])
    _check_names(config, where)


def _check_count(value: Any, what: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_CLASSES):
        raise UserError(f'{what} must be a number of classes up to {_MAX_CLASSES}, not {_short(value)}')


def _check_args(args: Mapping, where: str, seen: list[int], depth: int = 0) -> None:
    for key, value in args.items():
        key = str(key)
        refused = key in _REFUSED or (key.startswith('pretrained') and not (key in _OF_PARTS and depth))
        if refused or not _NAME.fullmatch(key) or key.startswith('__'):
            raise UserError(f'{where}: {_short(key)} is not read from a repository')
        if key == 'num_classes':
            _check_count(value, f'{where}: num_classes')
        else:
            _check_value(value, f'{where}.{key}', seen, depth)


def _check_value(value: Any, where: str, seen: list[int], depth: int) -> None:
    seen[0] += 1
    if seen[0] > _MAX_VALUES or depth > _MAX_DEPTH:
        raise UserError(f'{where}: more than the arguments of a network are; it is not built')
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        if not abs(value) <= _MAX_NUMBER:  # NaN fails too
            raise UserError(f'{where}: {_short(value)} is beyond {_MAX_NUMBER}; it is not built')
    elif isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise UserError(f'{where}: {_short(value)} is no name of a layer or architecture; it is not built')
    elif isinstance(value, list):
        if len(value) > _MAX_LENGTH:
            raise UserError(f'{where}: a list of {len(value)} entries; such a list has at most {_MAX_LENGTH}')
        for item in value:
            _check_value(item, where, seen, depth + 1)
    elif isinstance(value, dict):
        _check_args(value, where, seen, depth + 1)
    else:
        raise UserError(f'{where}: {_short(value)} is not read from a repository')


def _check_pretrained_cfg(cfg: dict, where: str) -> None:
    for key, value in cfg.items():
        what = f'{where}: pretrained_cfg.{_short(key)}'
        if key in ('file', 'url', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source') and value:
            raise UserError(f'{what}: names other weights than those of the repository; it is not read')
        if key not in PretrainedCfg.__dataclass_fields__:
            raise UserError(f'{what}: is unknown to this timm; a newer one may have it')
        if key == 'custom_load' and value:
            raise UserError(f'{what}: asks for a format that is not safetensors; it is not read')
        if key == 'num_classes':
            _check_count(value, what)
        elif key not in ('label_names', 'label_descriptions', 'description', 'notes', 'origin_url'):
            _check_plain(value, what)
    for key in ('mean', 'std'):
        values = cfg.get(key, [1.])
        numbers = isinstance(values, list) and all(type(v) in (int, float) and abs(v) <= _MAX_NUMBER for v in values)
        if not numbers or not values or (key == 'std' and min(values) <= 0):
            raise UserError(f'{where}: pretrained_cfg.{key} must be a list of numbers{", above 0" * (key == "std")}')
    _check_names(cfg, where)


def _check_plain(value: Any, what: str) -> None:
    """A number, a word, or a short list of them."""
    for item in value if isinstance(value, list) and len(value) <= _MAX_LENGTH else [value]:
        plain = item is None or isinstance(item, (bool, str)) or (
            isinstance(item, (int, float)) and abs(item) <= _MAX_NUMBER)
        if not plain or (isinstance(item, str) and len(item) > _MAX_TEXT):
            raise UserError(f'{what}: {_short(value)} is not read from a repository')


def _check_names(config: dict, where: str) -> None:
    """The names of classes: text of a bounded length, by index or in order."""
    for key in ('label_names', 'label_descriptions'):
        names = config.get(key)
        if names is None:
            continue
        items = list(names.values()) if isinstance(names, dict) else names
        texts = isinstance(items, list) and all(isinstance(n, str) and len(n) <= _MAX_TEXT for n in items)
        if not texts or len(items) > _MAX_CLASSES:
            raise UserError(f'{where}: {key} of config.json must be texts of up to {_MAX_TEXT} characters')


def check_digest(path: Path, where: str) -> None:
    """Compares a file of the client's cache with the SHA-256 that the Hub gave for it.

    The file of a commit is a link to `blobs/`, where a large file has that hash for its name (and may be a link in
    turn, to a store by Xet's own hash). The client compares no more than the length of what came. A file that is not
    what its name says is removed, so that the next try gets it anew.

    Args:
        path: The file, as the client returned it.
        where: Whose it is, for messages.

    Raises:
        UserError: If they differ.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if not re.fullmatch(r'[0-9a-f]{64}', blob.name):
        return  # a small file, which the Hub names by git's hash of it, or a cache without links
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        for link in (path.resolve(), blob, path):
            link.unlink(missing_ok=True)
        raise UserError(f'{where}: {path.name} is not what the Hub says it is (SHA-256 differs); try again')


def check_fits(config: dict[str, Any], weights: Path, where: str) -> None:
    """Compares the tensors that a checked `config.json` asks for with those of the weights, before any is allocated.

    Raises:
        UserError: If the weights are truncated or no safetensors file, or of another model.
    """
    has = _shapes(weights, where)
    args = {**config.get('model_args', {})}
    args.setdefault('num_classes', config.get('num_classes', config['pretrained_cfg'].get('num_classes', 1000)))
    try:
        with torch.random.fork_rng(devices=[]), torch.device('meta'):
            model = timm.create_model(config['architecture'], pretrained_cfg=_build_cfg(config), **args)
        needs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except UserError as e:
        raise UserError(f'{where}: {e}') from None
    except Exception as e:  # arguments that the architecture refuses, in whatever way
        reason = ' '.join(str(e).split())[:200] or type(e).__name__
        raise UserError(f"{where}: '{config['architecture']}' cannot be built with its model_args: {reason}") from e
    unlike = sorted(n for n in needs.keys() | has.keys() if needs.get(n) != has.get(n))
    if unlike:
        name = unlike[0]
        raise UserError(
            f'{where}: {WEIGHTS} are not the weights of its config.json: {len(unlike)} tensors differ, {_short(name)} '
            f'first ({_size(has.get(name))} in the file, {_size(needs.get(name))} in the model)')


def _build_cfg(config: dict[str, Any]) -> dict[str, Any]:
    return {**config['pretrained_cfg'], 'architecture': config['architecture']}


def _shapes(weights: Path, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes, from the header alone; safetensors checks it against the length of the file."""
    try:
        with safe_open(weights, framework='pt') as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        reason = ' '.join(str(e).split())[:100]
        raise UserError(f'{where}: {WEIGHTS} is truncated, damaged or no safetensors file ({reason})') from None


def _size(shape: Optional[tuple[int, ...]]) -> str:
    return 'not' if shape is None else 'x'.join(map(str, shape)) or 'one number'


def _short(value: Any) -> str:
    """A value from a repository, safe to print: escaped, and cut."""
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= 80 else f'{text[:77]}...'
