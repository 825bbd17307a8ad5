"""What the search chooses from: the layers, blocks and windows of a model, in the order in which they run.

These are the four ways of the block-wise paper (sections III-A to III-C) and its two baselines. A candidate is a set of
modules that train together, besides the classifier. Which parameters these are, `candidate_parameters` says;
`candidate_plan` makes the Plan that trains them.
"""
import copy
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_amf.errors import UserError
from timm_amf.models.blocks import is_within
from timm_amf.models.method import method_of
from timm_amf.tuning.plan import Plan
from timm_amf.tuning.roles import Place, model_roles, places, role_blocks

__all__ = [
    'CUTS', 'Candidate', 'Layer', 'Traced', 'baseline_candidates', 'candidate_parameters', 'candidate_plan',
    'layer_candidates', 'random_candidate', 'top_candidate', 'window_candidates',
]

CUTS = ('residual', 'activation', 'pooling')
_ACTIVATION, _POOLING = '@activation', '@pooling'  # marks among the names of a trace


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Path of the module that owns the matrix or kernel.
        modules: It, and the norms and layer scales that go with it, in order of execution. What a module with weighted
            modules below it owns itself (ConvNeXt's `gamma`, a position embedding) is there as a parameter's path.
    """
    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """What trains together, besides the classifier.

    Attributes:
        name: Unique within its way.
        way: `layer`, `block`, `window`, `top3`, `random3`, ..., `classifier` or `all`.
        position: Its place among those of its way, 0 nearest the input.
        modules: Paths of modules, and of single parameters as in `Layer`, of which everything trains; none within
            another, in order of execution. The empty path is the whole role.
    """
    name: str
    way: str
    position: int
    modules: tuple[str, ...]


class Traced:
    """A network, and the order in which its parameters are first computed with.

    Two images of zeros pass through a copy of the model that shares its weights. What gets no gradient from them is no
    layer: training would not change it.

    Args:
        model: Any timm model, or a composite with `tuning_roles`, on any device.
        input_size: (C, H, W) of the images.
        features_only: The classifier reads `forward_features`, so that what `forward_head` computes has no part in it
            (VGG's `pre_logits`, MobileNetV3's `conv_head`).

    Attributes:
        trainable: Names of the parameters that get a gradient.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int], features_only: bool = False):
        self.model, self.input_size = model, tuple(input_size)
        self._events = _trace(model, input_size, features_only)
        self.trainable = set(self._events) - {_ACTIVATION, _POOLING}

    def layers(self, role: str = 'backbone', separate_norms: bool = False) -> list[Layer]:
        """The layers of a role that own weights, without the classifier, in the order in which they first compute.

        Args:
            role: The role, such as `backbone` or `branch.0`.
            separate_norms: What owns vectors only (norms, layer scales) or is a parameter of a module with others below
                it (position embeddings and biases) is a layer of its own, as in the paper's networks, where batch norm
                is a layer. Else it goes with the matrix or kernel before it in the same block, else with the one after
                it. Outside of blocks, what lies between the same two blocks counts as a block, and what finds nothing
                there (a last norm) goes with the layer before it.
        """
        return _layers(_units(self.model, self._events, role), separate_norms)

    def blocks(self, role: str = 'backbone', cut: str = 'residual') -> list[Candidate]:
        """The blocks of a role (section III-B).

        Activations and poolings are seen where they are modules, also within others (the activation of timm's
        `BatchNormAct2d`); those that a model computes by a function are not.

        Args:
            role: The role.
            cut: With `residual`, the blocks of `timm_amf.list_blocks`, and what lies before (`stem`), between and after
                them (`tail`) where it has a matrix or kernel. With `activation`, the layers of `layers` between two
                calls of an activation or pooling module; with `pooling`, of a pooling module.
        """
        if cut == 'residual':
            units = _units(self.model, self._events, role)
            return _residual_candidates(self.model, units, role_blocks(self.model, role))
        marks = (_ACTIVATION, _POOLING) if cut == 'activation' else (_POOLING,)
        units = _units(self.model, self._events, role, marks)
        piece_of = {unit.path: unit.piece for unit in units}
        pieces = [list(piece) for _, piece in itertools.groupby(_layers(units), lambda layer: piece_of[layer.name])]
        return [Candidate(_span(piece), 'block', i, _modules(piece)) for i, piece in enumerate(pieces)]


def layer_candidates(layers: Iterable[Layer]) -> list[Candidate]:
    """Each layer on its own (section III-A)."""
    return [Candidate(layer.name, 'layer', i, layer.modules) for i, layer in enumerate(layers)]


