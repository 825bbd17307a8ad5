"""Plan x model -> one table that says of every parameter what happens to it.

Optimiser groups, freezing, re-initialisation, L2-SP and the printed summary read this table.
"""
import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
from timm.optim._param_groups import _matches_pattern
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.errors import UserError
from timm_amf.models.blocks import is_within
from timm_amf.tuning.plan import Plan, RolePlan
from timm_amf.tuning.roles import Place, model_roles, places, role_blocks, role_defaults

__all__ = ['Resolved', 'RoleSettings', 'Setting', 'resolve', 'running_norms']


@dataclass(frozen=True)
class Setting:
    """What a Plan says of one parameter.

    Attributes:
        place: Role and depth of the parameter.
        trains: False if it never trains.
        start_epoch: Epoch from which it trains.
        lr: Its learning rate at the peak of its schedule.
        weight_decay: Its weight decay towards zero; 0 where `l2sp_alpha` acts.
        l2sp_alpha: Its weight decay towards the starting point, or 0.
        schedule: Fields of `Schedule` in which its role differs from the Plan.
    """
    place: Place
    trains: bool
    start_epoch: int
    lr: float
    weight_decay: float
    l2sp_alpha: float
    schedule: dict[str, Any]


def running_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of a model that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _NormBase) and m.track_running_stats}


@dataclass(frozen=True)
class RoleSettings:
    """A role of the Plan, joined with the role of the model.

    Attributes:
        plan: Its settings, all filled in.
        blocks: Its blocks, in order.
        training: Names of the blocks that train, `stem` and `tail` among them; None where all of it does.
        layers: Modules (or single parameters) that train whether or not their block does, by their full paths.
    """
    plan: RolePlan
    blocks: list[str]
    training: Optional[frozenset[str]]
    layers: frozenset[str] = frozenset()

    @property
    def transferred(self) -> int:
        """Number of blocks that keep their weights."""
        return len(self.blocks) - self.plan.reinit_blocks

    def trained(self, name: str, place: Place) -> bool:
        """Whether `train` covers a parameter or a module, by its own name or with all of its block."""
        return self.training is None or place.block in self.training or is_within(name, self.layers)

    def reinitialised(self, place: Place) -> bool:
        """Whether what stands there starts anew; never the stem."""
        return self.plan.reinit_blocks > 0 and place.block != 'stem' and place.depth >= self.transferred

    def pulled(self, place: Place) -> bool:
        """Whether what stands there decays towards its starting point."""
        if not self.plan.l2sp_alpha or self.reinitialised(place):
            return False
        return self.plan.l2sp_blocks in (None, 'all') or place.depth < self.plan.l2sp_blocks


@dataclass(frozen=True)
class Resolved:
    """A Plan, resolved for a model.

    Attributes:
        plan: The Plan.
        roles: The Plan's word on each role.
        parameters: What happens to each parameter, in the order of the model.
        norms: For each norm with running statistics the epoch from which these move, None for never.
        reinitialised: Names of the parameters and buffers that start anew (`reinit_blocks`): of each role the last
            blocks and what lies between and after them. The classifier is a role of its own, and new in any case.
    """
    plan: Plan
    roles: dict[str, RoleSettings]
    parameters: dict[str, Setting]
    norms: dict[str, Optional[int]]
    reinitialised: list[str]


def resolve(model: nn.Module, plan: Union[Plan, Resolved]) -> Resolved:
    """Joins a Plan with a model; what is resolved already comes back as it is.

    Raises:
        UserError: If the Plan names a role or a block that the model has not, or more blocks than it has.
    """
    if isinstance(plan, Resolved):
        return plan
    roles, norms = _roles(model, plan), running_norms(model)
    parameters, buffers = dict(model.named_parameters()), _owners_of_buffers(model)
    where = places(model, [*parameters, *norms, *dict.fromkeys(buffers.values())])
    exempt = getattr(model, 'no_weight_decay', lambda: ())()
    of_norms = {f'{n}.{p}' for n, m in norms.items() for p, _ in m.named_parameters(recurse=False)}
    settings = {}
    for name, param in parameters.items():
        role = roles[where[name].role]
        setting = _setting(name, param, where[name], role, plan, exempt)
        fixed = role.plan.freeze_bn and name in of_norms
        settings[name] = dataclasses.replace(setting, trains=False) if fixed else setting
    return Resolved(
        plan,
        roles,
        settings,
        {name: _moves_from(name, norm, where[name], roles, settings) for name, norm in norms.items()},
        [n for n, owner in {**{n: n for n in parameters}, **buffers}.items()
         if roles[where[owner].role].reinitialised(where[owner])],
    )


