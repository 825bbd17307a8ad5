"""Layers that do not train, and keep less for the backward pass than PyTorch has them keep.

PyTorch keeps the inputs of a convolution and of a batch norm whatever trains, though only the gradients of their own
parameters need them. Folding the norms into the convolutions would save as much, but scales every weight in every step,
which is a quarter of a step in small batches (`docs/benchmarks.md`).
"""
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

__all__ = ['Frugal', 'frozen_conv2d']


class Frugal(TorchFunctionMode):
    """Within it, convolutions and batch norms with fixed statistics keep no input unless their parameters train."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.conv2d and not kwargs and _frozen(*args[1:3]):
            return frozen_conv2d(*args)
        if func is F.batch_norm and not kwargs['training'] and _frozen(kwargs['weight'], kwargs['bias']):
            return _frozen_norm(*args, kwargs['weight'], kwargs['bias'], kwargs['eps'])
        return func(*args, **kwargs)


def _frozen(*params) -> bool:
    return not any(p is not None and p.requires_grad for p in params)


def frozen_conv2d(x: Tensor, weight: Tensor, *args) -> Tensor:
    """`F.conv2d` that does not keep its input, of which the gradient of the input needs the shape alone."""
    # An activation that keeps its output, as a ReLU does, keeps it whatever is done here.
    if not x.requires_grad or hasattr(type(x.grad_fn), '_saved_result'):
        return F.conv2d(x, weight, *args)

    def pack(t: Tensor):
        # Told by its shape, since autocast puts another tensor in its place.
        if t.shape != x.shape or t.shape == weight.shape:
            return t
        return partial(t.new_empty(0).new_empty_strided, t.shape, t.stride())

    with saved_tensors_hooks(pack, lambda kept: kept if isinstance(kept, Tensor) else kept()):
        return F.conv2d(x, weight, *args)


def _frozen_norm(
        x: Tensor, mean: Tensor, var: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> Tensor:
    """A batch norm with fixed statistics as one multiply-add, of which autograd keeps the factor alone."""
    scale = (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt_()
    if weight is not None:
        scale.mul_(weight)
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    shape = -1, *[1] * (x.ndim - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)
