"""The parameter groups of a resolved Plan, and the optimiser over them."""
from typing import Any, Union

import torch
from torch import nn

from timm_amf.errors import UserError
from timm_amf.text import columns
from timm_amf.tuning.l2sp import L2SP
from timm_amf.tuning.plan import Plan
from timm_amf.tuning.resolve import Resolved, resolve

__all__ = ['create_optimizer', 'describe_depths', 'describe_groups', 'optimizer_of', 'param_groups']


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


def create_optimizer(model: nn.Module, plan: Union[Plan, Resolved], **kwargs) -> torch.optim.Optimizer:
    """The Plan's optimiser over the Plan's parameter groups, made by timm's factory.

    Where the Plan asks for L2-SP, the weights that the model has now are the starting point, and the `L2SP` that pulls
    towards it is `optimizer.l2sp` (None otherwise).
    """
    table = resolve(model, plan)
    return optimizer_of(param_groups(model, table), table.plan, **kwargs)


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
    heads = ('role', 'lr', 'weight_decay', 'l2sp_alpha', 'from epoch', 'tensors', 'parameters')
    return columns([heads, *(
        (g['role'], f'{g.get("initial_lr", g["lr"]):g}', f'{g["weight_decay"]:g}', f'{g["l2sp_alpha"]:g}',
         str(g['start_epoch']), str(len(g['params'])), f'{sum(p.numel() for p in g["params"]):,}') for g in groups)])


def describe_depths(model: nn.Module, plan: Union[Plan, Resolved]) -> str:
    """What the Plan does to single blocks, lines on those drawn at random, re-initialised, pulled to their start.

    Empty where it treats all blocks of a role alike.
    """
    lines = []
    for name, role in resolve(model, plan).roles.items():
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