def _owners_of_buffers(model: nn.Module) -> dict[str, str]:
    """Buffer -> the module that owns it, which says where it stands; what is in no role (input statistics) left out."""
    paths = [path for of_role in model_roles(model).values() for path in of_role]
    owners = {n: n.rpartition('.')[0] for n, _ in model.named_buffers()}
    return {n: owner for n, owner in owners.items() if owner and is_within(owner, paths)}


def _moves_from(
        name: str,
        norm: nn.Module,
        place: Place,
        roles: dict[str, RoleSettings],
        settings: dict[str, Setting],
) -> Optional[int]:
    """The epoch from which the statistics of a norm move: with its own parameters where it has some.

    A norm without affine parameters goes with the block around it, or with a layer of it that holds the norm.
    """
    own = [settings[f'{name}.{n}'] for n, _ in norm.named_parameters(recurse=False)]
    role = roles[place.role]
    if not own and role.trained(name, place) and not role.plan.freeze_bn:
        own = [s for s in settings.values() if (s.place.role, s.place.block) == (place.role, place.block)]
    return min((s.start_epoch for s in own if s.trains), default=None)


def _roles(model: nn.Module, plan: Plan) -> dict[str, RoleSettings]:
    """The Plan's word on each role of the model.

    Raises:
        UserError: If the Plan names a role or a block that the model has not, or more blocks than it has.
    """
    names = list(model_roles(model))
    kinds = [*names, *dict.fromkeys(n.split('.')[0] for n in names)]
    for key in plan.roles:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, 1)
            hint = f'; did you mean {near[0]!r}?' if near else ''
            raise UserError(f'plan: {type(model).__name__} has no role {key!r} (it has {", ".join(names)}){hint}')
    roles = {}
    for name in names:
        role, blocks = plan.role(name, role_defaults(model)), role_blocks(model, name)
        _check_counts(name, role, len(blocks))
        roles[name] = RoleSettings(role, blocks, *_training(model, name, role, blocks))
    return roles


def _check_counts(name: str, role: RolePlan, count: int) -> None:
    for field in ('low_blocks', 'reinit_blocks', 'l2sp_blocks'):
        value = getattr(role, field)
        if isinstance(value, int) and value > count:
            raise UserError(f'plan: {field} of {name} is {value}, but it has {count} blocks; lower it')
    if role.l2sp_blocks is not None and role.l2sp_alpha is None:
        raise UserError(f'plan: {name} has l2sp_blocks but no l2sp_alpha; set both, or neither')
    if name == 'head' and role.l2sp_alpha:
        raise UserError('plan: l2sp_alpha of head: the classifier is new and has no starting point; use weight_decay')
    if role.lora_rank and (name == 'head' or role.reinit_blocks or role.l2sp_alpha):
        what = 'is new' if name == 'head' else f'has {"reinit_blocks" if role.reinit_blocks else "l2sp_alpha"}'
        raise UserError(f'plan: lora_rank of {name}, which {what}: adapters keep the weights they adapt; leave one out')
    transferred = count - role.reinit_blocks
    if role.l2sp_alpha and isinstance(role.l2sp_blocks, int) and role.l2sp_blocks > transferred:
        raise UserError(
            f'plan: l2sp_blocks of {name} is {role.l2sp_blocks}, but only {transferred} of its {count} blocks keep '
            f'their weights (reinit_blocks {role.reinit_blocks}), and the others have no starting point; lower it')


