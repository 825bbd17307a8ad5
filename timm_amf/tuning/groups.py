"""Plan x model -> the parameter groups of an optimiser."""
import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from timm.optim._param_groups import _matches_pattern
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.errors import UserError
from timm_amf.models.blocks import is_within
from timm_amf.text import columns
from timm_amf.tuning.l2sp import L2SP
from timm_amf.tuning.plan import Plan, RolePlan
from timm_amf.tuning.roles import Place, model_roles, places, role_blocks, role_defaults

__all__ = [
    'RoleSettings', 'Setting', 'checked_roles', 'create_optimizer', 'describe_depths', 'describe_groups',
    'optimizer_of', 'param_groups', 'running_norms', 'settings',
]


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
    """
    place: Place
    trains: bool
    start_epoch: int
    lr: float
    weight_decay: float
    l2sp_alpha: float


def settings(model: nn.Module, plan: Plan) -> dict[str, Setting]:
    """What the Plan says of each parameter of the model, by name.

    Raises:
        UserError: If the Plan names a role or a block that the model has not, or more blocks than it has.
    """
    roles = checked_roles(model, plan)
    exempt = getattr(model, 'no_weight_decay', lambda: ())()
    of_norms = {f'{n}.{p}' for n, m in running_norms(model).items() for p, _ in m.named_parameters(recurse=False)}
    where = places(model)
    result = {}
    for name, param in model.named_parameters():
        role = roles[where[name].role]
        setting = _setting(name, param, where[name], role, plan, exempt)
        fixed = role.plan.freeze_bn and name in of_norms
        result[name] = dataclasses.replace(setting, trains=False) if fixed else setting
    return result


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


def checked_roles(model: nn.Module, plan: Plan) -> dict[str, RoleSettings]:
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
    trains = role.trained(name, place)
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
    )


def param_groups(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
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

    Raises:
        UserError: If the Plan does not fit the model, or leaves nothing to train.
    """
    params = dict(model.named_parameters())
    groups: dict[tuple, dict[str, Any]] = {}
    for name, setting in settings(model, plan).items():
        if not setting.trains:
            continue
        key = (setting.place.role, setting.lr, setting.weight_decay, setting.l2sp_alpha)
        group = groups.setdefault(key, dict(
            params=[],
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            l2sp_alpha=setting.l2sp_alpha,
            role=setting.place.role,
            start_epoch=setting.start_epoch,
            schedule=plan.role(setting.place.role, role_defaults(model)).schedule,
            param_names=[],
        ))
        group['params'].append(params[name])
        group['param_names'].append(name)
    if not groups:
        raise UserError('plan: nothing trains; set train to "all" or to a list of blocks for at least one role')
    return list(groups.values())


def create_optimizer(model: nn.Module, plan: Plan, **kwargs) -> torch.optim.Optimizer:
    """The Plan's optimiser over the Plan's parameter groups, made by timm's factory.

    Where the Plan asks for L2-SP, the weights that the model has now are the starting point, and the `L2SP` that pulls
    towards it is `optimizer.l2sp` (None otherwise).

    Raises:
        UserError: If the Plan does not fit the model, or the optimiser refuses its arguments.
    """
    return optimizer_of(param_groups(model, plan), plan, **kwargs)


def optimizer_of(groups: list[dict[str, Any]], plan: Plan, **kwargs) -> torch.optim.Optimizer:
    """As `create_optimizer`, over groups that `param_groups` made, or such as it makes."""
    from timm.optim import create_optimizer_v2

    kwargs = {**plan.opt_kwargs, **kwargs}
    if plan.opt_eps is not None:
        kwargs['eps'] = plan.opt_eps
    if plan.opt_betas is not None:
        kwargs['betas'] = tuple(plan.opt_betas)
    try:
        optimizer = create_optimizer_v2(
            groups, opt=plan.opt, lr=plan.lr, weight_decay=plan.weight_decay, momentum=plan.momentum, **kwargs)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f'optimiser {plan.opt!r} cannot be made: {" ".join(str(e).split())}') from None
    optimizer.l2sp = L2SP(optimizer) if any(group['l2sp_alpha'] for group in groups) else None
    return optimizer


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A table of parameter groups, a line each: role, LR, weight decay, L2-SP, first epoch, tensors, parameters."""
    rows = [('role', 'lr', 'weight_decay', 'l2sp_alpha', 'from epoch', 'tensors', 'parameters')]
    for group in groups:
        rows.append((
            group['role'], f'{group.get("initial_lr", group["lr"]):g}', f'{group["weight_decay"]:g}',
            f'{group["l2sp_alpha"]:g}', str(group['start_epoch']), str(len(group['params'])),
            f'{sum(p.numel() for p in group["params"]):,}',
        ))
    return columns(rows)


def describe_depths(model: nn.Module, plan: Plan) -> str:
    """What the Plan does to single blocks, lines on those drawn at random, re-initialised, pulled to their start.

    Empty where it treats all blocks of a role alike.
    """
    lines = []
    for name, role in checked_roles(model, plan).items():
        if role.plan.train == 'random':
            drawn = [block for block in role.blocks if block in role.training]
            lines.append(
                f'{name}: {len(drawn)} of {len(role.blocks)} blocks train, drawn with seed {role.plan.train_seed}: '
                f'{", ".join(drawn)}')
        if role.plan.reinit_blocks:
            lines.append(f'{name}: re-initialised: {", ".join(role.blocks[role.transferred:])}, and what follows')
        if role.plan.l2sp_alpha:
            count = role.plan.l2sp_blocks if isinstance(role.plan.l2sp_blocks, int) else role.transferred
            lines.append(
                f'{name}: L2-SP with alpha {role.plan.l2sp_alpha:g} on the first {count} of {len(role.blocks)} blocks')
    return ''.join(f'{line}\n' for line in lines)