def window_candidates(layers: Sequence[Layer], length: int = 3) -> list[Candidate]:
    """Windows of as many layers, moved on by one layer at a time (section III-B)."""
    if not 1 <= length <= len(layers):
        raise UserError(f'window of {length} layers: the model has {len(layers)}; choose a length from 1 to that')
    windows = [layers[i:i + length] for i in range(len(layers) - length + 1)]
    return [Candidate(_span(window), 'window', i, _modules(window)) for i, window in enumerate(windows)]


def top_candidate(layers: Sequence[Layer], accuracies: Mapping[str, float], k: int) -> Candidate:
    """The k layers that were best on their own (section III-C); of equals those nearer the output."""
    ranked = sorted(range(len(layers)), key=lambda i: (accuracies[layers[i].name], i), reverse=True)
    return Candidate(f'top{k}', f'top{k}', 0, _modules(layers[i] for i in sorted(ranked[:k])))


def random_candidate(layers: Sequence[Layer], k: int, seed: int) -> Candidate:
    """k layers at random (the paper's Figure 3)."""
    drawn = sorted(np.random.RandomState(seed % 2**32).choice(len(layers), k, replace=False))
    return Candidate(f'random{k}', f'random{k}', 0, _modules(layers[i] for i in drawn))


def baseline_candidates() -> list[Candidate]:
    """The paper's baselines I and II: the classifier only, and all layers."""
    return [Candidate('classifier', 'classifier', 0, ()), Candidate('all', 'all', 0, ('',))]


def candidate_parameters(model: nn.Module, candidate: Candidate, role: str = 'backbone') -> list[str]:
    """Names of the parameters of a role that a candidate trains besides the classifier, as the model registers them."""
    where = places(model)
    return [n for n in where if where[n].role == role and is_within(n, candidate.modules)]


def candidate_plan(plan: Plan, candidate: Candidate, role: str = 'backbone') -> Plan:
    """The Plan in which of a role the candidate alone trains; all else, and so the classifier, is as in `plan`."""
    if candidate.way == 'classifier':
        train = 'none'
    elif candidate.way == 'all':
        train = 'all'
    elif candidate.way == 'block' and candidate.name in ('stem', 'tail'):
        train = [candidate.name]
    else:
        train = list(candidate.modules)
    return plan.with_role(role, train=train)


def _modules(layers: Iterable[Layer]) -> tuple[str, ...]:
    return tuple(path for layer in layers for path in layer.modules)


def _span(layers: Sequence[Layer]) -> str:
    first, last = layers[0].name, layers[-1].name
    return first if first == last else f'{first}..{last}'


# -- the order of execution -------------------------------------------------------------------------------------------


class _UseRecorder(TorchDispatchMode):
    """Notes each parameter when it is first computed with.

    Hooks on modules would miss weights that another module reads (BEiT's `qkv`) and parameters of the model itself.
    """

    def __init__(self, events: list[str], names: dict[int, str]):
        super().__init__()
        self.events, self.names = events, names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if id(value) in self.names:
                self.events.append(self.names.pop(id(value)))
        return func(*args, **(kwargs or {}))


def _classes(module) -> set[type]:
    found = {c for _, c in inspect.getmembers(module, inspect.isclass)}
    return {c for c in found if issubclass(c, nn.Module) and c.__module__ == module.__name__}


# MultiheadAttention stands in the same file of torch.
_ACTIVATIONS = (*_classes(nn.modules.activation) - {nn.MultiheadAttention}, *_classes(timm.layers.activations))
_POOLINGS = tuple(set().union(*map(_classes, (
    nn.modules.pooling, timm.layers.adaptive_avgmax_pool, timm.layers.pool2d_same, timm.layers.blur_pool))))


