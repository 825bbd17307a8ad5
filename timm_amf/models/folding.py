"""Batch norms folded into the convolutions before them, on a view that shares the weights.

In evaluation mode a batch norm is one multiplication and one addition a channel, which the convolution before it can
do: w' = w * g / sqrt(var + eps), b' = (b - mean) * g / sqrt(var + eps) + beta. A view of a module computes that way and
leaves the module itself as it is: there is one set of parameters, in one state dict. Where gradients are wanted the
fold is part of the graph, so weights and affine parameters get the gradients that they have without it, and the norm's
input need not be kept. Else the folded weights are kept until one of their sources changes.
"""
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, SplitBatchNorm2d, SyncBatchNormAct, pad_same
from torch import Tensor, nn

__all__ = ['FoldedConv', 'Folds', 'find_pairs', 'foldable_pairs', 'folded_view', 'norms_fixed', 'view_with']

# Not their other subclasses: those change the weight before they use it (weight standardisation, say).
_CONVS = (nn.Conv2d, Conv2dSame)
# Nor subclasses that are not known to compute as a batch norm does in evaluation mode.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, SplitBatchNorm2d)


class FoldedConv(nn.Module):
    """A convolution with the norm behind it, as one convolution."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        # In a tuple, so that they are not registered here: they belong to the module that this is a view of.
        self._sources = (conv, norm)
        self._key: tuple = ()
        self._kept: tuple[Tensor, Tensor] = ()

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self._sources
        if isinstance(conv, Conv2dSame):
            x = pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
        geometry = conv.stride, (0, 0) if isinstance(conv, Conv2dSame) else conv.padding, conv.dilation, conv.groups
        sources = [
            t for t in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
            if t is not None
        ]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
            weight, bias = self._folded(sources)
            if torch.is_grad_enabled() and x.requires_grad and not torch.is_autocast_enabled(x.device.type):
                return _ScaledConv.apply(x, weight, None, bias, *geometry)
            return F.conv2d(x, weight, bias, *geometry)
        scale, bias = _scale_and_bias(conv, norm)
        if torch.is_autocast_enabled(x.device.type):  # which casts what its own operations see
            return F.conv2d(x, _scaled(conv.weight, scale), bias, *geometry)
        return _ScaledConv.apply(x, conv.weight, scale, bias, *geometry)

    def _folded(self, sources: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias, without a graph, kept until one of their sources changes."""
        conv, norm = self._sources
        countable = not any(t.is_inference() for t in sources)
        key = tuple((t.data_ptr(), t._version, t.dtype, t.stride()) for t in sources) if countable else ()
        if not (countable and key == self._key):
            with torch.no_grad(), torch.autocast(conv.weight.device.type, enabled=False):
                scale, bias = _scale_and_bias(conv, norm)
                self._key, self._kept = key, (_scaled(conv.weight, scale), bias)
        return self._kept


