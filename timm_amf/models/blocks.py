"""What a timm network consists of: its blocks, layers and classifier, and what one forward pass shows of them.

`list_blocks` reads the structure alone. A block is an entry of a container (`nn.Sequential`, `nn.ModuleList`,
`nn.ModuleDict`) that timm's layer decay (`group_matcher`) keeps in one layer: a residual block of a ResNet, a
transformer layer, an Inception module, a convolution of a VGG. Where the matcher is coarser than that (a stage is one
layer), the stage is opened; where there is none, containers decide alone.

`probe_part` builds an architecture once on the meta device, where nothing is allocated or computed, watches one forward
pass, and keeps what it saw.
"""
import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from timm.layers import Format
from timm.models._manipulate import group_with_matcher, named_modules_with_params
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from .folding import find_pairs
from .parts import Part, meta_part
from .sources import as_names

__all__ = [
    'Probe', 'Units', 'ancestors', 'classifier_names', 'classifiers', 'in_eval', 'is_within', 'layer_ids',
    'list_blocks', 'probe_part', 'probe_units',
]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What timm calls the blocks within a stage.
_STAGE_NAMES = ('blocks', 'layers')
# A name that no matcher knows: timm sorts it with the classifier, which tells where the top is.
_TOP = '\0top'


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model, or the several that some have."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


def classifier_names(model: nn.Module) -> list[str]:
    """Module paths of the classifier, as `get_classifier` and `pretrained_cfg` name it; empty if it has no weights."""
    try:
        found = classifiers(model)
    except AttributeError:  # the model has no such method, or looks for a part of a classifier that was removed
        found = []
    cfg_names = as_names((getattr(model, 'pretrained_cfg', None) or {}).get('classifier'))
    names: list[str] = []
    for name, module in model.named_modules():
        named = any(module is f for f in found) or name in cfg_names
        if name and named and not is_within(name, names) and next(module.parameters(), None) is not None:
            names.append(name)
    return names


