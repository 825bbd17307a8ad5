"""The last blocks of a network drawn anew, as its architecture's constructor draws them.

The network is built a second time without weights, and what the Plan re-initialises is copied from there: parameters
and buffers, batch-norm statistics among them. Resetting module by module would not do: what an architecture initialises
by position (the last norm of a residual branch at zero, layer scales, a depth-dependent standard deviation) is in its
constructor and nowhere else.
"""
import itertools
from collections.abc import Callable
from typing import Optional, Union

import timm
import torch
from torch import Tensor, nn

from timm_amf.errors import UserError
from timm_amf.tuning.plan import Plan
from timm_amf.tuning.resolve import Resolved, resolve

__all__ = ['reinit']


def reinit(
        model: nn.Module,
        plan: Union[Plan, Resolved],
        seed: int = 0,
        fresh: Optional[Callable[[], nn.Module]] = None,
) -> list[str]:
    """Re-initialise what the Plan says, in place.

    Call it after pretrained weights were loaded and before `create_optimizer`, which takes the starting point of L2-SP;
    not when resuming.

    Args:
        model: The model, not wrapped, on any device.
        plan: How it is fine-tuned.
        seed: What the new weights follow from; torch's random state on the CPU is afterwards as it was.
        fresh: Builds the same model without pretrained weights, on the CPU. Without it, timm builds the architecture
            that the model's `pretrained_cfg` names, with its default arguments.

    Returns:
        Names of the parameters and buffers that were re-initialised.
    """
    names = resolve(model, plan).reinitialised
    if not names:
        return names
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        source = _tensors(_build(model) if fresh is None else fresh())
    target = _tensors(model)
    unlike = next((n for n in names if n not in source or source[n].shape != target[n].shape), None)
    if unlike is not None:
        raise _no_twin(model, f'cannot be built anew: the new one has no {unlike} of shape '
                       f'{tuple(target[unlike].shape)}')
    with torch.no_grad():
        for name in names:
            target[name].copy_(source[name])
    return names


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def _build(model: nn.Module) -> nn.Module:
    name = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', '')
    if not timm.is_model(name):
        raise _no_twin(model, 'is not of an architecture that timm can build anew')
    return timm.create_model(name, pretrained=False, num_classes=getattr(model, 'num_classes', 0))


def _no_twin(model: nn.Module, why: str) -> UserError:
    return UserError(f'reinit_blocks: {type(model).__name__} {why}; pass a function that builds this model without '
                     'weights (fresh=...)')
