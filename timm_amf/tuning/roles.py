"""Where each parameter stands: its role and its depth within the role."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Union

from torch import nn

from timm_amf.models.blocks import classifier_names, layer_ids, list_blocks

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


def places(model: nn.Module, names: Union[Iterable[str], None] = None) -> dict[str, Place]:
    """The place of every parameter (or of the given parameter or module names).

    What lies between two blocks (a downsampling layer, say) belongs to the depth of the one that follows.
    """
    roles = model_roles(model)
    owner_of = sorted(((path, role) for role, paths in roles.items() for path in paths), key=lambda p: -len(p[0]))
    blocks = {role: role_blocks(model, role) for role in roles}
    layers = _layers(model, roles)
    order = [n for n, _ in model.named_parameters()]
    names = order if names is None else list(names)
    following = _following_block(model, order, blocks, owner_of)

    result = {}
    for name in names:
        role = _owner(name, owner_of)
        if role is None:
            raise ValueError(f'{name} belongs to no role of {type(model).__name__}')
        index = _block_index(name, blocks[role])
        if index is not None:
            depth, block = index, blocks[role][index]
        else:
            depth = following.get(name, len(blocks[role]))
            block = 'stem' if depth == 0 and blocks[role] else 'tail'
        result[name] = Place(role, depth, block, layers.get(name, 0))
    return result


def _owner(name, owner_of):
    return next((role for path, role in owner_of if not path or name == path or name.startswith(f'{path}.')), None)


def _block_index(name, blocks):
    # By components, since `blocks.1` must not take `blocks.10.conv`.
    parts = name.split('.')
    index = {block: i for i, block in enumerate(blocks)}
    for end in range(len(parts), 0, -1):
        found = index.get('.'.join(parts[:end]))
        if found is not None:
            return found
    return None


def _following_block(model, order, blocks, owner_of):
    """For names outside all blocks, the index of the block of their role that is registered next after them."""
    modules = [n for n, _ in model.named_modules() if n]
    following = {}
    for sequence in (order, modules):
        upcoming: dict[str, int] = {}
        for name in reversed(sequence):
            role = _owner(name, owner_of)
            if role is None:
                continue
            index = _block_index(name, blocks[role])
            if index is not None:
                upcoming[role] = min(index, upcoming.get(role, index))
            else:
                following.setdefault(name, upcoming.get(role, len(blocks[role])))
    return following


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
