"""L2-SP: weight decay towards the starting point of fine-tuning instead of zero.

The penalty alpha / 2 * ||w - w_0||^2 of Li et al. ("Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", 2018) and of the non-binary transfer learning paper (section 4.5). It acts as weight decay does in the same
optimiser, right before its step, so after clipping and loss scaling: where that is coupled (SGD, Adam),
alpha * (w - w_0) joins the gradient; where it is decoupled (AdamW, SGDW), w moves by -lr * alpha * (w - w_0). There is
no graph and no term in the reported loss.
"""
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from timm_amf.errors import UserError

__all__ = ['L2SP', 'is_decoupled']

# What torch's and timm's optimisers call their choice, where they leave one.
_FLAGS = ('decoupled_weight_decay', 'decoupled_decay', 'decoupled')
# Lamb and NvNovoGrad, whatever they choose, decay after they normalised the gradient.
_DECOUPLED = (
    'AdamP', 'AdamWLegacy', 'Adafactor', 'AdafactorBigVision', 'Adahessian', 'Adan', 'LaProp', 'Lamb', 'Lion', 'Mars',
    'Muon', 'NAdamW', 'NvNovoGrad', 'RAdamLegacy', 'SGDP', 'SGDW',
)
_COUPLED = ('ASGD', 'Adadelta', 'Adagrad', 'Adam', 'Adamax', 'Lars', 'NAdam', 'NAdamLegacy', 'RMSprop', 'SGD')


def is_decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser of torch or timm decays weights beside its gradient step, as AdamW does."""
    optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # of timm's Lookahead
    group, name = optimizer.param_groups[0], type(optimizer).__name__
    if name in _DECOUPLED:
        return True
    for flag in _FLAGS:
        if flag in group:
            return bool(group[flag])
    if name in _COUPLED:
        return False
    raise UserError(f'l2sp_alpha: whether {name} decays as SGD or as AdamW does is not known; use sgd or adamw')


class L2SP:
    """Pulls the parameters of an optimiser's groups with `l2sp_alpha` above 0 towards where they were.

    It attaches itself to the optimiser, as a hook before each step. A parameter without a gradient at a step is passed
    over, as by the optimiser itself, and so is one that is frozen.

    Args:
        optimizer: Over the groups of `timm_amf.param_groups`. The weights that its parameters have at this moment are
            the starting point.

    Attributes:
        decoupled: Whether the pull is beside the gradient step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        # Groups are replaced when a state is loaded; their order and their parameters stay.
        self._optimizer = getattr(optimizer, '_base_optimizer', optimizer)
        self.decoupled = is_decoupled(self._optimizer)
        self._starts: dict[int, list[Tensor]] = {}
        self.take()
        self._optimizer.register_step_pre_hook(self._before_step)

    def take(self) -> None:
        """Make the present weights the starting point."""
        self._starts = {
            i: [p.detach().clone() for p in group['params']]
            for i, group in enumerate(self._optimizer.param_groups) if group.get('l2sp_alpha')
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The starting point, by names of parameters."""
        groups = self._optimizer.param_groups
        return {n: t for i, starts in self._starts.items() for n, t in zip(groups[i]['param_names'], starts)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the starting point."""
        own = self.state_dict()
        unlike = [n for n, t in own.items() if n not in state or state[n].shape != t.shape]
        if unlike:
            raise UserError(
                f'the saved starting point of L2-SP does not fit the Plan: it has no {unlike[0]} of this shape; '
                f'resume with the Plan of the run')
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Optional[tuple]:
        itself, closure = (*args, kwargs.get('closure'))[:2]
        if closure is None:
            return self._pull(optimizer)

        def closure_and_pull():  # Lightning computes the gradients within the step
            loss = closure()
            self._pull(optimizer)
            return loss

        return (itself, closure_and_pull), {}

    @torch.no_grad()
    def _pull(self, optimizer: torch.optim.Optimizer) -> None:
        # A scaler of fp16 leaves both to optimisers that unscale within their own kernel (`fused=True`).
        if getattr(optimizer, 'found_inf', None) is not None and float(optimizer.found_inf):
            return
        scale = getattr(optimizer, 'grad_scale', None)
        scale = 1. if scale is None else float(scale)
        for i, starts in self._starts.items():
            group = optimizer.param_groups[i]
            starts[:] = [s.to(p) for s, p in zip(starts, group['params'])]  # trainers move a model when they start
            for param, start in zip(group['params'], starts):
                if param.grad is None or not param.requires_grad:
                    continue
                if self.decoupled:
                    param.lerp_(start, float(group['lr']) * group['l2sp_alpha'])
                else:
                    param.grad.add_(param - start, alpha=scale * group['l2sp_alpha'])
