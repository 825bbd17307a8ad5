"""Routed evaluation: branches run only on the images for which they count.

An approximation: a branch whose weight for an image is below `eps` is left out for it, as if its weight were zero. The
branch with the largest weight always runs, so that `eps` = 1 keeps exactly one branch an image. The cost follows the
number of branches run; `routing_error` tells what it does to the logits.
"""
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ['kept_branches', 'may_route', 'routed_fusion', 'routing_error']


def may_route(model: nn.Module, x: Tensor) -> bool:
    """Only in eager evaluation: what is routed depends on the values, which a trace or graph would freeze."""
    graph = torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy)
    return not (model.training or graph)


def kept_branches(weights: Tensor, eps: float) -> Tensor:
    """Which branch runs for which image, a boolean (B, n) for weights (B, n)."""
    return (weights >= eps) | (weights == weights.amax(dim=1, keepdim=True))


def routed_fusion(
        x: Tensor,
        weights: Tensor,
        eps: float,
        branches: list[Callable[[Tensor], Tensor]],
        widths: list[int],
) -> Tensor:
    """The concatenation (B, sum(widths)) of weighted pooled features, zero where a branch was left out.

    Args:
        x: Images (B, C, H, W).
        weights: (B, n).
        eps: Least weight with which a branch runs.
        branches: Images -> pooled features (B, width), one a branch.
        widths: Their widths.
    """
    kept = kept_branches(weights, eps)
    counts = kept.sum(dim=0).tolist()  # the one point at which the host waits for the device
    fused = []
    for i, (branch, width) in enumerate(zip(branches, widths, strict=True)):
        weight = weights[:, i:i + 1]
        if counts[i] == len(x):
            fused.append(branch(x) * weight)
        elif counts[i] == 0:
            fused.append(weight.new_zeros(len(x), width))
        else:
            index = kept[:, i].nonzero().squeeze(1)
            z = branch(_take(x, index)) * weight[index]
            fused.append(z.new_zeros(len(x), width).index_copy(0, index, z))
    return torch.cat(fused, dim=1)


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
