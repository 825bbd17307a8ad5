"""Dataclasses of settings: each field is declared once, and how it is read, checked and told of follows from that."""
import copy
import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from typing import Any, Union

from timm_amf.errors import UserError, nearest

__all__ = ['Named', 'build', 'check_fields', 'check_names', 'problem', 'setting']


def setting(default=dataclasses.MISSING, help: str = '', **metadata):
    """A field with a declaration.

    Args:
        default: Default; a list, a dict or a class is made for each instance.
        help: What it sets.
        metadata: `low`, `high` and `above` limit its numbers; `choices` lists its values. Of a Plan: `flag` is its flag
            where that has another name than the field, with other spellings after it, or '' where it has none; `policy`
            says that the policy has a flag of its own for it; `nargs` is the number of values of its flag; `otherwise`
            is what None means for a role where the Plan has no common value.
    """
    default_in_words = f' (default: {str(metadata["otherwise"]).lower()})' if 'otherwise' in metadata else ''
    metadata.update(help=help + default_in_words)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Named:
    """Settings whose constructor tells of one that there is not, and of the one that may be meant."""

    def __new__(cls, *values, **settings):
        check_names(settings, cls, cls.__name__)
        return super().__new__(cls)


def build(cls, value, where: str):
    """Settings from a mapping; those that are there already come back as they are."""
    if isinstance(value, cls):
        return value
    check_names(value, cls, where)
    try:
        return cls(**value)
    except UserError as e:
        raise UserError(f'{where}: {str(e).split(": ", 1)[-1]}') from None


def check_names(mapping, cls, where: str) -> None:
    """Refuse what is no mapping of fields of a class."""
    if not isinstance(mapping, Mapping):
        raise UserError(f'{where} must be a mapping of settings, not {mapping!r}')
    names = [f.name for f in dataclasses.fields(cls)]
    for key in mapping:
        if key not in names:
            hint = nearest(str(key), names, f'; it has {", ".join(names)}')
            raise UserError(f'{where} has no setting {key!r}{hint}')


def check_fields(instance, where: str) -> None:
    """Check the fields against their declarations; YAML gives `1e-4` as a string and `1` for a float."""
    hints = typing.get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value = getattr(instance, f.name)
        try:
            value = _coerce(value, hints[f.name])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f'{where}: {f.name} must be {_in_words(hints[f.name])}, not {value!r}') from None
        object.__setattr__(instance, f.name, value)  # of a frozen class, too
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for item in items:
            wrong = problem(item, **f.metadata)
            if wrong:
                raise UserError(f'{where}: {f.name} {wrong}')


def problem(value, low=None, high=None, above=None, choices=None, **_) -> str:
    """What is wrong with a value that has limits, of numbers, or choices; '' if nothing is."""
    if choices and value is not None and value not in choices:
        return f'{value!r} is unknown; choose one of {", ".join(choices)}'
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ''
    if not math.isfinite(value):
        return f'must be finite, not {value}'
    if above is not None and value <= above:
        return f'must be above {above}, not {value}'
    if (low is None or value >= low) and (high is None or value <= high):
        return ''
    limits = f'at least {low}' if high is None else f'between {above if low is None else low} and {high}'
    return f'must be {limits}, not {value}'


def _coerce(value, hint):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Union:
        for option in args:
            try:
                return _coerce(value, option)
            except (TypeError, ValueError, OverflowError):
                continue
    elif origin in (list, tuple) and not isinstance(value, (str, Mapping)):
        return origin(_coerce(v, args[0]) for v in value)
    elif origin is dict and isinstance(value, Mapping):
        return {k: _coerce(v, args[1]) for k, v in value.items()}
    elif hint in (int, float):
        number = math.nan if isinstance(value, bool) else float(value)
        if number == number and (hint is float or number.is_integer()):
            return hint(number)
    elif hint is str and (type(value) is int or isinstance(value, os.PathLike)):
        return str(value)  # a folder named 2024, a `pathlib.Path`
    elif origin is None and isinstance(value, hint):
        return value
    raise TypeError


_IN_WORDS = {bool: 'true or false', float: 'a number', int: 'a whole number', str: 'text', Any: 'anything'}


def _in_words(hint) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Union:
        return ' or '.join(_in_words(option) for option in args if option is not type(None))
    if origin is dict:
        return f'a mapping {{name: {_in_words(args[1])}}}'
    return f'a list [{_in_words(args[0])}, ...]' if origin else _IN_WORDS.get(hint, getattr(hint, '__name__', hint))
