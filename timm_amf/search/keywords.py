"""Options of `train_amf.py` from Python keywords, for `advise` and `search_blocks`."""
import argparse
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from timm_amf.engine.options import build_parser, parse_args
from timm_amf.errors import UserError

__all__ = ['keyword_words', 'parse_keywords', 'words_of']


def parse_keywords(config: Union[str, Path, None], options: Mapping[str, Any]) -> argparse.Namespace:
    """What `parse_args` gives for the flags that the keywords name; see `keyword_words`."""
    return parse_args(*keyword_words(config, options))


def keyword_words(
        config: Union[str, Path, None],
        options: Mapping[str, Any],
) -> tuple[list[str], Optional[Mapping[str, Any]]]:
    """The command line that the keywords stand for, and the data where they are given as a mapping.

    Args:
        config: Recipe or YAML file that sets options; the keywords win.
        options: Flags by name (None leaves one out), and `data`, a mapping of the form of a recipe's section.
    """
    options = {name: value for name, value in options.items() if value is not None}
    data = options.pop('data') if isinstance(options.get('data'), Mapping) else None
    words = [] if config is None else ['--config', str(config)]
    return [*words, *words_of(build_parser(), options)], data


def words_of(parser: argparse.ArgumentParser, options: Mapping[str, Any]) -> list[str]:
    """The command line that sets options of a parser."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words = []
    for name, value in options.items():
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1)
            raise UserError(f'{name}: no such option{f", did you mean {near[0]}?" if near else ""}')
        action = actions[name]
        flag = action.option_strings[-1]
        if action.nargs == 0:  # a switch
            words += [flag] * (value == action.const)
        elif isinstance(value, Mapping):
            words += [flag, *(f'{key}={item!r}' for key, item in value.items())]
        elif isinstance(value, (list, tuple)) and action.nargs is None:  # given several times
            words += [f'{flag}={item}' for item in value]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words.append(f'{flag}={value}')
    return words
