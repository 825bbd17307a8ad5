"""Plan x model -> the parameter groups of an optimiser."""
import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Optional

import torch
from timm.optim._param_groups import _matches_pattern
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from timm_amf.errors import UserError
from timm_amf.tuning.plan import Plan, RolePlan
from timm_amf.tuning.roles import Place, model_roles, places, role_blocks, role_defaults

__all__ = ['Setting', 'create_optimizer', 'describe_groups', 'param_groups', 'running_norms', 'settings']


@dataclass(frozen=True)
class Setting:
    """What a Plan says of one parameter.

    Attributes:
        place: Role and depth of the parameter.
        trains: False if it never trains.
        start_epoch: Epoch from which it trains.
        lr: Its learning rate at the peak of its schedule.
        weight_decay: Its weight decay.
    """
    place: Place
    trains: bool
    start_epoch: int
    lr: float
    weight_decay: float


def settings(model: nn.Module, plan: Plan) -> dict[str, Setting]:
    """What the Plan says of each parameter of the model, by name.

    Raises:
        UserError: If the Plan names a role or a block that the model has not, or more low blocks than it has.
    """
    roles = _checked_roles(model, plan)
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
class _Role:
    plan: RolePlan
    blocks: list[str]
    training: Optional[frozenset[str]]  # names of blocks, `stem`, `tail`; None: all of them


def _checked_roles(model, plan) -> dict[str, _Role]:
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
        if role.low_blocks > len(blocks):
            raise UserError(
                f'plan: low_blocks of {name} is {role.low_blocks}, but it has {len(blocks)} blocks; lower it')
        roles[name] = _Role(role, blocks, _training_blocks(name, role, blocks))
    return roles


def _training_blocks(name, role, blocks) -> Optional[frozenset[str]]:
    if role.train == 'all':
        return None
    if role.train == 'none':
        return frozenset()
    training = set()
    for item in role.train:
        if isinstance(item, int):
            if not -len(blocks) <= item < len(blocks):
                raise UserError(f'plan: {name} has {len(blocks)} blocks, so train: [{item}] is out of range')
            training.add(blocks[item])
        elif item in ('stem', 'tail'):
            training.add(item)
        else:
            # A block may be named within its role or by its full path.
            found = [b for b in blocks if b == item or b.endswith(f'.{item}')]
            if len(found) != 1:
                near = difflib.get_close_matches(item, blocks, 1)
                hint = f'; did you mean {near[0]!r}?' if near else '; see timm_amf.list_blocks(model)'
                raise UserError(f'plan: {name} has no block {item!r}{hint}')
            training.add(found[0])
    return frozenset(training)


def _setting(name: str, param: nn.Parameter, place: Place, role: _Role, plan: Plan, exempt) -> Setting:
    settings = role.plan
    scale = settings.low_lr_scale if place.depth < settings.low_blocks else 1.
    trains = role.training is None or place.block in role.training
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
        weight_decay=settings.weight_decay if decays else 0.,
    )


def param_groups(model: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """The parameter groups of a Plan for `timm.optim.create_optimizer_v2` or any torch optimiser.

    One group for each distinct (role, LR, weight decay), in the order of the model. Besides `params`, `lr` and
    `weight_decay`, a group carries `role`, `start_epoch`, `schedule` (the role's differences from the Plan's) and
    `param_names`. Parameters that start to train at a later epoch are in the groups from the beginning, so that
    unfreezing needs no new optimiser: without a gradient an optimiser passes them over. Parameters that never train are
    in none.

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
        key = (setting.place.role, setting.lr, setting.weight_decay)
        group = groups.setdefault(key, dict(
            params=[],
            lr=setting.lr,
            weight_decay=setting.weight_decay,
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

    Raises:
        UserError: If the Plan does not fit the model, or the optimiser refuses its arguments.
    """
    from timm.optim import create_optimizer_v2

    kwargs = {**plan.opt_kwargs, **kwargs}
    if plan.opt_eps is not None:
        kwargs['eps'] = plan.opt_eps
    if plan.opt_betas is not None:
        kwargs['betas'] = tuple(plan.opt_betas)
    groups = param_groups(model, plan)
    try:
        return create_optimizer_v2(
            groups, opt=plan.opt, lr=plan.lr, weight_decay=plan.weight_decay, momentum=plan.momentum, **kwargs)
    except (TypeError, ValueError, AssertionError) as e:
        raise UserError(f'optimiser {plan.opt!r} cannot be made: {" ".join(str(e).split())}') from None


def describe_groups(groups: list[dict[str, Any]]) -> str:
    """A table of parameter groups, a line each: role, LR, weight decay, first epoch, tensors, parameters."""
    rows = [('role', 'lr', 'weight_decay', 'from epoch', 'tensors', 'parameters')]
    for group in groups:
        rows.append((
            group['role'], f'{group.get("initial_lr", group["lr"]):g}', f'{group["weight_decay"]:g}',
            str(group['start_epoch']), str(len(group['params'])), f'{sum(p.numel() for p in group["params"]):,}',
        ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
