"""Recipes and `args.yaml`: options in a YAML file, read as strictly as those of the command line.

Flat keys are flags by name (`batch_size` or `batch-size`); the sections in `SECTIONS` are mappings that belong to other
parts of the package and are passed on as they are.
"""
import argparse
import ast
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Union

import yaml

from timm_amf.engine.timm_flags import SWITCHES, why_refused
from timm_amf.errors import UserError
from timm_amf.files import write_text
from timm_amf.yaml_text import MAX_NUMBER, load_yaml

__all__ = [
    'SECTIONS', 'KeyValues', 'args_content', 'derived_flags', 'find_config', 'list_recipes', 'load_yaml', 'nearest',
    'read_config', 'save_args',
]

# What a Plan's section meant without these keys in runs whose args.yaml has a key `explicit`.
_OLD_SCHEDULE = dict(sched='step', warmup_epochs=0, warmup_scale=0., decay_epochs=20, decay_rate=0.94)
SECTIONS = ('plan', 'data', 'expected', 'card')

_PACKAGE = Path(__file__).resolve().parents[1]
# In an installed wheel the recipes are inside the package, in a checkout beside it.
_RECIPE_DIRS = (_PACKAGE / 'hub_configs', _PACKAGE.parent / 'hub_configs')
_SECRET_KEY = re.compile(r'(^|_)(token|password|passwd|secret|api_?key)$', re.IGNORECASE)
_SECRET_VALUE = re.compile(r'\bhf_[A-Za-z0-9]{20,}')


class KeyValues(argparse.Action):
    """Collects `key=value` arguments in a dict; values are Python literals, or else strings."""

    def __call__(self, parser, namespace, values, option_string=None):
        pairs = {}
        for item in filter(None, values):
            key, equals, value = item.partition('=')
            if not equals or not key:
                raise argparse.ArgumentError(self, f'{item!r} is not of the form key=value')
            pairs[key] = _literal(value)
        setattr(namespace, self.dest, pairs)


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return text
    return value if _is_plain(value) else text


def _is_plain(value: Any) -> bool:
    """Whether a value is what `load_yaml` reads back."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if type(value) is int:
        return abs(value) <= MAX_NUMBER
    return isinstance(value, (bool, float, str, type(None)))


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns ', did you mean ...?' with the closest of the choices, or '' where none is close."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f', did you mean {close[0]}?' if close else ''


def list_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted({path.stem for folder in _RECIPE_DIRS for path in folder.glob('*.yaml')})


def find_config(name: str) -> Path:
    """Returns the file that `--config` names: a path, or the bare name of a recipe that comes with the package.

    Raises:
        UserError: If there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.name == name:
        stem = name[:-len('.yaml')] if name.endswith('.yaml') else name
        for folder in _RECIPE_DIRS:
            if (folder / f'{stem}.yaml').is_file():
                return folder / f'{stem}.yaml'
    recipes = ', '.join(list_recipes()) or 'none'
    raise UserError(f'--config {name}: no such file, and no such recipe; the recipes are: {recipes}')


def read_config(
        path: Union[str, Path],
        parser: argparse.ArgumentParser,
) -> tuple[dict[str, Any], dict[str, dict]]:
    """Reads and checks a file of options.

    Args:
        path: YAML file.
        parser: Parser whose flags the keys are; it gives their types, choices and numbers of values.

    Returns:
        The values of the flags by dest, and the sections by name.

    Raises:
        UserError: If the file cannot be read, or a key or value is wrong; the message names file, key and remedy.
    """
    content = load_yaml(path)
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    values, sections = {}, {}
    explicit = content.get('explicit')
    if not isinstance(explicit, (list, type(None))):
        raise UserError(f'{path}: explicit: must be a list of flags, not {explicit!r}')
    for name, value in content.items():
        where = f'{path}: {name}'
        dest = str(name).replace('-', '_')
        if dest == 'explicit' or explicit is not None and dest not in (*explicit, *SECTIONS):
            continue  # an older args.yaml lists all flags, and in `explicit` those that counted
        if dest in SECTIONS and not (dest in actions and isinstance(value, str)):  # plan: FILE, data: DIR are flags
            if not isinstance(value, Mapping):
                raise UserError(f'{where}: must be a section (a mapping), not {value!r}')
            sections[dest] = dict(value)
        elif dest not in actions and why_refused(dest):
            if dest in SWITCHES and value:
                raise UserError(f'{where}: {why_refused(dest)}')
        elif dest not in actions:
            hint = nearest(dest, (*actions, *SECTIONS))
            raise UserError(f'{where}: unknown key{hint or "; the keys are the flags of timm-amf train --help"}')
        else:
            values[dest] = _convert(actions[dest], value, where)
    given = sections.get('plan', {}).get('schedule')
    if explicit is not None and 'plan' in sections and isinstance(given, (Mapping, type(None))):
        schedule = {**_OLD_SCHEDULE, **(given or {})}
        sections['plan'] = {'lr': 0.01, **sections['plan'], 'schedule': schedule}
    return values, sections


