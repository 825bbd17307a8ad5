"""A block that exists twice, frozen and tuned, and the ways of computing a batch whose images choose differently.

- `both`: every image through both copies, then a mask (SpotTune, equation 2). What tracing and compiling use, and what
  the other ways are tested against.
- routed, evaluating: each image through its own copy only.
- routed, training: the images that chose a copy go through it with gradients, the others without, since the
  straight-through gradient of a choice is <gradient of the output, tuned - frozen> and needs both outputs, but the
  gradients of a copy's weights need only the images that chose it. Exact as long as an image's output does not depend
  on the other images of the batch. Where the tuned copy's batch norms are in training mode it does, and then the tuned
  copy runs on the whole batch.

The blocks between which a model's own code stands (a downsampling layer, a change of layout) see an ordinary batch in
its ordinary order, so that any architecture works.
"""
from contextlib import nullcontext
from typing import NamedTuple, Optional

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from .frugal import Frugal
from .routing import is_channels_last, take

__all__ = ['Decision', 'PartOfBlock', 'Route', 'RoutedBlock']

_LARGE = 2**14  # values of an input, below which its block keeps too little for `Frugal` to be worth its calls


class Split(NamedTuple):
    """Indices of the images that take each copy of one block, (B_f,) and (B_t,); None where there are none."""
    frozen: Optional[Tensor]
    tuned: Optional[Tensor]


class Decision:
    """What a policy decided for a batch.

    Args:
        shares: (B, blocks), exactly 0 for the frozen and 1 for the tuned copy; its gradient trains the policy.
        routed: Plan the splits of the batch on the host, for routed execution, with one wait for the device.
    """

    def __init__(self, shares: Tensor, routed: bool):
        self.shares = shares
        self.routed = routed
        self.splits: list[Split] = []
        if routed:
            tuned = shares.detach() > 0.5
            order = tuned.to(torch.uint8).argsort(dim=0, stable=True).T.contiguous()  # the frozen ones first
            for rows, count in zip(order, (~tuned).sum(0).tolist()):
                self.splits.append(Split(rows[:count] if count else None, rows[count:] if count < len(rows) else None))


class Route:
    """Where a model leaves its decision for its blocks, which its backbone's own code calls."""

    def __init__(self):
        self.decision: Optional[Decision] = None
        self.logits: Optional[Tensor] = None  # of the policy for the batch, None where the path is fixed

    def __getstate__(self):
        return {'decision': None, 'logits': None}  # a copied or stored model has decided nothing yet


class PartOfBlock(AttributeError):
    """A model's own code asks a routed block for something that only a plain one has, such as another `forward`."""


class RoutedBlock(nn.Module):
    """A block twice: `frozen`, as it came, and `tuned`, a copy that is trained."""

    def __init__(
            self,
            frozen: nn.Module,
            tuned: nn.Module,
            index: int,
            route: Route,
            frozen_bn: str = 'frozen',
    ):
        """
        Args:
            frozen: The pretrained block.
            tuned: A block of the same kind.
            index: Its column in a decision.
            route: Where decisions come from.
            frozen_bn: `frozen` keeps all of the frozen copy in evaluation mode; `official` lets its batch norms follow
                the model's mode, as the published code does.
        """
        super().__init__()
        self.frozen = frozen
        self.tuned = tuned
        self.index = index
        self.route = route
        self.frozen_bn = frozen_bn
        self.grad_checkpointing = False

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError as e:
            frozen = self._modules.get('frozen')
            if frozen is not None and hasattr(frozen, name):
                kind = type(frozen).__name__
                raise PartOfBlock(f'{kind}.{name} is of one copy: a routed block only runs as a whole') from e
            raise

    def train(self, mode: bool = True) -> 'RoutedBlock':
        super().train(mode)
        if self.frozen_bn == 'frozen':
            self.frozen.eval()
        return self

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        decision = self.route.decision
        if decision is None:
            raise RuntimeError('a routed block runs only within its model, which decides for it')
        if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_tracing():
            return checkpoint(self._run, x, decision, args, kwargs)
        return self._run(x, decision, args, kwargs)

    def _run(self, x: Tensor, decision: Decision, args: tuple, kwargs: dict) -> Tensor:
        if not decision.routed:
            return self._both(x, decision.shares[:, self.index], args, kwargs)
        split, share = decision.splits[self.index], decision.shares[:, self.index]
        if not (self.training and torch.is_grad_enabled()):
            return _exact_split(self.frozen, self.tuned, x, share.detach(), split, True, args, kwargs)
        out = _exact_split(self.frozen, self.tuned, x, share, split, _norms_fixed(self.tuned), args, kwargs)
        if split.tuned is None:
            # Gradients of zero, not none: `DistributedDataParallel` waits for every gradient, and an optimiser passes
            # over what has none, momentum included.
            out = out + 0 * sum(p.flatten()[0] for p in self.tuned.parameters() if p.requires_grad)
        return out

    def _both(self, x: Tensor, share: Tensor, args: tuple, kwargs: dict) -> Tensor:
        frozen, tuned = self.frozen(x, *args, **kwargs), self.tuned(x, *args, **kwargs)
        share = share.to(tuned.dtype).view((-1,) + (1,) * (tuned.ndim - 1))
        return share * tuned + (1 - share) * frozen

    def exact(self) -> bool:
        """Whether routed training gives the gradients of `both`: the frozen copy computes image by image, unchanged."""
        return _norms_fixed(self.frozen) and not any(p.requires_grad for p in self.frozen.parameters())


