"""Plan x model -> one table that says of every parameter what happens to it.

Optimiser groups, freezing, re-initialisation, L2-SP and the printed summary read this table.
"""
import math
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
from timm.optim._param_groups import _matches_pattern
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.errors import UserError, nearest
from timm_amf.models.blocks import ancestors, is_within
from timm_amf.tuning.plan import Plan, RolePlan
from timm_amf.tuning.roles import Place, model_roles, places, role_blocks, role_defaults

__all__ = ['Resolved', 'RoleSettings', 'Setting', 'param_groups', 'resolve', 'running_norms']


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
        training: What trains: blocks, modules and single parameters by their full paths, `stem` and `tail` among them;
            None where all of it does.
    """
    plan: RolePlan
    blocks: list[str]
    training: Optional[frozenset[str]]

    @property
    def transferred(self) -> int:
        """Number of blocks that keep their weights."""
        return len(self.blocks) - self.plan.reinit_blocks

    def trained(self, name: str, place: Place) -> bool:
        """Whether `train` covers a parameter or a module, by its own name or with all of its block."""
        return self.training is None or place.block in self.training or is_within(name, self.training)

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
    """Join a Plan with a model; what is resolved already comes back as it is.

    Raises:
        UserError: If the Plan names a role or a block that the model has not, or more blocks than it has.
    """
    if isinstance(plan, Resolved):
        return plan
    norms, parameters = running_norms(model), dict(model.named_parameters())
    # What is in no role (input statistics) has no place.
    paths = [path for of_role in model_roles(model).values() for path in of_role]
    owners = {n: n.rpartition('.')[0] for n, _ in model.named_buffers()}
    owners = {n: owner for n, owner in owners.items() if owner and is_within(owner, paths)}
    where = places(model, [*parameters, *norms, *dict.fromkeys(owners.values())])
    roles = _roles(model, plan, {n: where[n].role for n in parameters})
    exempt = getattr(model, 'no_weight_decay', lambda: ())()
    of_norms = {f'{n}.{p}' for n, m in norms.items() for p, _ in m.named_parameters(recurse=False)}
    settings = {
        name: _setting(name, param, where[name], roles[where[name].role], plan, exempt, name in of_norms)
        for name, param in parameters.items()}
    return Resolved(
        plan,
        roles,
        settings,
        {name: _moves_from(name, norm, where[name], roles, settings) for name, norm in norms.items()},
        [n for n, owner in {**{n: n for n in parameters}, **owners}.items()
         if roles[where[owner].role].reinitialised(where[owner])],
    )


def param_groups(model: nn.Module, plan: Union[Plan, Resolved]) -> list[dict[str, Any]]:
    """The parameter groups of a Plan for `timm.optim.create_optimizer_v2` or any torch optimiser.

    One group for each distinct (role, LR, decay), in the order of the model. Besides `params`, `lr` and `weight_decay`,
    a group carries `l2sp_alpha` (for `L2SP`, which `create_optimizer` attaches), `role`, `start_epoch`, `schedule` (the
    role's differences from the Plan's) and `param_names`. Parameters that start to train at a later epoch are in the
    groups from the beginning, so that unfreezing needs no new optimiser: without a gradient an optimiser passes them
    over. Parameters that never train are in none.

    Args:
        model: Any timm model, or a composite with `tuning_roles`. Its `requires_grad` flags play no part.
        plan: How to fine-tune it.

    Returns:
        Parameter groups, none of them empty.
    """
    params, groups = dict(model.named_parameters()), {}
    for name, setting in resolve(model, plan).parameters.items():
        if not setting.trains:
            continue
        own = dict(
            lr=setting.lr, weight_decay=setting.weight_decay, l2sp_alpha=setting.l2sp_alpha, role=setting.place.role)
        group = groups.setdefault(tuple(own.values()), dict(
            own, start_epoch=setting.start_epoch, schedule=setting.schedule, params=[], param_names=[]))
        group['params'].append(params[name])
        group['param_names'].append(name)
    if not groups:
        raise UserError('plan: nothing trains; set train to "all" or to a list of blocks for at least one role')
    return list(groups.values())


def _setting(
        name: str, param: nn.Parameter, place: Place, role: RoleSettings, plan: Plan, exempt, of_norm: bool) -> Setting:
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
        trains=trains and not (settings.freeze_bn and of_norm),
        start_epoch=settings.start_epoch,
        lr=settings.lr * scale,
        weight_decay=settings.weight_decay if decays and not role.pulled(place) else 0.,
        l2sp_alpha=settings.l2sp_alpha if role.pulled(place) and (decays or settings.l2sp_1d) else 0.,
        schedule=settings.schedule,
    )


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


def _roles(model: nn.Module, plan: Plan, role_of: dict[str, str]) -> dict[str, RoleSettings]:
    """The Plan's word on each role of the model; `role_of` names the role of each parameter."""
    paths = model_roles(model)
    kinds = [*paths, *dict.fromkeys(n.split('.')[0] for n in paths)]
    for key in plan.roles:
        if key not in kinds:
            raise UserError(f'plan: {type(model).__name__} has no role {key!r} (it has {", ".join(paths)})'
                            f'{nearest(key, kinds)}')
    roles = {}
    for name in paths:
        role, blocks = plan.role(name, role_defaults(model)), role_blocks(model, name)
        _check_counts(name, role, len(blocks))
        owned = [n for n, owner in role_of.items() if owner == name]
        roles[name] = RoleSettings(role, blocks, _training(name, role, blocks, owned, paths[name]))
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
        name: str, role: RolePlan, blocks: list[str], owned: list[str], paths: list[str]) -> Optional[frozenset[str]]:
    """What trains of a role, see `RoleSettings.training`; `owned` are its parameters, `paths` what it covers."""
    if role.train == 'random':
        if not blocks:
            raise UserError(f'plan: {name} has no blocks to draw from; set its train to "all" or "none"')
        number = max(1, math.floor(role.train_share * len(blocks) + 0.5))
        # A generator whose numbers NumPy keeps the same for good: a resumed run draws the same blocks.
        drawn = np.random.RandomState(role.train_seed).permutation(len(blocks))[:number]
        return frozenset([*(blocks[i] for i in drawn), 'tail'])
    if isinstance(role.train, str):
        return None if role.train == 'all' else frozenset()
    tops = [path for path in paths if path]
    # Modules and parameters of the role, none of them above the role itself.
    known = dict.fromkeys(
        path for n in owned for path in ancestors(n) if path and not any(t.startswith(f'{path}.') for t in tops))
    training = set()
    for item in role.train:
        if isinstance(item, int):
            if not -len(blocks) <= item < len(blocks):
                raise UserError(f'plan: {name} has {len(blocks)} blocks, so train: [{item}] is out of range')
            training.add(blocks[item])
            continue
        # Within the role or by the full path; a block goes before a layer.
        found = [b for b in blocks if b == item] or [b for b in blocks if b.endswith(f'.{item}')]
        if item in ('stem', 'tail'):
            found = [item]
        elif len(found) != 1:
            found = [path for path in dict.fromkeys([item, *(f'{top}.{item}' for top in tops)]) if path in known]
        if len(found) > 1:
            raise UserError(f'plan: {name} has several modules {item!r}; name one of {", ".join(found)}')
        if not found:
            within = [path[len(top) + 1:] for path in known for top in tops if path.startswith(f'{top}.')]
            near = nearest(item, [*blocks, *known, *within], '; see timm_amf.list_blocks(model)')
            raise UserError(f'plan: {name} has no block or layer {item!r}{near}')
        training.add(found[0])
    return frozenset(training)
