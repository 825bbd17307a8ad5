"""Options of `train_amf.py` from Python keywords, for `advise` and `search_blocks`."""
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from timm_amf.engine.options import build_parser, parse_args
from timm_amf.errors import UserError

__all__ = ['parse_keywords', 'words_of']


def parse_keywords(
        config: Union[str, Path, None],
        options: Mapping[str, Any],
        default_model: Optional[str] = None,
) -> argparse.Namespace:
    """What `parse_args` gives for the flags that the keywords name.

    Args:
        config: Recipe or YAML file that sets options; the keywords win.
        options: Flags by name, and `data`, a mapping of the form of a recipe's section.
        default_model: The model where neither names one.
    """
    options = {name: value for name, value in options.items() if value is not None}
    data = options.pop('data') if isinstance(options.get('data'), Mapping) else None
    words = [] if config is None else ['--config', str(config)]
    if default_model is not None and config is None:
        options.setdefault('model', default_model)
    args = parse_args([*words, *words_of(build_parser(), options)])
    if data is not None:
        args.recipe['data'] = dict(data)
    return args


def words_of(parser: argparse.ArgumentParser, options: Mapping[str, Any]) -> list[str]:
    """The command line that sets options of a parser."""
    actions = {}
    for action in parser._actions:
        if action.option_strings:
            actions.setdefault(action.dest, []).append(action)
    words = []
    for name, value in options.items():
        if name not in actions:
            raise UserError(f'no option is called {name!r}; timm-amf train --help lists them')
        action = actions[name][0]
        flag = max(action.option_strings, key=len)
        if action.nargs == 0:  # a switch
            chosen = [a for a in actions[name] if a.const == value]
            if isinstance(action, argparse.BooleanOptionalAction):
                words.append(next(o for o in action.option_strings if o.startswith('--no-') != bool(value)))
            elif chosen:
                words.append(max(chosen[0].option_strings, key=len))
        elif isinstance(value, Mapping):
            words += [flag, *(f'{key}={item!r}' for key, item in value.items())]
        elif isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        else:
            words.append(f'{flag}={value}')
    return words
