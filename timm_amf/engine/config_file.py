"""Recipes and `args.yaml`: options in a YAML file, read as strictly as those of the command line.

Flat keys are flags by name (`batch_size` or `batch-size`); the sections in `SECTIONS` are mappings that belong to other
parts of the package and are passed on as they are.
"""
import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union

import yaml

from timm_amf.engine.timm_flags import SWITCHES, why_refused
from timm_amf.errors import TOKEN, UserError, nearest
from timm_amf.files import write_text
from timm_amf.flags import read_value
from timm_amf.yaml_text import load_yaml

__all__ = ['SECTIONS', 'args_content', 'derived_flags', 'find_config', 'list_recipes', 'read_config', 'save_args']

# What a Plan's section meant without these keys in runs whose args.yaml has a key `explicit`.
_OLD_SCHEDULE = dict(sched='step', warmup_epochs=0, warmup_scale=0., decay_epochs=20, decay_rate=0.94)
SECTIONS = ('plan', 'data', 'expected', 'card')

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel the recipes are inside the package, in a checkout beside it.
_RECIPE_DIRS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')
_SECRET_KEY = re.compile(r'(^|_)(token|password|passwd|secret|api_?key)$', re.IGNORECASE)


def list_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted({path.stem for folder in _RECIPE_DIRS for path in folder.glob('*.yaml')})


def find_config(name: str) -> Path:
    """The file that `--config` names: a path, or the bare name of a recipe that comes with the package."""
    path = Path(name).expanduser()
    found = [path]
    if path.name == name:
        found += [folder / f'{name.removesuffix(".yaml")}.yaml' for folder in _RECIPE_DIRS]
    for file in found:
        if file.is_file():
            return file
    recipes = list_recipes()
    hint = nearest(name, recipes, f'; the recipes are: {", ".join(recipes) or "none"}')
    raise UserError(f'--config {name}: no such file, and no such recipe{hint}')


def read_config(
        path: Union[str, Path],
        parser: argparse.ArgumentParser,
) -> tuple[dict[str, Any], dict[str, dict]]:
    """Read and check a YAML file of options, whose keys are the flags of a parser.

    Returns:
        The values of the flags by dest, and the sections by name.
    """
    content = {str(name).replace('-', '_'): value for name, value in load_yaml(path).items()}
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    explicit = content.pop('explicit', None)  # an older args.yaml lists all flags, and here those that counted
    if explicit is not None:
        if not isinstance(explicit, list):
            raise UserError(f'{path}: explicit: must be a list of flags, not {explicit!r}')
        content = {name: value for name, value in content.items() if name in (*explicit, *SECTIONS)}
    values, sections = {}, {}
    for name, value in content.items():
        try:
            if name in SECTIONS and not (name in actions and isinstance(value, str)):  # plan: FILE, data: DIR are flags
                if not isinstance(value, Mapping):
                    raise UserError(f'must be a section (a mapping), not {value!r}')
                sections[name] = dict(value)
            elif name in actions:
                name = 'data_dir' if name == 'data' else name
                values[name] = read_value(parser, actions[name], value)
            elif not why_refused(name):
                hint = nearest(name, (*actions, *SECTIONS), '; the keys are the flags of timm-amf train --help')
                raise UserError(f'unknown key{hint}')
            elif name in SWITCHES and value:
                raise UserError(why_refused(name))
        except UserError as e:
            raise UserError(f'{path}: {name}: {e}') from None
    schedule = sections.get('plan', {}).get('schedule') or {}
    if explicit is not None and 'plan' in sections and isinstance(schedule, Mapping):
        sections['plan'] = {'lr': 0.01, **sections['plan'], 'schedule': {**_OLD_SCHEDULE, **schedule}}
    return values, sections


def derived_flags(args: argparse.Namespace) -> list[str]:
    """The flags whose values follow from others that are given: `--amp` sets `mixed_precision`, for example."""
    values = vars(args)  # not always all flags
    sources = dict(
        cpu=values.get('device') == 'cpu', drop_path=values.get('drop_connect') is not None,
        loss=values.get('bce_loss'), pretrained=values.get('pretrained_path'), mixed_precision=values.get('amp'))
    return [name for name, given in sources.items() if given]


def save_args(args: argparse.Namespace, path: Union[str, Path]) -> None:
    """Write the options of a run to a YAML file that `--config` reads back to an equal namespace.

    Secrets (a Hub token among the model's arguments, say) are left out.
    """
    write_text(path, yaml.safe_dump(args_content(args), default_flow_style=False))


def args_content(args: argparse.Namespace) -> dict[str, Any]:
    """What `save_args` writes: flags that are set, and sections, without secrets."""
    left_out = {'recipe', 'explicit', 'config', 'data', 'finds_plan', 'split_file', *derived_flags(args)}
    flags = {key: value for key, value in vars(args).items() if key not in left_out and value is not None}
    if 'model' not in args.explicit:
        flags.pop('model', None)
    # Where there is a section `plan`, the flag of the same name is empty: `parse_args` sees to it.
    return _for_yaml({**flags, **args.recipe})


def _for_yaml(value: Any, key: str = '') -> Any:
    """Drop secrets, write tuples as strings, which `read_value` reads, and say where the images are, also for who
    asks from another folder: data folders and tables, and class maps.
    """
    if isinstance(value, Mapping):
        return {
            name: _for_yaml(item, name) for name, item in value.items()
            if not (isinstance(item, str) and item and _SECRET_KEY.search(str(name)))}
    if isinstance(value, list):
        return [_for_yaml(item, key) for item in value]
    text = repr(value) if isinstance(value, tuple) else value
    if not isinstance(text, str):
        return text
    if key == 'component':
        pairs = (part.partition('=') for part in text.split(','))
        return ','.join(f'{name}{sep}{_for_yaml(item, name.strip())}' for name, sep, item in pairs)
    is_place = key in ('data_dir', 'root', 'path', 'class_map') and text and os.path.exists(text)
    return os.path.abspath(text) if is_place else TOKEN.sub('***', text)