def _scale_and_bias(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What to multiply the weight with, one value an output channel, and the bias; in the type of the weight."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    bias = -mean * scale if norm.bias is None else norm.bias - mean * scale
    return scale.to(conv.weight.dtype), bias.to(conv.weight.dtype)


class _ScaledConv(torch.autograd.Function):
    """A convolution with a scaled weight, which the backward pass computes again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, stride, padding, dilation, groups):
        of_weight = any(ctx.needs_input_grad[1:3])
        # The gradient of the input needs of the input its shape alone, which a tensor without memory has as well.
        ctx.save_for_backward(x if of_weight else x.new_empty(1).expand(x.shape), weight, scale)
        ctx.geometry = stride, padding, dilation, groups
        return F.conv2d(x, _scaled(weight, scale), bias, *ctx.geometry)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        of_x, of_weight, of_scale, of_bias = ctx.needs_input_grad[:4]
        stride, padding, dilation, groups = ctx.geometry
        g_x, g_scaled, g_bias = torch.ops.aten.convolution_backward(
            grad, x, _scaled(weight, scale), [len(weight)], stride, padding, dilation, False, [0, 0],
            groups, [of_x, of_weight or of_scale, of_bias])
        return (
            g_x if of_x else None,
            _scaled(g_scaled, scale) if of_weight else None,
            (g_scaled * weight).sum((1, 2, 3)) if of_scale else None,
            g_bias,
            None, None, None, None,
        )


def _scaled(weight: Tensor, scale: Optional[Tensor]) -> Tensor:
    return weight if scale is None else weight * scale.view(-1, 1, 1, 1)


def norms_fixed(norms: Sequence[nn.Module]) -> bool:
    """Whether each norm computes with its running statistics."""
    return not any(n.training or n.running_var is None for n in norms)


def foldable_pairs(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs of convolution and norm that a module still has as they were found.

    Either may have been removed since, replaced, parametrised, or given a hook that a view would not call.
    """
    modules = dict(module.named_modules())
    return [(c, n) for c, n in pairs if _is_conv(modules.get(c)) and _is_norm(modules.get(n))]


def _is_conv(module: Optional[nn.Module]) -> bool:
    zeros = type(module) in _CONVS and module.padding_mode == 'zeros' and not isinstance(module.padding, str)
    return zeros and not _hooked(module)


def _is_norm(module: Optional[nn.Module]) -> bool:
    return type(module) in _NORMS and module.running_var is not None and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def folded_view(module: nn.Module, pairs: Sequence[tuple[str, str]]) -> nn.Module:
    """A module that computes as `module` does with the norms of `pairs` in evaluation mode, on its parameters."""
    replaced: dict[str, nn.Module] = {}
    for conv_name, norm_name in pairs:
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        replaced[conv_name] = FoldedConv(conv, norm)
        # timm's norms may carry their activation.
        rest = [m for m in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if m is not None]
        replaced[norm_name] = nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
    return view_with(module, replaced)


class Folds:
    """The folded view of a module, kept until the module's mode changes or it is told to forget.

    Args:
        pairs: Names within the module of convolutions and the norms behind them.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = list(pairs)
        self._kept: Optional[tuple[nn.Module, list[nn.Module]]] = None

    def __getstate__(self):
        return {'pairs': self.pairs, '_kept': None}  # a copied module has its own

    def forget(self) -> None:
        """For whoever changes the module other than in its parameters and buffers."""
        self._kept = None

    def of(self, module: nn.Module) -> nn.Module:
        """The view; the module itself while one of its norms computes with the batch."""
        if self._kept is None or self._kept[0].training != module.training:
            pairs = foldable_pairs(module, self.pairs)
            self._kept = folded_view(module, pairs), [module.get_submodule(norm) for _, norm in pairs]
        view, norms = self._kept
        return view if norms_fixed(norms) else module


def view_with(module: nn.Module, replaced: Mapping[str, nn.Module], path: str = '') -> nn.Module:
    """A module that computes as `module` does with some of the modules below it replaced; `module` stays as it is.

    What is not replaced is shared, parameters and buffers included.

    Args:
        module: What to view.
        replaced: Replacements by path.
        path: Path of `module` in the names of these.
    """
    if path in replaced:
        return replaced[path]
    prefix = f'{path}.' if path else ''
    if not any(name.startswith(prefix) for name in replaced):
        return module
    clone = copy.copy(module)  # shares the dicts of parameters and buffers
    clone.__dict__['_modules'] = {
        name: child if child is None else view_with(child, replaced, prefix + name)
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
        self._convs = [m for m in model.modules() if _is_conv(m)]
        self._norms = [m for m in model.modules() if _is_norm(m)]
        self._outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
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
        self._outputs[id(output)] = conv, output, output._version  # kept alive, so that ids stay unique

    def _before_norm(self, norm, inputs) -> None:
        self._calls[id(norm)] = self._calls.get(id(norm), 0) + 1
        conv, output, version = self._outputs.get(id(inputs[0]), (None, None, 0))
        # Another version is another tensor, made by what worked in place on the convolution's output.
        if conv is not None and output.grad_fn is not None and output._version == version:
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
