"""Flags of a command as rows of a table, and what gives them their values: words, Python keywords, a YAML file.

A row is `(names, kind, default, help)` with an optional fifth item of `add_argument` keywords. `bool` makes a switch
and `dict` a list of `key=value`; a `count` begins at 1, a `natural` number and an `amount` at 0, a `share` ends at 1.
"""
import argparse
import ast
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Optional, Union

from timm_amf.errors import UserError, nearest
from timm_amf.fields import problem
from timm_amf.yaml_text import MAX_NUMBER

__all__ = [
    'CORES', 'HelpFormatter', 'KeyValues', 'add_flags', 'amount', 'count', 'natural', 'number', 'path', 'read_value',
    'share', 'words_of', 'workers']

_logger = logging.getLogger(__name__)

# Of the machine that this process may use: no more worker processes are started.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
path = os.path.expanduser  # the type of a flag that names a file or a folder


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default where there is one worth telling."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = 'default' in action.help or action.nargs == 0
        return action.help if told or action.default in (None, '', [], {}) else f'{action.help} (default: %(default)s)'


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


def number(
        kind: type,
        low: Optional[float] = None,
        high: Optional[float] = None,
        above: Optional[float] = None,
) -> Callable[[str], Union[int, float]]:
    """The type of a flag that takes a finite number, `int` or `float`, within limits."""
    def read(text: str) -> Union[int, float]:
        value = kind(text)
        too_large = kind is int and abs(value) > MAX_NUMBER
        wrong = f'must be a number of at most {MAX_NUMBER}' if too_large else problem(value, low, high, above)
        if wrong:
            raise argparse.ArgumentTypeError(wrong)
        return value

    read.__name__ = kind.__name__  # argparse has it in its messages
    return read


count, natural, amount, share = number(int, 1), number(int, 0), number(float, 0), number(float, 0, 1)


def workers(text: str) -> int:
    """The type of `--workers`, which tells who asks for more than there will be."""
    value = number(int, 0, 1024)(text)
    if value > CORES:
        _logger.warning(f'--workers {value}: this machine has {CORES} cores for it, so that {CORES} load data.')
    return value


workers.__name__ = 'int'


def add_flags(parser: argparse.ArgumentParser, title: str, rows: Iterable[tuple], about: Optional[str] = None) -> None:
    """Add the flags of a table, in a group of their own."""
    group = parser.add_argument_group(title, about)
    for names, kind, default, text, *extra in rows:
        keywords = {'default': default, 'help': text.replace('%', '%%'), **(extra[0] if extra else {})}
        if kind is bool:
            keywords.setdefault('action', 'store_true')
        elif kind is dict:
            keywords.update(action=KeyValues, nargs='*', metavar='KEY=VALUE')
        elif 'choices' not in keywords:
            metavar = {'int': 'N', 'float': 'X', 'str': 'NAME', 'expanduser': 'PATH'}.get(kind.__name__, 'N')
            keywords.setdefault('metavar', metavar)
            keywords['type'] = number(kind) if kind in (int, float) else kind
        group.add_argument(*names.split(), **keywords)


def words_of(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """The command line that sets flags of a parser, by name; None leaves one out."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words = []
    for name, value in values.items():
        if value is None:
            continue
        if name not in actions:
            raise UserError(f'{name}: no such option{nearest(name, actions)}')
        words += _words(actions[name], value)
    return words


def _words(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:  # a switch
        return [flag] * (value == action.const)
    if isinstance(value, Mapping):
        return [flag, *(f'{key}={item!r}' for key, item in value.items())]
    if isinstance(value, (list, tuple)):
        if action.nargs is not None:
            return [flag, *map(str, value)]
        if not isinstance(action, argparse._AppendAction):
            raise UserError(f'{action.dest}: takes one value, not {value!r}')
        return [f'{flag}={item}' for item in value]
    return [f'{flag}={value}']


def read_value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file for a flag: through the type, choices and number of values of the command line."""
    if value == action.default and type(value) is type(action.default) or value is None and action.default == '':
        return action.default  # timm's own args.yaml files write a path that is not set either way
    several = action.nargs not in (None, '?') or isinstance(action, argparse._AppendAction)
    is_text = action.type in (None, str, path)
    items = value if several and isinstance(value, list) else [value]
    wrong = [item for item in items if type(item) not in ((str,) if is_text else (str, int, float))]
    if value is None:
        raise UserError(f'has no value; leave the key out for its default, {action.default!r}')
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f'must be true or false, not {value!r}')
    elif isinstance(action, KeyValues):
        if not isinstance(value, Mapping):
            raise UserError(f'must be a mapping of names to values, not {value!r}')
        value = _with_tuples(value)
    elif wrong:
        kind = 'text' if is_text else action.type.__name__
        raise UserError(f'must be {kind}, not {wrong[0]!r}' + '; put it in quotes' * is_text)
    try:
        return getattr(parser.parse_args(_words(action, value)), action.dest)
    except UserError as e:
        raise UserError(re.sub(r'^--[\w-]+: ', '', str(e))) from e


def _with_tuples(value: Any) -> Any:
    """Read strings such as '(2, 2)' as tuples: YAML has none, and some constructors insist on them."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tuples(item) for item in value]
    if isinstance(value, str) and value.startswith('(') and isinstance(_literal(value), tuple):
        return _literal(value)
    return value
