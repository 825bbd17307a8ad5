"""Where each parameter stands: its role and its depth within the role."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

from timm_amf.models.blocks import ancestors, classifier_names, layer_ids, list_blocks

__all__ = ['Place', 'model_roles', 'places', 'role_blocks', 'role_defaults']


@dataclass(frozen=True)
class Place:
    """The place of a parameter (or module) in a model.

    Attributes:
        role: Role, such as `branch.0` or `head`.
        depth: Number of blocks of the role that lie before it: 0 for the stem and the first block.
        block: Name of its block within the model, or `stem` or `tail` where it belongs to none.
        layer: Position for layer decay, counted from the top: 0 for the classifier's level.
    """
    role: str
    depth: int
    block: str
    layer: int


def model_roles(model: nn.Module) -> dict[str, list[str]]:
    """The roles of a model and the module paths that each covers.

    A composite names its roles in `tuning_roles`. A plain timm model has `backbone` (the empty path: all that no other
    role covers) and, if it has a classifier, `head`.
    """
    roles = getattr(model, 'tuning_roles', None)
    if roles is not None:
        return {role: [paths] if isinstance(paths, str) else list(paths) for role, paths in roles.items()}
    head = classifier_names(model)
    return {'backbone': [''], 'head': head} if head else {'backbone': ['']}


def role_defaults(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a composite says of its own roles (`role_defaults`): fields of `RolePlan` by role, beneath the Plan's."""
    return getattr(model, 'role_defaults', None) or {}


def role_blocks(model: nn.Module, role: str) -> list[str]:
    """Full names of the blocks of a role, in order; none for `head`.

    A role that covers one module has that module's blocks (`list_blocks`). Of a role that is a list of paths each path
    is a block, except whole networks (those with a `group_matcher`), which have blocks of their own, and what owns no
    matrix or kernel (a norm, a position embedding), which lies before, between or after the blocks.
    """
    if role == 'head':
        return []
    modules = dict(model.named_modules(remove_duplicate=False))
    given = (getattr(model, 'tuning_roles', None) or {}).get(role, '')
    blocks = []
    for path in [given] if isinstance(given, str) else given:
        module = modules.get(path)
        if isinstance(given, str) or hasattr(module, 'group_matcher'):
            prefix = f'{path}.' if path else ''
            blocks += [prefix + name for name in list_blocks(model.get_submodule(path))]
        elif module is not None and any(p.ndim > 1 for p in module.parameters()):
            blocks.append(path)
    return blocks


def places(model: nn.Module, names: Optional[Iterable[str]] = None) -> dict[str, Place]:
    """The place of every parameter (or of the given parameter or module names).

    What lies between two blocks (a downsampling layer, say) belongs to the depth of the one that follows.
    """
    roles = model_roles(model)
    blocks = {role: role_blocks(model, role) for role in roles}
    role_of = {path: role for role, paths in roles.items() for path in paths}
    index_of = {(role, block): i for role, of_role in blocks.items() for i, block in enumerate(of_role)}

    def find(name: str) -> tuple[Optional[str], Optional[int]]:
        """Its role, that of the innermost path, and the index of its block in this."""
        above = ancestors(name)
        role = next((role_of[path] for path in above if path in role_of), None)
        return role, next((index_of[role, path] for path in above if (role, path) in index_of), None)

    parameters = [n for n, _ in model.named_parameters()]
    following: dict[str, int] = {}  # of names outside all blocks, the next block that is registered after them
    for sequence in (parameters, [n for n, _ in model.named_modules() if n]):
        upcoming: dict[str, int] = {}
        for name in reversed(sequence):
            role, index = find(name)
            if index is not None:
                upcoming[role] = min(index, upcoming.get(role, index))
            elif role is not None:
                following.setdefault(name, upcoming.get(role, len(blocks[role])))

    layers, result = _layers(model, roles), {}
    for name in parameters if names is None else names:
        role, index = find(name)
        if role is None:
            raise ValueError(f'{name} belongs to no role of {type(model).__name__}')
        depth = index if index is not None else following.get(name, len(blocks[role]))
        block = blocks[role][index] if index is not None else 'stem' if depth == 0 and blocks[role] else 'tail'
        result[name] = Place(role, depth, block, layers.get(name, 0))
    return result


def _layers(model, roles):
    """Layer-decay positions from the top, as timm numbers them; a role without blocks is one level.

    A composite whose roles are no networks of their own says it itself: `role_layers()`, parameter -> position.
    """
    if hasattr(model, 'role_layers'):
        return model.role_layers()
    layers = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for role, paths in roles.items():
        for path in paths:
            part = modules.get(path)  # None where the path is that of a parameter
            if role == 'head' or not hasattr(part, 'group_matcher'):
                continue
            ids, top = layer_ids(part)
            layers.update({f'{path}.{n}' if path else n: top - i for n, i in ids.items()})
    return layers
