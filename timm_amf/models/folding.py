"""Batch norms folded into the convolutions before them, on a view that shares everything else.

In evaluation mode a batch norm is one multiplication and one addition a channel, which the convolution before it can
do. A view of a module computes that way and leaves the module itself as it is.
"""
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Optional

import torch
from timm.layers import BatchNormAct2d, Conv2dSame, SplitBatchNorm2d, SyncBatchNormAct, pad_same
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .frugal import frozen_conv2d

__all__ = ['FoldedConv', 'Folds', 'find_pairs', 'foldable_pairs', 'folded_view', 'view_with']

# Not their other subclasses: those change the weight before they use it (weight standardisation, say).
_CONVS = (nn.Conv2d, Conv2dSame)
# Nor subclasses that are not known to compute as a batch norm does in evaluation mode.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct, SplitBatchNorm2d)


class FoldedConv(nn.Module):
    """A convolution with the norm behind it, as one convolution of the weights that they have now."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        super().__init__()
        same = isinstance(conv, Conv2dSame)
        self._same = (conv.kernel_size, conv.stride, conv.dilation) if same else None
        self._geometry = conv.stride, (0, 0) if same else conv.padding, conv.dilation, conv.groups
        with torch.no_grad(), torch.autocast(conv.weight.device.type, enabled=False):
            fused = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        self.weight, self.bias = (p.detach() for p in fused)

    def forward(self, x: Tensor) -> Tensor:
        if self._same:
            x = pad_same(x, *self._same)
        return frozen_conv2d(x, self.weight, self.bias, *self._geometry)


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
    """A module that computes as `module` does now with the norms of `pairs` in evaluation mode."""
    replaced: dict[str, nn.Module] = {}
    for conv_name, norm_name in pairs:
        conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
        replaced[conv_name] = FoldedConv(conv, norm)
        # timm's norms may carry their activation.
        rest = [m for m in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if m is not None]
        replaced[norm_name] = nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
    return view_with(module, replaced)


class Folds:
    """The folded view of a module, made again when what it folds has changed.

    Args:
        pairs: Names within the module of convolutions and the norms behind them.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.pairs = list(pairs)
        self._key: tuple = ()
        self._view: Optional[nn.Module] = None

    def __getstate__(self):
        return {'pairs': self.pairs, '_key': (), '_view': None}  # a copied module has its own

    def of(self, module: nn.Module) -> nn.Module:
        """The view; the module itself while one of its norms computes with the batch, or what would fold trains."""
        pairs = foldable_pairs(module, self.pairs)
        folded = [module.get_submodule(name) for pair in pairs for name in pair]
        sources = [t for m in folded for t in (*m.parameters(), *m.buffers())]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if trains or any(norm.training for norm in folded[1::2]) or any(t.is_inference() for t in sources):
            return module
        key = module.training, *((t.data_ptr(), t._version) for t in sources)
        if self._view is None or key != self._key:
            self._key, self._view = key, folded_view(module, pairs)
        return self._view


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


@contextmanager
def find_pairs(model: nn.Module) -> Iterator[Callable[[Tensor], list[tuple[str, str]]]]:
    """Watch one forward pass with gradients, to say which norm directly follows which convolution.

    A pair is folded only if nothing else reads the convolution's output, which the graph tells.

    Args:
        model: The model that is about to run.

    Yields:
        From what the forward pass came to the pairs by name.
    """
    names = {m: n for n, m in model.named_modules()}
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    found: list[tuple[nn.Module, nn.Module, object]] = []
    calls: Counter[nn.Module] = Counter()

    def after_conv(conv, inputs, output) -> None:
        calls[conv] += 1
        outputs[id(output)] = conv, output, output._version  # kept alive, so that ids stay unique

    def before_norm(norm, inputs) -> None:
        calls[norm] += 1
        conv, output, version = outputs.get(id(inputs[0]), (None, None, 0))
        # Another version is another tensor, made by what worked in place on the convolution's output.
        if conv is not None and output.grad_fn is not None and output._version == version:
            found.append((conv, norm, output.grad_fn))

    def pairs(result: Tensor) -> list[tuple[str, str]]:
        readers = _count_readers(result)
        return [
            (names[conv], names[norm]) for conv, norm, node in found
            if calls[conv] == calls[norm] == 1 and readers.get(node) == 1]

    hooks = [m.register_forward_hook(after_conv) for m in names if _is_conv(m)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in names if _is_norm(m)]
    try:
        yield pairs
    finally:
        for hook in hooks:
            hook.remove()


def _count_readers(result: Tensor) -> dict[object, int]:
    """For every node of the graph behind a result, how many others read it."""
    counts: Counter[object] = Counter()
    seen, stack = set(), [result.grad_fn] if result.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            if source is not None:
                counts[source] += 1
                stack.append(source)
    return counts
