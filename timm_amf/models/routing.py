"""Routed evaluation: branches run only on the images for which they count.

An approximation: a branch whose weight for an image is below `eps` is left out for it, as if its weight were zero. The
branch with the largest weight always runs, so that `eps` = 1 keeps exactly one branch an image. The cost follows the
number of branches run; `routing_error` tells what it does to the logits.
"""
import torch
from torch import Tensor, nn

__all__ = ['eager', 'is_channels_last', 'kept_branches', 'routing_error', 'take']


def eager(x: Tensor) -> bool:
    """Whether Python runs here for every batch: a trace or a graph would freeze what depends on the values."""
    graph = torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy)
    return not (graph or x.is_meta)


def is_channels_last(x: Tensor) -> bool:
    """Whether the memory format of images or maps is channels_last and no other."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] in the memory format of x; in channels_last plain indexing is slower."""
    if is_channels_last(x):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


def kept_branches(weights: Tensor, eps: float) -> Tensor:
    """Which branch runs for which image, a boolean (B, n) for weights (B, n)."""
    return (weights >= eps) | (weights == weights.amax(dim=1, keepdim=True))


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
