"""Options of `train_amf.py` from Python keywords, for `advise` and `search_blocks`."""
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from timm_amf.engine.options import build_parser, parse_args
from timm_amf.flags import words_of

__all__ = ['keyword_words', 'parse_keywords']


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
    options = dict(options)
    data = options.pop('data') if isinstance(options.get('data'), Mapping) else None
    words = [] if config is None else ['--config', str(config)]
    return [*words, *words_of(build_parser(), options)], data
