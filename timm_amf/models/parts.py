"""The networks that a composite model is made of: what they are, their weights, and what they compute.

A composite names its networks (`backbones=('resnet18', 'resnet50')`, `policy='resnet10t'`) and this module makes them
with `timm.create_model`, so every adaptation that timm knows (input channels, image size, checkpoint filters, hub tags,
local files) applies to each network on its own.
"""
import copy
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import timm
import torch
from timm.layers import Format
from timm.models import get_arch_name, resolve_pretrained_cfg, split_model_name_tag
from torch import nn

from ..errors import UserError
from .sources import check_source, loading

__all__ = ['Part', 'Probe', 'as_pair', 'build_parts', 'create_part', 'meta_part', 'part_cfg', 'probe_part']


def as_pair(size: Optional[Union[int, Sequence[int]]]) -> Optional[tuple[int, int]]:
    """A size in pixels as (H, W); None stays None."""
    return (size, size) if isinstance(size, int) else tuple(size) if size is not None else None


@dataclass
class Part:
    """One network of a composite.

    Args:
        name: timm architecture, with or without a pretrained tag.
        num_classes: Outputs; 0 for the pooled features.
        kwargs: Keyword arguments of its `timm.create_model`, `pretrained_cfg_overlay` among them.
    """
    name: str
    num_classes: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not timm.is_model(self.name):
            close = difflib.get_close_matches(str(self.name).split('.')[0], timm.list_models(), n=3)
            hint = f'did you mean {" or ".join(close)}?' if close else 'timm.list_models() names those that exist.'
            raise UserError(f"'{self.name}' is not an architecture that timm knows; {hint}")
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
    """The `pretrained_cfg` that the part's network will have: its weights' source and its input statistics.

    Raises:
        UserError: If the architecture has no such pretrained tag.
    """
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
    """One network; further keyword arguments that are None count as not given.

    Raises:
        UserError: If the architecture refuses its arguments.
    """
    kwargs = {k: v for k, v in {**part.kwargs, **kwargs}.items() if v is not None}
    try:
        return timm.create_model(part.name, pretrained=pretrained, num_classes=part.num_classes, **kwargs)
    except (AssertionError, TypeError, ValueError) as e:
        raise UserError(f"'{part.name}' cannot be built with these arguments: {e}.") from e


def meta_part(part: Part, in_chans: int) -> nn.Module:
    """The network on the meta device, where nothing is allocated; torch's random state stays as it was."""
    # Some constructors draw numbers even there.
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        return create_part(part, in_chans=in_chans, device='meta')


def build_parts(
        parts: Sequence[Part],
        pretrained: Union[bool, Sequence[bool]] = False,
        cache_dir: Optional[Union[str, Path]] = None,
        **kwargs,
) -> list[nn.Module]:
    """Builds the networks; with `pretrained` each from its own source, and parts that are alike from one load.

    Args:
        parts: What to build.
        pretrained: Load each network's own pretrained weights, or those of the parts for which it is true. The others
            are drawn anew, equal parts too.
        cache_dir: As in `timm.create_model`.
        **kwargs: Arguments common to all, `None` meaning not given.

    Raises:
        UserError: If an architecture refuses its arguments, or weights cannot be had.
    """
    wanted = [pretrained] * len(parts) if isinstance(pretrained, bool) else list(pretrained)
    for part in {p.key: p for p, load in zip(parts, wanted) if load}.values():
        check_source(part.name, part_cfg(part), cache_dir)
    nets, loaded = [], {}
    for part, load in zip(parts, wanted):
        if not load:
            net = create_part(part, **kwargs)
        elif part.key in loaded:
            net = copy.deepcopy(loaded[part.key])
        else:
            net = loaded[part.key] = _load(part, cache_dir=cache_dir, **kwargs)
        nets.append(net)
    return nets


def _load(part: Part, **kwargs) -> nn.Module:
    cfg = part_cfg(part)
    classifiers = cfg.get('classifier') or ()
    with loading(part.name, cfg, (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)):
        return create_part(part, pretrained=True, **kwargs)


@dataclass(frozen=True)
class Probe:
    """What a network computes, found without computing it.

    Args:
        width: Width of the pooled features, `head_hidden_size`.
        map_size: Height and width of the unpooled features at the probed input, if the pooled features are their plain
            spatial mean; else None.
        map_fmt: Layout of those unpooled features.
        levels: timm's `feature_info`, the levels of `forward_intermediates`; empty if it has none.
    """
    width: int
    map_size: Optional[tuple[int, int]] = None
    map_fmt: Format = Format.NCHW
    levels: tuple[dict[str, Any], ...] = ()


_probes: dict[tuple, Probe] = {}


def probe_part(part: Part, input_size: tuple[int, int, int]) -> Probe:
    """Probes an architecture on the meta device, where nothing is allocated or computed.

    Args:
        part: What to probe; built with `num_classes=0`.
        input_size: (C, H, W) of the input.

    Raises:
        UserError: If the architecture does not give flat pooled features for this input.
    """
    key = part.key, tuple(input_size)
    if key not in _probes:
        # Some constructors draw numbers even on meta: a cached probe must not change what a seed gives.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _probes[key] = _probe(part, tuple(input_size))
    return _probes[key]


def _probe(part: Part, input_size: tuple[int, int, int]) -> Probe:
    net = meta_part(Part(part.name, 0, part.kwargs), input_size[0]).eval()
    x = torch.empty(2, *input_size, device='meta')
    shape = 'x'.join(str(s) for s in input_size)
    try:
        features = net.forward_features(x)
        pooled = net.forward_head(features, pre_logits=True)
    except Exception as e:  # whatever the architecture raises, the user chose one that does not fit
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        raise UserError(f"'{part.name}' cannot be a branch: it fails on a {shape} input ({reason}).") from e
    if not torch.is_tensor(pooled) or pooled.ndim != 2 or pooled.shape[1] != net.head_hidden_size:
        got = f'shape {tuple(pooled.shape)}' if torch.is_tensor(pooled) else type(pooled).__name__
        raise UserError(
            f"'{part.name}' cannot be a branch: a branch must give flat pooled features (batch, width) from "
            f'forward_head(pre_logits=True), and it gives {got}.'
        )
    levels = tuple(dict(f) for f in _level_info(net))
    fmt = Format(getattr(net, 'output_fmt', 'NCHW'))
    if torch.is_tensor(features) and features.ndim == 4 and _pools_by_mean(net, features.shape, fmt):
        size = tuple(features.shape[1:3] if fmt == Format.NHWC else features.shape[2:])
        return Probe(pooled.shape[1], size, fmt, levels)
    return Probe(pooled.shape[1], levels=levels)


def _level_info(net: nn.Module) -> Sequence[dict[str, Any]]:
    return getattr(net, 'feature_info', None) or () if hasattr(net, 'forward_intermediates') else ()


def _pools_by_mean(net: nn.Module, shape: torch.Size, fmt: Format) -> bool:
    """Whether the head is a spatial mean and nothing else.

    The parameters are on the meta device and the numbers are not: a head that uses any parameter fails or gives a meta
    tensor, and one that uses none must give the mean.
    """
    x = torch.randn(shape)
    try:
        pooled = net.forward_head(x, pre_logits=True)
    except (RuntimeError, NotImplementedError):
        return False
    mean = x.mean((1, 2) if fmt == Format.NHWC else (2, 3))
    return not pooled.is_meta and pooled.shape == mean.shape and torch.allclose(pooled, mean, atol=1e-5)