def is_within(path: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of some modules, or below one; the empty path is the whole model."""
    return any(not m or path == m or path.startswith(f'{m}.') for m in modules)


def layer_ids(model: nn.Module, coarse: bool = False) -> tuple[dict[str, int], int]:
    """The layer of every parameter, and of every module with parameters, in timm's layer decay; and the classifier's.

    Models without `group_matcher` are layered by their blocks.
    """
    names = [n for n, _ in model.named_parameters()] + [n for n, _ in named_modules_with_params(model)]
    if hasattr(model, 'group_matcher'):
        return _matcher_ids(model, names, coarse)
    blocks = list_blocks(model)
    ids, reached = {}, 0
    for name in names:
        inside = next((i for i, block in enumerate(blocks) if is_within(name, [block])), None)
        reached = reached if inside is None else inside + 1
        ids[name] = reached
    return ids, len(blocks) + 1


def _matcher_ids(model: nn.Module, names: list[str], coarse: bool = False) -> tuple[dict[str, int], int]:
    named = [(n, None) for n in [*names, _TOP]]
    ids = group_with_matcher(iter(named), model.group_matcher(coarse=coarse), reverse=True)
    top = ids.pop(_TOP)
    return ids, top


def list_blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks, in order of execution; nothing is computed.

    Returns:
        Module paths, none an ancestor of another, each owning weights, the classifier in none of them.
    """
    own = getattr(model, 'block_names', None)
    if own is not None:
        return list(own)
    roles = getattr(model, 'tuning_roles', None)
    if roles is None:
        return _BlockFinder(model).find()
    # A composite: its networks run side by side, so one after the other as it names them.
    paths = [path for role, path in roles.items() if role != 'head']
    return [f'{path}.{name}' for path in paths for name in list_blocks(model.get_submodule(path))]


class _BlockFinder:
    """One walk through a model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.weights = _weight_counts(model)
        self.classifiers = classifier_names(model)
        self.layers: dict[str, set[int]] = {}  # of the matcher, at or below each path
        self.top = 0
        if hasattr(model, 'group_matcher'):
            ids, self.top = _matcher_ids(model, [n for n, _ in model.named_parameters()])
            for name, i in ids.items():
                for path in ancestors(name):
                    self.layers.setdefault(path, set()).add(i)

    def find(self) -> list[str]:
        names = list(self._by_layers('')) if self.layers else []
        return names or list(self._by_containers('')) or [c for c in self._children('') if self._usable(c)]

    def _children(self, path: str) -> list[str]:
        """The children that own weights; a norm on its own does not."""
        prefix = f'{path}.' if path else ''
        names = [prefix + n for n, _ in self.modules[path].named_children()]
        return [n for n in names if self.weights.get(n)]

    def _usable(self, path: str) -> bool:
        return not any(is_within(name, [path]) for name in self.classifiers)

    def _is_container(self, path: str) -> bool:
        # Not their subclasses: many a convolution with its norm is one.
        return type(self.modules[path]) in _CONTAINERS

    def _is_block(self, path: str) -> bool:
        """Two layers with weights or more: a residual block is, a convolution with its norm is not."""
        return self.weights[path] > 1 and not self._is_container(path)

    def _by_layers(self, path: str) -> Iterator[str]:
        """Blocks below a module that spans several layers of the matcher: what is in one layer, or what that holds."""
        in_sequence = type(self.modules[path]) is nn.Sequential
        for child in self._children(path):
            layers = self.layers.get(child, set())
            if len(layers) > 1:
                yield from self._by_layers(child)
            elif self._usable(child) and layers != {self.top} and (layers != {0} or in_sequence):
                yield from self._open(child, entry=in_sequence)

    def _by_containers(self, path: str) -> Iterator[str]:
        for child in self._children(path):
            if self._is_container(path) and self._is_block(child) and self._usable(child):
                yield from self._open(child, entry=True)
            else:
                yield from self._by_containers(child)

    def _open(self, path: str, entry: bool) -> Iterator[str]:
        """The blocks of a stage, or the module itself if it is a block, or stands among blocks as an `entry`."""
        children = self._children(path)
        of_one = not entry and len(list(self.modules[path].children())) == 1 and all(map(self._is_block, children))
        if not self._is_container(path) and not of_one:
            stages = [c for c in children if c.rsplit('.', 1)[-1] in _STAGE_NAMES and self._is_container(c)]
            children = self._children(stages[0]) if stages else []
        alone = len(children) == 1 and bool(self._children(children[0]))
        if children and (alone or all(self._is_block(c) or self._is_container(c) for c in children)):
            for child in children:
                yield from self._open(child, entry=alone)
        elif entry or self._is_block(path):
            yield path


def _weight_counts(model: nn.Module) -> Counter[str]:
    """Number of modules at or below each path that own a matrix or a kernel."""
    return Counter(
        path for name, module in model.named_modules(remove_duplicate=False)
        if any(p is not None and p.ndim > 1 for p in module._parameters.values()) for path in ancestors(name))


def ancestors(name: str) -> list[str]:
    """The path itself and all above it, the root '' last."""
    parts = name.split('.') if name else []
    return ['.'.join(parts[:i]) for i in range(len(parts), -1, -1)]


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode, and afterwards each of its modules in the mode that it had."""
    # Restored one by one and not by `train()`, which models override.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# A batch size that no map, window or table of an architecture is likely to have among its dimensions.
_BATCH = 101


@contextmanager
def _watch(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Watch one forward pass, and give what is known when it has ended.

    Those of some modules that take and give one tensor once a pass, in order; and the others, each with the reason.
    """
    calls: dict[str, list[str]] = {name: [] for name in names}
    order, versions, hooks, units, refused = [], {}, [], [], {}
    for name in calls:
        def before(module, args, name=name):
            versions[name] = args[0]._version if args and torch.is_tensor(args[0]) else 0

        def after(module, args, kwargs, output, name=name):
            order.append(name)
            calls[name].append(_problem(args, kwargs, output, versions[name]))

        module = model.get_submodule(name)
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, with_kwargs=True)]
    try:
        yield units, refused
    finally:
        for hook in hooks:
            hook.remove()
    for name, problems in calls.items():
        problem = next(filter(None, problems), '')
        if problem or len(problems) != 1:
            refused[name] = problem or f'runs {len(problems)} times an image'
    units += [name for name in order if name not in refused]


def _problem(args: tuple, kwargs: dict, output: Any, version: int) -> str:
    """Why a call is not one that takes one tensor and gives one, batch first; empty if it is."""
    if not args or not torch.is_tensor(args[0]):
        return 'takes no single tensor'
    if not torch.is_tensor(output):
        return f'gives a {type(output).__name__}, not one tensor'
    if args[0].shape[:1] != (_BATCH,) or output.shape[:1] != (_BATCH,):
        return 'has no batch as its first dimension'
    if args[0]._version != version:
        return 'works in place on its input'
    others = (*args[1:], *kwargs.values())
    # What holds tensors may be written to, or differ from image to image.
    if any(isinstance(a, (list, dict, set)) for a in others):
        return 'takes a container beside the tensor'
    if any(size and size % _BATCH == 0 for a in tree_leaves(others) if torch.is_tensor(a) for size in a.shape):
        return 'takes a second tensor that differs from image to image'
    return ''


@dataclass(frozen=True)
class Probe:
    """What one forward pass on the meta device shows of an architecture.

    Attributes:
        name: The architecture.
        net: The network on the meta device, to be read only.
        error: Why the features cannot be computed; then nothing else is known.
        blocks: Names of the blocks that take and give one tensor, batch first, once a pass; in order of execution.
        refused: The other blocks, and why each of them cannot be routed.
        tokens: The features are (B, tokens, width), of which one linear classifier reads a pooled vector.
        tail: Modules with weights that are registered after the last block, the classifier apart.
        width: Width of the pooled features; 0 where they are not flat.
        head_error: Why it is 0.
        map_size: (H, W) of the unpooled features, if the pooled features are their plain spatial mean; else None.
        map_fmt: Layout of the unpooled features.
        levels: timm's `feature_info`, the levels of `forward_intermediates`; empty if it has none.
    """
    name: str
    net: nn.Module
    error: str = ''
    blocks: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    tokens: bool = False
    tail: tuple[str, ...] = ()
    width: int = 0
    head_error: str = ''
    map_size: Optional[tuple[int, int]] = None
    map_fmt: Format = Format.NCHW
    levels: tuple[dict[str, Any], ...] = ()

    def require_blocks(self) -> None:
        """Raise an error where no block can be routed."""
        if self.blocks:
            return
        reason = self.error or 'it has no blocks that timm_amf.list_blocks could find'
        for name, why in [*self.refused.items()][:1]:
            reason = f'none of its {len(self.refused)} blocks takes and gives one tensor ({name} {why})'
        raise UserError(f"'{self.name}' cannot be routed: {reason}.")

    def require_width(self) -> None:
        """Raise an error where the architecture does not give flat pooled features."""
        if self.error or self.head_error:
            raise UserError(f"'{self.name}' cannot be a branch: {self.error or self.head_error}.")


_probes: dict[tuple, Probe] = {}


def probe_part(part: Part, input_size: tuple[int, int, int]) -> Probe:
    """Probe an architecture on the meta device; equal arguments are probed once.

    Args:
        part: What to probe; of its number of classes it matters only whether there are any.
        input_size: (C, H, W) of the input.
    """
    part = Part(part.name, min(part.num_classes, 1), part.kwargs)
    key = part.key, tuple(input_size)
    if key not in _probes:
        # Some constructors draw numbers even on meta: a cached probe must not change what a seed gives.
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            _probes[key] = _probe(part, tuple(input_size))
    return _probes[key]


def _probe(part: Part, input_size: tuple[int, int, int]) -> Probe:
    net = meta_part(part, input_size[0]).eval()
    if not (hasattr(net, 'get_classifier') and hasattr(net, 'forward_head')):
        return Probe(part.name, net, 'it is an encoder without a classifier')
    shape = 'x'.join(str(s) for s in input_size)
    x = torch.empty(_BATCH, *input_size, device='meta')
    try:
        with _watch(net, list_blocks(net)) as (blocks, refused):
            features = net.forward_features(x)
    except Exception as e:  # whatever the architecture raises, the user chose one that does not fit
        return Probe(part.name, net, f'it fails on a {shape} input ({_reason(e)})')
    is_tensor = torch.is_tensor(features)
    fmt, size = Format(getattr(net, 'output_fmt', 'NCHW')), None
    width, head_error = _pooled_width(net, features)
    if width and is_tensor and features.ndim == 4 and _pools_by_mean(net, features.shape, fmt):
        size = tuple(features.shape[1:3] if fmt == Format.NHWC else features.shape[2:])
    classifier = net.pretrained_cfg.get('classifier')
    return Probe(
        part.name,
        net,
        blocks=blocks,
        refused=refused,
        tokens=is_tensor and features.ndim == 3 and isinstance(classifier, str) and '.' not in classifier,
        tail=_tail(net, blocks),
        width=width,
        head_error=head_error,
        map_size=size,
        map_fmt=fmt if size else Format.NCHW,
        levels=tuple(dict(f) for f in getattr(net, 'feature_info', None) or ())
        if hasattr(net, 'forward_intermediates') else (),
    )


def _reason(e: Exception) -> str:
    return str(e).strip().split('\n')[0] or type(e).__name__


def _pooled_width(net: nn.Module, features: Any) -> tuple[int, str]:
    """Width of the flat pooled features, or 0 and what is wrong with them."""
    try:
        pooled = net.forward_head(features, pre_logits=True)
    except Exception as e:  # as above
        return 0, f'its head fails ({_reason(e)})'
    if torch.is_tensor(pooled) and pooled.ndim == 2 and pooled.shape[1] == net.head_hidden_size:
        return pooled.shape[1], ''
    got = f'shape {tuple(pooled.shape[1:])} an image' if torch.is_tensor(pooled) else type(pooled).__name__
    return 0, (
        'a branch must give flat pooled features (batch, width) from forward_head(pre_logits=True), and it gives '
        f'{got}')


def _pools_by_mean(net: nn.Module, shape: torch.Size, fmt: Format) -> bool:
    """Whether the head is a spatial mean and nothing else.

    The parameters are on the meta device and the numbers are not: a head that uses any parameter fails or gives a meta
    tensor, and one that uses none must give the mean.
    """
    x = torch.randn(2, *shape[1:])
    try:
        pooled = net.forward_head(x, pre_logits=True)
    except (RuntimeError, NotImplementedError):
        return False
    mean = x.mean((1, 2) if fmt == Format.NHWC else (2, 3))
    return not pooled.is_meta and pooled.shape == mean.shape and torch.allclose(pooled, mean, atol=1e-5)


def _tail(net: nn.Module, blocks: Sequence[str]) -> tuple[str, ...]:
    top = [n for n, m in net.named_children() if next(m.parameters(), None) is not None]
    last = blocks[-1].split('.')[0] if blocks else None
    after = top[top.index(last) + 1:] if last in top else []
    return tuple(n for n in after if n not in classifier_names(net))


class Units(NamedTuple):
    """Where a network can be taken apart, for a search.

    Attributes:
        order: Modules that take and give one tensor, batch first, once a pass; in order of execution.
        refused: The other modules with weights, and why each of them is none of those.
        pairs: Names of convolutions and of the batch norms that alone read them.
    """
    order: list[str]
    refused: dict[str, str]
    pairs: list[tuple[str, str]]


def probe_units(model: nn.Module, input_size: Sequence[int]) -> Units:
    """Find the blocks of a model, and the outermost modules with weights beside them, in one pass of a meta copy.

    Args:
        model: A timm model, which is left as it is.
        input_size: (C, H, W) of the input.
    """
    on_meta: dict[int, Tensor] = {id(b): b.to('meta') for b in model.buffers()}
    on_meta |= {id(p): nn.Parameter(p.to('meta'), p.is_floating_point()) for p in model.parameters()}
    net = copy.deepcopy(model, on_meta).eval()
    x = torch.empty(_BATCH, *input_size, device='meta', dtype=next(net.parameters()).dtype)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        with _watch(net, _outermost(net)) as (order, refused), find_pairs(net) as pairs_of:
            logits = net.forward_head(net.forward_features(x))
    return Units(order, refused, pairs_of(logits) if torch.is_tensor(logits) else [])


def _outermost(model: nn.Module) -> list[str]:
    """Blocks, and the outermost modules with weights that hold none of them, without the classifier."""
    blocks, heads = list_blocks(model), classifier_names(model)
    inner = {path for name in (*blocks, *heads) for path in ancestors(name)}
    found: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        outermost = path in blocks or path and path not in inner
        if outermost and not is_within(path, [*found, *heads]) and next(module.parameters(), None) is not None:
            found.append(path)
    return found
