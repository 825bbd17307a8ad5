"""Layers that do not train and keep less for the backward pass than PyTorch has them keep.

PyTorch keeps the input of a convolution and of a batch norm whatever trains, though only the gradients of their
parameters need it. Folding the norms into the convolutions would save as much, for the price of a scaled copy of every
weight in every step, which in small batches is more than what the step computes (`docs/benchmarks.md`).
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

__all__ = ['Frugal', 'frozen_conv2d']


class Frugal(TorchFunctionMode):
    """Within it no input is kept of convolutions, and of batch norms with fixed statistics, that do not train."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.conv2d and not kwargs and not any(t is not None and t.requires_grad for t in args[1:3]):
            return frozen_conv2d(*args)
        if func is F.batch_norm and not kwargs.get('training', False):
            weight, bias = kwargs['weight'], kwargs['bias']
            if not any(t is not None and t.requires_grad for t in (weight, bias)):
                return _FrozenNorm.apply(*args, weight, bias, kwargs['eps'])
        return func(*args, **kwargs)


def frozen_conv2d(x: Tensor, weight: Tensor, *args) -> Tensor:
    """`F.conv2d` that does not keep its input: the gradient of the input needs its shape alone."""
    def pack(t: Tensor) -> Tensor:
        # By its shape, since autocast hands on another tensor.
        return t.new_empty(1).expand(t.shape) if t.shape == x.shape != weight.shape else t

    with saved_tensors_hooks(pack, lambda t: t):
        return F.conv2d(x, weight, *args)


class _FrozenNorm(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        var, weight = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt() * (1 if weight is None else weight)
        return (grad * scale.view(-1, *[1] * (grad.ndim - 2))).to(grad.dtype), None, None, None, None, None
