"""Global-k: the losses that make a SpotTune tune the same k blocks for all images."""
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor

from .records import exact_device

__all__ = ['global_k_loss', 'update_shares']

# Below this share the entropy's slope is that of this share: at 0 it is infinite.
_LEAST_SHARE = 1e-3


@torch.no_grad()
def update_shares(running: Tensor, shares: Tensor, window: int) -> Tensor:
    """The fraction v_l of images that take the tuned copy of each block, over a window that runs along with training.

    The window is exponential: a batch of n images over all processes moves the fractions by n / window of the way to
    its own. So all that there is to restore are the fractions themselves.

    Args:
        running: Fractions (blocks,), changed in place; the same on every process.
        shares: Decisions (B, blocks) of this process's batch.
        window: Number of images.

    Returns:
        The fractions.
    """
    sums = shares.sum(0).to(exact_device(shares.device)).double()
    sums = torch.cat([sums, sums.new_full((1,), len(shares))])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    mean, count = (sums[:-1] / sums[-1]).to(running.dtype).to(running.device), sums[-1].item()
    return running.lerp_(mean, min(1., count / window))


def global_k_loss(shares: Tensor, k: int, weights: tuple[float, float], running: Optional[Tensor] = None) -> Tensor:
    """lambda_1 * l_k + lambda_2 * l_e (SpotTune, equations 5 to 7).

    The paper defines v_l over the whole data set. Its value is taken from a running window, its gradient is that of the
    batch, which has the same expectation: one batch's fractions are too noisy to square, and a window's gradient would
    be that of the few decisions in it that can still be changed.

    Args:
        shares: Decisions (B, blocks), with the gradient that trains the policy.
        k: Number of blocks to tune.
        weights: lambda_1 and lambda_2.
        running: Fractions (blocks,) of the running window; None takes the batch's own.
    """
    v = shares.mean(0)
    if running is not None:
        v = running.detach().to(v.dtype) + (v - v.detach())
    size = (v.sum() - k).square()
    # Equation 6 is 0 at 0 and at 1, with a slope that has no limit at 0.
    held = v.detach().clamp(min=_LEAST_SHARE)
    slope = -(held.log() + 1)
    entropy = -torch.special.xlogy(v.detach(), v.detach()) + slope * (v - v.detach())
    return weights[0] * size + weights[1] * entropy.sum()