def _training(
        model: nn.Module,
        name: str,
        role: RolePlan,
        blocks: list[str],
) -> tuple[Optional[frozenset[str]], frozenset[str]]:
    """The blocks and the layers that train."""
    if role.train == 'all':
        return None, frozenset()
    if role.train == 'none':
        return frozenset(), frozenset()
    if role.train == 'random':
        return _drawn_blocks(name, role, blocks), frozenset()
    training, others = set(), []
    for item in role.train:
        if isinstance(item, int):
            if not -len(blocks) <= item < len(blocks):
                raise UserError(f'plan: {name} has {len(blocks)} blocks, so train: [{item}] is out of range')
            training.add(blocks[item])
        elif item in ('stem', 'tail'):
            training.add(item)
        else:
            # A block may be named within its role or by its full path.
            found = [b for b in blocks if b == item] or [b for b in blocks if b.endswith(f'.{item}')]
            if len(found) == 1:
                training.add(found[0])
            else:
                others.append(item)
    return frozenset(training), _training_layers(model, name, blocks, others)


def _training_layers(model: nn.Module, role: str, blocks: list[str], items: list[str]) -> frozenset[str]:
    """The full paths of the modules and parameters that `train` names beside the blocks."""
    if not items:
        return frozenset()
    owned = [n for n, place in places(model).items() if place.role == role]
    # Paths that own parameters of the role, none of them above the role itself.
    tops = [path for path in model_roles(model)[role] if path]
    known = dict.fromkeys(path for n in owned for path in _paths(n) if not any(t.startswith(f'{path}.') for t in tops))
    layers = set()
    for item in items:
        found = [path for path in dict.fromkeys([item, *(f'{top}.{item}' for top in tops)]) if path in known]
        if len(found) > 1:
            raise UserError(f'plan: {role} has several modules {item!r}; name one of {", ".join(found)}')
        if not found:
            near = difflib.get_close_matches(item, [*blocks, *known, *_relative(known, tops)], 1)
            hint = f'; did you mean {near[0]!r}?' if near else '; see timm_amf.list_blocks(model)'
            raise UserError(f'plan: {role} has no block or layer {item!r}{hint}')
        layers.add(found[0])
    return frozenset(layers)


def _paths(name: str) -> list[str]:
    """A dotted name and all above it, the root left out."""
    parts = name.split('.')
    return ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]


def _relative(names: Iterable[str], tops: list[str]) -> list[str]:
    return [name[len(top) + 1:] for name in names for top in tops if name.startswith(f'{top}.')]


def _drawn_blocks(name, role, blocks) -> frozenset[str]:
    if not blocks:
        raise UserError(f'plan: {name} has no blocks to draw from; set its train to "all" or "none"')
    number = max(1, math.floor(role.train_share * len(blocks) + 0.5))
    # A generator whose numbers NumPy keeps the same for good: a resumed run draws the same blocks.
    drawn = np.random.RandomState(role.train_seed).permutation(len(blocks))[:number]
    return frozenset([*(blocks[i] for i in drawn), 'tail'])


def _setting(name: str, param: nn.Parameter, place: Place, role: RoleSettings, plan: Plan, exempt) -> Setting:
    settings = role.plan
    scale = settings.low_lr_scale if place.depth < settings.low_blocks else 1.
    trains = role.trained(name, place) and not (settings.lora_rank and '.lora_' not in name)
    if settings.layer_decay is not None:
        layer_scale = max(plan.layer_decay_min_scale, settings.layer_decay ** place.layer)
        trains = trains and not (plan.layer_decay_no_opt_scale and layer_scale < plan.layer_decay_no_opt_scale)
        scale *= layer_scale
    one_dimensional = param.ndim <= 1 or name.endswith('.bias')
    decays = not (plan.weight_decay_exclude_1d and one_dimensional) and not _matches_pattern(name, exempt)
    return Setting(
        place=place,
        trains=trains,
        start_epoch=settings.start_epoch,
        lr=settings.lr * scale,
        weight_decay=settings.weight_decay if decays and not role.pulled(place) else 0.,
        l2sp_alpha=settings.l2sp_alpha if role.pulled(place) and (decays or settings.l2sp_1d) else 0.,
        schedule=settings.schedule,
    )