def _trace(model: nn.Module, input_size: Sequence[int], features_only: bool) -> list[str]:
    """What happens in a forward pass: the first use of each parameter that gets a gradient, and the marks."""
    events: list[str] = []
    weights = {id(p): nn.Parameter(p.detach(), p.is_floating_point()) for p in model.parameters()}
    example = next((p for p in weights.values() if p.is_floating_point()), torch.empty(0))
    devices = [] if example.device.type in ('cpu', 'meta') else [example.device]
    forked = torch.random.fork_rng(devices, device_type=example.device.type if devices else 'cuda')
    with forked, torch.enable_grad():
        # In training mode, and with nothing routed by values, so that a gradient reaches all that can train.
        copied = copy.deepcopy(model, dict(weights)).train()
        images = torch.zeros(2, *input_size, device=example.device, dtype=example.dtype)
        with method_of(copied).exportable() as net:
            for module in net.modules():
                for kinds, mark in ((_ACTIVATIONS, _ACTIVATION), (_POOLINGS, _POOLING)):
                    if isinstance(module, kinds):
                        module.register_forward_hook(lambda *_, mark=mark: events.append(mark))
            with _UseRecorder(events, {id(p): name for name, p in copied.named_parameters()}):
                outputs = (net.forward_features if features_only else net)(images)
        total = sum(t.sum() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad)
        params = {name: p for name, p in copied.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
    reached = {name for name, gradient in zip(params, found) if gradient is not None} | {_ACTIVATION, _POOLING}
    return [event for event in events if event in reached]


# -- layers -----------------------------------------------------------------------------------------------------------


@dataclass
class _Unit:
    """The least that can be named on its own: a module with nothing else that owns parameters below it, or a parameter.

    Attributes:
        path: Its path.
        place: Where it stands.
        piece: How many marks were before its first use.
        weighted: Whether it is a module that owns a matrix or kernel.
    """
    path: str
    place: Place
    piece: int
    weighted: bool = False

    @property
    def region(self) -> tuple[str, int]:
        """Equal for what stands in the same block, or outside of blocks between the same two."""
        return self.place.block, self.place.depth


def _units(model: nn.Module, trace: Iterable[str], role: str, marks: Sequence[str] = ()) -> list[_Unit]:
    """The units of a role, in order of execution."""
    if role not in model_roles(model):
        raise UserError(f'{type(model).__name__} has no role {role!r}; it has {", ".join(model_roles(model))}')
    where, piece = places(model), 0
    units: dict[str, _Unit] = {}
    for name in trace:
        piece += name in marks
        if name in (_ACTIVATION, _POOLING) or where[name].role != role:
            continue
        path = name.rpartition('.')[0]
        owner = model.get_submodule(path)
        alone = bool(path) and sum(1 for _ in owner.parameters()) == len(list(owner.parameters(recurse=False)))
        path = path if alone else name
        unit = units.setdefault(path, _Unit(path, where[name], piece))
        unit.weighted |= alone and _is_matrix(model.get_parameter(name), owner)
    if not any(unit.weighted for unit in units.values()):
        raise UserError(f'{type(model).__name__}: {role} has no layers with weights')
    return list(units.values())


def _is_matrix(param: nn.Parameter, owner: nn.Module) -> bool:
    # A scale may come with dimensions of one entry around its own (1, 1, C).
    return param.ndim > 1 and (isinstance(owner, (nn.Linear, _ConvNd)) or param.numel() > max(param.shape))


def _layers(units: Sequence[_Unit], separate_norms: bool = False) -> list[Layer]:
    modules: dict[int, list[str]] = {}
    for i, unit in enumerate(units):
        modules.setdefault(i if separate_norms else _leader(units, i), []).append(unit.path)
    return [Layer(units[i].path, tuple(modules[i])) for i in sorted(modules)]


def _leader(units: Sequence[_Unit], index: int) -> int:
    """The index of the unit with a matrix or kernel that a unit goes with."""
    if units[index].weighted:
        return index
    before = [i for i in range(index - 1, -1, -1) if units[i].weighted]
    after = [i for i in range(index + 1, len(units)) if units[i].weighted]
    near = [i for i in (*before, *after) if units[i].region == units[index].region]
    return (near or before or after)[0]


# -- blocks -----------------------------------------------------------------------------------------------------------


def _residual_candidates(model: nn.Module, units: Sequence[_Unit], blocks: Sequence[str]) -> list[Candidate]:
    pieces: dict[tuple[int, bool], list[_Unit]] = {}
    for unit in units:
        pieces.setdefault((unit.place.depth, unit.place.block in blocks), []).append(unit)
    between = any(not inside and 0 < depth < len(blocks) for depth, inside in pieces)
    candidates = []
    # What lies between two blocks has the depth of the second, and comes before it.
    for (depth, inside), piece in sorted(pieces.items()):
        if not any(unit.weighted for unit in piece):
            continue
        paths = (blocks[depth],) if inside else _outermost(model, piece)
        if not inside and blocks and depth == 0:
            name = 'stem'
        elif not inside and depth == len(blocks) and not between:
            name = 'tail'  # a Plan means what lies between the blocks, too
        else:
            name = paths[0] if len(paths) == 1 else f'{paths[0]}..{paths[-1]}'
        candidates.append(Candidate(name, 'block', len(candidates), paths))
    return candidates


def _outermost(model: nn.Module, piece: Sequence[_Unit]) -> tuple[str, ...]:
    """The outermost paths that together hold the units of a piece and nothing else."""
    own = {unit.path for unit in piece}
    others = [n for n, _ in model.named_parameters() if not is_within(n, own)]
    paths = {}
    for unit in piece:
        parts = unit.path.split('.')
        above = ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]
        paths[next(path for path in above if not any(is_within(n, [path]) for n in others))] = None
    return tuple(paths)