def _convert(action: argparse.Action, value: Any, where: str) -> Any:
    """Puts a YAML value through the type, the choices and the number of values of its flag."""
    if value == action.default and type(value) is type(action.default):
        return value
    if value is None:
        if action.default == '':
            return ''  # timm's own args.yaml files write a path that is not set either way
        raise UserError(f'{where}: has no value; leave the key out for its default, {action.default!r}')
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f'{where}: must be true or false, not {value!r}')
        return value
    if isinstance(action, KeyValues):
        if not isinstance(value, Mapping):
            raise UserError(f'{where}: must be a mapping of names to values, not {value!r}')
        return _with_tuples(value)
    if action.nargs in ('+', '*') or isinstance(action.nargs, int) or isinstance(action, argparse._AppendAction):
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if isinstance(action.nargs, int) and len(items) != action.nargs:
            raise UserError(f'{where}: must be a list of {action.nargs} values, not {value!r}')
        if action.nargs == '+' and not items:
            raise UserError(f'{where}: must not be empty')
        return [_convert_item(action, item, where) for item in items]
    return _convert_item(action, value, where)


def _with_tuples(value: Any) -> Any:
    """Reads strings such as '(2, 2)' as tuples: YAML has none, and some constructors insist on them."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tuples(item) for item in value]
    if isinstance(value, str) and value.startswith('(') and isinstance(_literal(value), tuple):
        return _literal(value)
    return value


def _convert_item(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type or str
    name = getattr(kind, '__name__', str(kind))
    wrong = UserError(f'{where}: must be {name}, not {value!r}' + (' (put it in quotes)' if kind is str else ''))
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        converted = value
    elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise wrong
    else:
        try:
            converted = kind(str(value))
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise wrong from error
    if action.choices is not None and converted not in action.choices:
        known = ', '.join(repr(choice) for choice in action.choices)
        raise UserError(f'{where}: {value!r} is not one of {known}{nearest(str(value), map(str, action.choices))}')
    return converted


def derived_flags(args: argparse.Namespace) -> list[str]:
    """The flags whose values follow from others that are given: `--amp` sets `mixed_precision`, for example."""
    values = vars(args)  # not always all flags
    sources = dict(
        cpu=values.get('device') == 'cpu', drop_path=values.get('drop_connect') is not None,
        loss=values.get('bce_loss'), pretrained=values.get('pretrained_path'), mixed_precision=values.get('amp'))
    return [name for name, given in sources.items() if given]


def save_args(args: argparse.Namespace, path: Union[str, Path]) -> None:
    """Writes the options of a run to a YAML file that `--config` reads back to an equal namespace.

    Secrets (a Hub token among the model's arguments, say) are left out.

    Args:
        args: Result of `parse_args`.
        path: File to write.
    """
    write_text(path, yaml.safe_dump(args_content(args), default_flow_style=False))


def args_content(args: argparse.Namespace) -> dict[str, Any]:
    """What `save_args` writes: flags that are set, and sections, without secrets."""
    left_out = {'recipe', 'explicit', 'config', 'data', 'finds_plan', 'split_file', *derived_flags(args)}
    flags = {key: value for key, value in vars(args).items() if key not in left_out and value is not None}
    if 'model' not in args.explicit:
        flags.pop('model', None)
    # Where there is a section `plan`, the flag of the same name is empty: `parse_args` sees to it.
    return _for_yaml(_with_absolute_paths({**flags, **args.recipe}))


def _with_absolute_paths(value: Any, key: str = '') -> Any:
    """Where the images are, also for who asks from another folder: data folders and tables, and class maps."""
    if isinstance(value, Mapping):
        return {name: _with_absolute_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(item, key) for item in value]
    if key == 'component' and isinstance(value, str):
        pairs = (part.partition('=') for part in value.split(','))
        return ','.join(f'{name}{sep}{_with_absolute_paths(item, name.strip())}' for name, sep, item in pairs)
    if key in ('data_dir', 'root', 'path', 'class_map') and value and os.path.exists(value):
        return os.path.abspath(value)
    return value


def _for_yaml(value: Any) -> Any:
    """Drops secrets and writes tuples as strings, which `_with_tuples` reads."""
    if isinstance(value, Mapping):
        return {
            key: _for_yaml(item) for key, item in value.items()
            if not (isinstance(item, str) and item and _SECRET_KEY.search(str(key)))
        }
    if isinstance(value, list):
        return [_for_yaml(item) for item in value]
    if isinstance(value, tuple):
        return _for_yaml(repr(value))
    return _SECRET_VALUE.sub('***', value) if isinstance(value, str) else value
