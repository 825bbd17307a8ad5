"""The blocks of any timm model, in the order in which they run."""
from collections import defaultdict

from timm.models._manipulate import group_with_matcher, named_modules_with_params
from torch import nn

__all__ = ['layer_ids', 'list_blocks']

# A name that no matcher knows: timm sorts it with the classifier, which tells where the top is.
_TOP = '\0top'


def layer_ids(model: nn.Module, coarse: bool = False) -> tuple[dict[str, int], int]:
    """The layer of every parameter and module that timm's layer decay gives it, and the layer of the classifier.

    Models without `group_matcher` are layered by their blocks.
    """
    names = [n for n, _ in model.named_parameters()] + [n for n, _ in named_modules_with_params(model)]
    if hasattr(model, 'group_matcher'):
        named = [(n, None) for n in [*names, _TOP]]
        ids = group_with_matcher(iter(named), model.group_matcher(coarse=coarse), reverse=True)
        top = ids.pop(_TOP)
        return ids, top
    return _ids_by_blocks(model, names)


def _ids_by_blocks(model: nn.Module, names: list[str]) -> tuple[dict[str, int], int]:
    blocks = list_blocks(model)
    ids, reached = {}, 0
    for name in names:
        inside = next((i for i, b in enumerate(blocks) if name == b or name.startswith(f'{b}.')), None)
        reached = reached if inside is None else inside + 1
        ids[name] = reached
    return ids, len(blocks) + 1


def list_blocks(model: nn.Module) -> list[str]:
    """Names of the model's blocks, in order of execution; nothing is computed.

    Returns:
        Module paths of which none is an ancestor of another, each owning parameters, the classifier's in none of them.
    """
    seeds = _matcher_seeds(model)
    return seeds


def _matcher_seeds(model):
    groups = defaultdict(list)
    if not hasattr(model, 'group_matcher'):
        return []
    modules = dict(model.named_modules())
    ids, top = layer_ids(model)
    for n, _ in model.named_parameters():
        groups[ids[n]].append(n.rsplit('.', 1)[0].split('.') if '.' in n else [])
    seeds = []
    for paths in groups.values():
        common = []
        for parts in zip(*paths):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        while common and not (common[-1].isdigit() and isinstance(
                modules['.'.join(common[:-1])], (nn.Sequential, nn.ModuleList))):
            common.pop()
        if common:
            seeds.append('.'.join(common))
    return [s for s in dict.fromkeys(seeds) if not any(o.startswith(s + '.') for o in seeds)]
