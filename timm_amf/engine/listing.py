"""`timm-amf models`: the architectures, their tags, the recipes, and whether weights of them are published.

    timm-amf models
    timm-amf models 'amf_*'
    timm-amf models spottune_resnet50 --check

What is published is known of the time when this version was released, without any network; `--check` asks the Hub.
"""
import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from torch import nn

from timm_amf.engine.config_file import list_recipes
from timm_amf.engine.recipes import describe_expected, read_recipe
from timm_amf.errors import UserError, nearest
from timm_amf.models.method import method_of
from timm_amf.models.tags import FINE_TUNED, OWNER
from timm_amf.text import columns
from timm_amf.version import __version__

__all__ = ['ask_hub', 'main']

_MODULES = ('amf', 'spottune', 'decathlon')
_TIMEOUT = 10.  # seconds that the Hub gets for an answer

# Of a repository whether it is there: 'yes', 'no', ...
Published = Callable[[str], str]


def ask_hub(repo_id: str) -> str:
    """Whether a repository is on the Hub, for who is logged in or for everybody.

    Args:
        repo_id: OWNER/NAME.

    Returns:
        `yes`, `no`, `private` or `gated`.
    """
    try:
        info = HfApi(library_name='timm_amf', library_version=__version__).model_info(repo_id, timeout=_TIMEOUT)
    except GatedRepoError:
        return 'gated'
    except RepositoryNotFoundError:
        return 'no'
    return 'private' if info.private else 'gated' if info.gated else 'yes'


def _matches(name: str, pattern: str) -> bool:
    """Whether a name or the architecture in front of its tag is meant."""
    return fnmatch(name, pattern) or fnmatch(name.partition('.')[0], pattern)


def _model_row(name: str, model: nn.Module) -> tuple[str, ...]:
    method = method_of(model)
    parts = method.architectures() if method.method_name else []
    policy = [parts.pop()] if getattr(model, 'policy', None) is not None else []  # the last
    size = 'x'.join(map(str, model.pretrained_cfg['input_size']))
    count = f'{sum(p.numel() for p in model.parameters()):,}'
    return name, count, size, ' + '.join(filter(None, [', '.join(parts), *policy]))


def _tags(name: str, pattern: str) -> list[str]:
    """The tags of an architecture that are meant, the default first."""
    default = f'{name}.{timm.get_pretrained_cfg(name).tag}'
    own = [tag for tag in FINE_TUNED if tag.partition('.')[0] == name]
    return [tag for tag in (default, *own) if _matches(tag, pattern)]


def _tag_rows(tags: Sequence[str], model: nn.Module, published: Published) -> Iterator[tuple[str, ...]]:
    """The tags of a model whose weights can be had, or could if they were published."""
    for tag in tags:
        repo = timm.get_pretrained_cfg(tag).hf_hub_id
        if tag in FINE_TUNED:
            yield tag, published(repo), repo
        elif repo:
            sources = [net.pretrained_cfg.get('hf_hub_id') for net in method_of(model).networks()]
            yield f'{tag} (default)', 'yes', ', '.join(dict.fromkeys(filter(None, sources)))


def _known(cards: Iterable[Mapping[str, Any]]) -> Published:
    """What this version knows: its tags and its recipes say whether their repository is there."""
    there = {f'{OWNER}/{name}' for name, tuned in FINE_TUNED.items() if tuned.published}
    there |= {card['repo_id'] for card in cards if card.get('published')}
    return lambda repo: 'yes' if repo in there else 'no'


def _list(pattern: str, check: bool) -> str:
    names = [name for module in _MODULES for name in timm.list_models(module=module)]
    recipes = {name: read_recipe(name) for name in list_recipes() if _matches(name, pattern)}
    published = functools.cache(ask_hub) if check else _known(recipe['card'] for recipe in recipes.values())
    models, tags = [], []
    for name in names:
        meant = _tags(name, pattern)
        if meant:
            with torch.device('meta'):
                model = timm.create_model(name)
            models.append(_model_row(name, model))
            tags += _tag_rows(meant, model, published)
    if not models and not recipes:
        known = [*names, *FINE_TUNED, *list_recipes()]
        raise UserError(f'{pattern}: no such model, tag or recipe{nearest(pattern, known, "; try *")}')
    blocks = []
    if models:
        blocks.append(columns([('model', 'parameters', 'input', 'networks + policy'), *models], right=(1,)))
    if tags:
        blocks.append(columns([('tag', 'published', 'weights'), *tags]))
    if recipes:
        rows = [(
            name, published(recipe['card']['repo_id']) if 'repo_id' in recipe['card'] else '-',
            recipe['card'].get('paper', '-'), describe_expected(recipe['expected']) or '-')
            for name, recipe in recipes.items()]
        blocks.append(columns([('recipe', 'published', 'paper', 'expected top-1, percent'), *rows]))
        blocks.append('timm-amf train --config RECIPE trains one; docs/recipes.md says more.')
    return '\n\n'.join(blocks)


def main(args: argparse.Namespace) -> None:
    """`timm-amf models`: print the lists."""
    print(_list(args.filter, args.check), flush=True)
