"""The networks that a composite model is made of: what they are, their weights, and what they compute.

A composite names its networks (`backbones=('resnet18', 'resnet50')`, `policy='resnet10t'`) and this module makes them
with `timm.create_model`, so every adaptation that timm knows (input channels, image size, checkpoint filters, hub tags,
local files) applies to each network on its own.
"""
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from timm.models import get_arch_name, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from ..errors import UserError, nearest
from .sources import check_source, load_network

__all__ = ['Part', 'as_pair', 'build_parts', 'create_part', 'meta_part', 'part_cfg']


def as_pair(size: Optional[Union[int, Sequence[int]]]) -> Optional[tuple[int, int]]:
    """A size in pixels as (H, W); None stays None."""
    return (size, size) if isinstance(size, int) else tuple(size) if size is not None else None


@dataclass
class Part:
    """One network of a composite.

    Args:
        name: timm architecture, with or without a pretrained tag.
        num_classes: Outputs; 0 for the pooled features.
        kwargs: Keyword arguments of its `timm.create_model`, `pretrained_cfg_overlay` among them; None for none.
    """
    name: str
    num_classes: int = 0
    kwargs: Optional[dict[str, Any]] = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not timm.is_model(self.name):
            hint = nearest(
                str(self.name).partition('.')[0], timm.list_models(), '; timm.list_models() names those that exist')
            raise UserError(f"'{self.name}' is not an architecture that timm knows{hint}")
        self.kwargs = {} if self.kwargs is None else self.kwargs
        if not isinstance(self.kwargs, dict):
            raise UserError(f"the keyword arguments of '{self.name}' must be a dict, not {self.kwargs!r}.")

    def sized(self, size: tuple[int, int]) -> 'Part':
        """The part built for an input of (H, W) pixels, if its architecture is one of a fixed input size."""
        if not part_cfg(self).get('fixed_input_size') or 'img_size' in self.kwargs:
            return self
        return Part(self.name, self.num_classes, {**self.kwargs, 'img_size': tuple(size)})

    @property
    def key(self) -> str:
        """Equal for parts whose networks are built and loaded alike."""
        return json.dumps([self.name, self.num_classes, self.kwargs], sort_keys=True, default=repr)

    @property
    def layout(self) -> str:
        """Equal for parts that compute alike, whatever their weights."""
        kwargs = {k: v for k, v in self.kwargs.items() if k not in ('pretrained_cfg', 'pretrained_cfg_overlay')}
        return json.dumps([get_arch_name(self.name), kwargs], sort_keys=True, default=repr)


def part_cfg(part: Part) -> dict[str, Any]:
    """The `pretrained_cfg` that the part's network will have: its weights' source and its input statistics."""
    name, tag = split_model_name_tag(part.name)
    cfg = part.kwargs.get('pretrained_cfg') or tag or None
    try:
        return resolve_pretrained_cfg(name, cfg, part.kwargs.get('pretrained_cfg_overlay')).to_dict()
    except RuntimeError as e:
        tags = ', '.join(split_model_name_tag(m)[1] for m in timm.list_pretrained(f'{name}.*'))
        raise UserError(f"'{name}' has no pretrained tag '{cfg}'; it has: {tags or 'none'}.") from e
    except TypeError as e:
        raise UserError(f"pretrained_cfg_overlay of '{part.name}': {e}.") from e


def create_part(part: Part, pretrained: bool = False, **kwargs) -> nn.Module:
    """Build one network; further keyword arguments that are None count as not given."""
    kwargs = {k: v for k, v in {**part.kwargs, **kwargs}.items() if v is not None}
    try:
        return timm.create_model(part.name, pretrained=pretrained, num_classes=part.num_classes, **kwargs)
    except (AssertionError, TypeError, ValueError) as e:
        raise UserError(f"'{part.name}' cannot be built with these arguments: {e}.") from e


def meta_part(part: Part, in_chans: int) -> nn.Module:
    """Build the network on the meta device, where nothing is allocated; torch's random state stays as it was."""
    # Some constructors draw numbers even there.
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        return create_part(part, in_chans=in_chans, device='meta')


def build_parts(
        parts: Sequence[Part],
        pretrained: Sequence[bool],
        cache_dir: Optional[Union[str, Path]] = None,
        **kwargs,
) -> list[nn.Module]:
    """Build the networks, the pretrained ones each from its own source; equal ones are read once.

    Args:
        parts: What to build.
        pretrained: For each, whether to load its pretrained weights. The others are random, equal parts too.
        cache_dir: As in `timm.create_model`.
        **kwargs: Arguments common to all, `None` meaning not given.
    """
    loaded = {part.key: part for part, load in zip(parts, pretrained, strict=True) if load}
    for part in loaded.values():
        check_source(part.name, part_cfg(part), cache_dir)
    for key, part in loaded.items():
        create = partial(create_part, part, pretrained=True, cache_dir=cache_dir, **kwargs)
        loaded[key] = load_network(part.name, part_cfg(part), create)
    return [
        copy.deepcopy(loaded[part.key]) if load else create_part(part, **kwargs)
        for part, load in zip(parts, pretrained, strict=True)]
