"""Routed evaluation: branches run only on the images for which they count.

An approximation: a branch whose weight for an image is below `eps` is left out for it, as if its weight were zero. The
branch with the largest weight always runs, so that `eps` = 1 keeps exactly one branch an image. The cost follows the
number of branches run; `routing_error` tells what it does to the logits.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ['kept_branches', 'may_route', 'routing_error', 'run_kept_branches']


def may_route(model: nn.Module, x: Tensor) -> bool:
    """Only in eager evaluation: what is routed depends on the values, which a trace or graph would freeze."""
    graph = torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy)
    return not (model.training or graph)


def kept_branches(weights: Tensor, eps: float) -> Tensor:
    """Which branch runs for which image, a boolean (B, n) for weights (B, n)."""
    return (weights >= eps) | (weights == weights.amax(dim=1, keepdim=True))


def run_kept_branches(
        x: Tensor,
        kept: Tensor,
        branches: list[Callable[[Tensor], Tensor]],
        widths: list[int],
) -> list[Tensor]:
    """Pooled features (B, width) of each branch, zero for the images for which it is left out.

    Args:
        x: Images (B, C, H, W).
        kept: Which branch runs for which image, (B, n).
        branches: Images -> pooled features (B, width), one a branch.
        widths: Their widths.
    """
    counts = kept.sum(dim=0).tolist()  # the one point at which the host waits for the device
    pooled = []
    for i, (branch, width) in enumerate(zip(branches, widths, strict=True)):
        if counts[i] == len(x):
            pooled.append(branch(x))
        elif counts[i] == 0:
            pooled.append(x.new_zeros(len(x), width))
        else:
            index = kept[:, i].nonzero().squeeze(1)
            m = branch(_take(x, index))
            pooled.append(m.new_zeros(len(x), width).index_copy(0, index, m))
    return pooled


def _take(x: Tensor, index: Tensor) -> Tensor:
    taken = x[index]
    if x.is_contiguous(memory_format=torch.channels_last):
        taken = taken.contiguous(memory_format=torch.channels_last)
    return taken


@torch.no_grad()
def routing_error(model: nn.Module, x: Tensor) -> dict[str, float]:
    """What routing changes for a batch, against all branches.

    Args:
        model: An AMF in evaluation mode, with `set_routing(eps)`.
        x: Images (B, C, H, W).

    Returns:
        `max_abs` and `mean_abs`, the differences of the logits; `top1_agreement`, the share of images with the same
        prediction; `branches_run`, the share of (image, branch) pairs that were computed.
    """
    eps = model.routing_eps
    routed = model(x)
    kept = kept_branches(model.forward_policy(x), eps)
    model.set_routing(None)
    try:
        dense = model(x)
    finally:
        model.set_routing(eps)
    difference = (routed - dense).abs().float()
    return dict(
        max_abs=difference.max().item(),
        mean_abs=difference.mean().item(),
        top1_agreement=(routed.argmax(1) == dense.argmax(1)).float().mean().item(),
        branches_run=kept.float().mean().item(),
    )
