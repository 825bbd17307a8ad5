"""The optimiser of a resolved Plan, and its parameter groups in words."""
from typing import Any, Union

import torch
from torch import nn

from timm_amf.errors import UserError
from timm_amf.text import columns
from timm_amf.tuning.l2sp import L2SP
from timm_amf.tuning.plan import Plan
from timm_amf.tuning.resolve import Resolved, param_groups, resolve

__all__ = ['create_optimizer', 'describe_depths', 'describe_groups', 'optimizer_of']


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