def _norms_fixed(block: nn.Module) -> bool:
    """Whether each norm of a block computes with its running statistics, image by image, whatever its class."""
    return not any(m.training or m.running_var is None for m in block.modules() if 'running_var' in m._buffers)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def _put(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The batch whose rows `index` are `part`, for each (index, part); without a graph."""
    last = is_channels_last(parts[0][1])
    if last:
        parts = [(index, part.permute(0, 2, 3, 1)) for index, part in parts]
    out = parts[0][1].new_empty((sum(len(index) for index, _ in parts), *parts[0][1].shape[1:]))
    for index, part in parts:
        out.index_copy_(0, index, part)
    return out.permute(0, 3, 1, 2) if last else out


def _exact_split(
        frozen: nn.Module,
        tuned: nn.Module,
        x: Tensor,
        share: Tensor,
        split: Split,
        independent: bool,
        args: tuple,
        kwargs: dict,
) -> Tensor:
    """The output of `both` and its gradients, each copy with gradients only for the images that chose it.

    A tuned copy that is not `independent`, image by image, runs on the whole batch.
    """
    x_frozen, x_tuned = _halves(x, split)
    with Frugal() if torch.is_grad_enabled() and x.numel() >= _LARGE else nullcontext():
        y_frozen = None if x_frozen is None else frozen(x_frozen, *args, **kwargs)
        if independent:
            y_tuned = None if x_tuned is None else tuned(x_tuned, *args, **kwargs)
        else:
            other_tuned, y_tuned = _halves(tuned(x, *args, **kwargs), split)
    if not share.requires_grad:
        return _join(None, y_frozen, y_tuned, None, None, split)
    with torch.no_grad():
        other_frozen = None if x_tuned is None else frozen(x_tuned, *args, **kwargs)
        if independent:
            other_tuned = None if x_frozen is None else tuned(x_frozen, *args, **kwargs)
    other_tuned = None if other_tuned is None else other_tuned.detach()
    return _join(share, y_frozen, y_tuned, other_frozen, other_tuned, split)


def _halves(x: Tensor, split: Split) -> tuple[Optional[Tensor], Optional[Tensor]]:
    if split.tuned is None:
        return x, None
    if split.frozen is None:
        return None, x
    return _Halve.apply(x, split.frozen, split.tuned)


class _Halve(torch.autograd.Function):
    """The two halves of a batch; the gradients are put together, where indexing twice would add two sparse ones."""

    @staticmethod
    def forward(ctx, x, frozen, tuned):
        ctx.halves = frozen, tuned
        ctx.format = _format(x)
        return take(x, frozen).data, take(x, tuned).data

    @staticmethod
    def backward(ctx, g_frozen, g_tuned):
        parts = [(i, g.contiguous(memory_format=ctx.format)) for i, g in zip(ctx.halves, (g_frozen, g_tuned))]
        return _put(parts), None, None


def _join(share, y_frozen, y_tuned, other_frozen, other_tuned, split: Split) -> Tensor:
    if share is None and (y_frozen is None or y_tuned is None):
        return y_tuned if y_frozen is None else y_frozen
    dtype = next(y for y in (y_tuned, other_tuned, y_frozen) if y is not None).dtype
    ys = [None if y is None else y.to(dtype) for y in (y_frozen, y_tuned, other_frozen, other_tuned)]
    return _Join.apply(share, *ys, split.frozen, split.tuned)


class _Join(torch.autograd.Function):
    """Puts the two halves of a batch together, and gives a choice its gradient <g, tuned - frozen>.

    Of all the other outputs only their difference to the chosen ones is kept for the backward pass. Where all images
    agree nothing is copied. What is given is `data`, the same memory and no view, so that what follows may work in
    place on it wherever it could on the block's output itself.
    """

    @staticmethod
    def forward(ctx, share, y_frozen, y_tuned, other_frozen, other_tuned, frozen, tuned):
        ctx.halves = frozen, tuned
        ctx.format = _format(y_tuned if y_frozen is None else y_frozen)
        ctx.share_dtype = None if share is None else share.dtype
        if share is not None:
            ctx.save_for_backward(
                None if y_frozen is None else other_tuned - y_frozen,
                None if y_tuned is None else y_tuned - other_frozen,
            )
        if frozen is None or tuned is None:
            return (y_frozen if tuned is None else y_tuned).data
        return _put([(frozen, y_frozen), (tuned, y_tuned)]).data

    @staticmethod
    def backward(ctx, grad):
        frozen, tuned = ctx.halves
        # A gradient of another layout (that of a mean is) would pass it on to all that are added to it.
        grad = grad.contiguous(memory_format=ctx.format)
        g_frozen, g_tuned = _halves(grad, Split(frozen, tuned))  # no graph here: only the rows
        g_share = None
        if ctx.share_dtype is not None and ctx.needs_input_grad[0]:
            g_share = torch.empty(len(grad), dtype=ctx.share_dtype, device=grad.device)
            for g, difference, index in zip((g_frozen, g_tuned), ctx.saved_tensors, (frozen, tuned)):
                if g is not None:
                    g_share[index] = _dot(g, difference).to(g_share.dtype)
        return g_share, g_frozen, g_tuned, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row, summed in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(tuple(range(1, a.ndim)))
