"""Batch norms folded into the convolutions before them, on a view that shares the weights.

In evaluation mode a batch norm is one multiplication and one addition a channel, which the convolution before it can
do: w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta. A view of a module computes that way and
leaves the module itself as it is: there is one set of parameters, in one state dict. Where gradients are wanted the
fold is part of the graph, so weights and affine parameters get the gradients that they have without it, and the norm's
input need not be kept. Else the folded weights are kept until one of their sources changes.
"""
import copy
from collections.abc import Sequence

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['FoldedConv', 'find_pairs', 'folded_view', 'norms_fixed']

# Not their other subclasses: those change the weight before they use it (weight standardisation, say).
_CONVS = (nn.Conv2d, Conv2dSame)


class FoldedConv(nn.Module):
    """A convolution with the norm behind it, as one convolution."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        # In tuples, so that they are not registered here: they belong to the module that this is a view of.
        self._sources = (conv, norm)
        runner = copy.copy(conv)
        runner.__dict__['_parameters'] = {}
        self._runner = (runner,)
        self._key: tuple = ()
        self._kept: tuple[Tensor, Tensor] = ()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; part of the graph where one of their sources wants a gradient."""
        conv, norm = self._sources
        sources = [
            t for t in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
            if t is not None
        ]
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        kept = not any(t.is_inference() for t in sources)
        key = tuple((t.data_ptr(), t._version, t.dtype, t.stride()) for t in sources) if kept else ()
        if kept and key == self._key and not wants_grad:
            return self._kept
        with torch.autocast(conv.weight.device.type, enabled=False):
            weight, bias = _fold(conv, norm)
        if kept:
            self._key, self._kept = key, (weight.detach(), bias.detach())
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        runner = self._runner[0]
        runner.__dict__['weight'], runner.__dict__['bias'] = self.folded()
        try:
            return runner.forward(x)
        finally:
            runner.__dict__['weight'] = runner.__dict__['bias'] = None  # lets go of the graph


def _fold(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    bias = -mean * scale
    if norm.bias is not None:
        bias = bias + norm.bias
    weight = conv.weight * scale.to(conv.weight.dtype).view(-1, 1, 1, 1)
    return weight, bias.to(weight.dtype)


def norms_fixed(norms: Sequence[nn.Module]) -> bool:
    """Whether each norm computes with its running statistics."""
    return not any(n.training for n in norms)


def folded_view(module: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """A module that computes as `module` does with its norms in evaluation mode, from the same parameters.

    Args:
        module: What to view; its children that need no change are shared.
        pairs: Names within it of convolutions and the norms behind them.
    """
    replaced = {}
    for conv_name, norm_name in pairs:
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        replaced[conv_name] = FoldedConv(conv, norm)
        # timm's norms may carry their activation.
        rest = [m for m in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if m is not None]
        replaced[norm_name] = nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
    return _clone(module, '', replaced)


def _clone(module: nn.Module, path: str, replaced: dict[str, nn.Module]) -> nn.Module:
    if path in replaced:
        return replaced[path]
    prefix = f'{path}.' if path else ''
    if not any(name.startswith(prefix) for name in replaced):
        return module
    clone = copy.copy(module)  # shares the dicts of parameters and buffers
    clone.__dict__['_modules'] = {
        name: child if child is None else _clone(child, prefix + name, replaced)
        for name, child in module._modules.items()
    }
    return clone


class find_pairs:  # noqa: N801  used as a context, as torch's are
    """Watches one forward pass with gradients, and says which norm directly follows which convolution.

    A pair is folded only if nothing else reads the convolution's output, which the graph tells.

    Args:
        model: The model that is about to run.
    """

    def __init__(self, model: nn.Module):
        self._names = {id(m): n for n, m in model.named_modules()}
        self._convs = [m for m in model.modules() if type(m) in _CONVS]
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}
        self._found: list[tuple[nn.Module, nn.Module, object]] = []
        self._calls: dict[int, int] = {}
        self._hooks: list = []

    def __enter__(self) -> 'find_pairs':
        for conv in self._convs:
            self._hooks.append(conv.register_forward_hook(self._after_conv))
        for norm in self._norms:
            self._hooks.append(norm.register_forward_pre_hook(self._before_norm))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _after_conv(self, conv, inputs, output) -> None:
        self._calls[id(conv)] = self._calls.get(id(conv), 0) + 1
        self._outputs[id(output)] = conv, output  # kept alive, so that ids stay unique

    def _before_norm(self, norm, inputs) -> None:
        self._calls[id(norm)] = self._calls.get(id(norm), 0) + 1
        conv, output = self._outputs.get(id(inputs[0]), (None, None))
        if conv is not None and output.grad_fn is not None:
            self._found.append((conv, norm, output.grad_fn))

    def pairs(self, result: Tensor) -> list[tuple[str, str]]:
        """The pairs by name, given what the forward pass came to."""
        readers = _count_readers(result)
        return [
            (self._names[id(conv)], self._names[id(norm)]) for conv, norm, node in self._found
            if self._calls[id(conv)] == self._calls[id(norm)] == 1 and readers.get(node) == 1
        ]


def _count_readers(result: Tensor) -> dict[object, int]:
    """For every node of the graph behind a result, how many others read it."""
    counts: dict[object, int] = {}
    seen, stack = set(), [result.grad_fn] if result.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            if source is not None:
                counts[source] = counts.get(source, 0) + 1
                stack.append(source)
    return counts
