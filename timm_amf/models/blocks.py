"""The blocks of any timm model, in the order in which they run.

Found from the model's structure alone. A block is an entry of a container (`nn.Sequential`, `nn.ModuleList`,
`nn.ModuleDict`) that timm's layer decay (`group_matcher`) keeps in one layer: a residual block of a ResNet, a
transformer layer, an Inception module, a convolution of a VGG. Where the matcher is coarser than that (a stage is one
layer), the stage is opened; where there is none, containers decide alone.
"""
from collections.abc import Iterable, Iterator

from timm.models._manipulate import group_with_matcher, named_modules_with_params
from torch import nn

__all__ = ['classifiers', 'is_within', 'layer_ids', 'list_blocks']

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What timm calls the blocks within a stage.
_STAGE_NAMES = ('blocks', 'layers')
# A name that no matcher knows: timm sorts it with the classifier, which tells where the top is.
_TOP = '\0top'


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model, or the several that some have."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list)) else [found]


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
        inside = next((i for i, b in enumerate(blocks) if name == b or name.startswith(f'{b}.')), None)
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
        self.heads = _classifier_names(model, self.modules)
        self.layers: dict[str, set[int]] = {}
        self.top = 0
        if hasattr(model, 'group_matcher'):
            ids, self.top = _matcher_ids(model, [n for n, _ in model.named_parameters()])
            self.layers = _ids_below(ids)

    def find(self) -> list[str]:
        names = list(self._by_layers('')) if self.layers else []
        return names or list(self._by_containers('')) or [c for c in self._children('') if self._usable(c)]

    def _children(self, path: str) -> list[str]:
        """The children that own weights; a norm on its own does not."""
        prefix = f'{path}.' if path else ''
        names = [prefix + n for n, _ in self.modules[path].named_children()]
        return [n for n in names if self.weights.get(n)]

    def _usable(self, path: str) -> bool:
        return not any(h == path or h.startswith(f'{path}.') for h in self.heads)

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


def _weight_counts(model: nn.Module) -> dict[str, int]:
    """Number of modules at or below each path that own a matrix or a kernel."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(p is not None and p.ndim > 1 for p in module._parameters.values()):
            for path in _ancestors(name):
                counts[path] = counts.get(path, 0) + 1
    return counts


def _ids_below(ids: dict[str, int]) -> dict[str, set[int]]:
    below: dict[str, set[int]] = {}
    for name, i in ids.items():
        for path in _ancestors(name):
            below.setdefault(path, set()).add(i)
    return below


def _ancestors(name: str) -> list[str]:
    """The path itself and all above it, the root '' last."""
    parts = name.split('.') if name else []
    return ['.'.join(parts[:i]) for i in range(len(parts), -1, -1)]


def _classifier_names(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    try:
        found = model.get_classifier()
    except AttributeError:  # the model has no such method, or looks for a part of a classifier that was removed
        found = None
    found = found if isinstance(found, (tuple, list)) else [found]
    names = [n for n, m in modules.items() if n and any(m is f for f in found)]
    named = (getattr(model, 'pretrained_cfg', None) or {}).get('classifier') or ()
    return [*names, *((named,) if isinstance(named, str) else named)]
