"""Policy networks: a small network that looks at an image and decides how it is computed.

AMF weighs branches by a softmax; SpotTune takes one of two paths in every block by straight-through Gumbel-softmax.
"""
from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import classifiers, layer_ids

__all__ = ['PolicyNetwork', 'gumbel_noise', 'straight_through']


class PolicyNetwork(nn.Module):
    """Any timm classifier, and a softmax over its logits (AMF, Section III-B).

    It sees the same image as the branches, at the same resolution, renormalised to the statistics it was trained with;
    `input_size` lets it look at a smaller copy, which is cheaper.
    """

    def __init__(self, net: nn.Module, renorm: Optional[nn.Module] = None, input_size: Optional[int] = None):
        """
        Args:
            net: Network whose logits, one a branch, become the weights.
            renorm: Takes the composite's input normalisation to the network's.
            input_size: Side in pixels to resize the policy's input to (bilinear, antialiased); None keeps it.
        """
        super().__init__()
        self.input_size = input_size
        self.renorm = renorm if renorm is not None else nn.Identity()
        self.net = net

    def forward_logits(self, x: Tensor) -> Tensor:
        """Logits (batch, n) of an input normalised as the composite says."""
        if self.input_size is not None:
            # The antialiased kernel exists in fp32 everywhere, in bf16 only on some devices.
            size = [self.input_size, self.input_size]
            x = F.interpolate(x.float(), size=size, mode='bilinear', antialias=True, align_corners=False).to(x.dtype)
        x = self.renorm(x)
        return self.net.forward_head(self.net.forward_features(x))

    def forward(self, x: Tensor) -> Tensor:
        """Weights (batch, n), not negative, that sum to one for each image."""
        return self.forward_logits(x).softmax(dim=-1)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layers of the network, under the names they have here."""
        ids, top = layer_ids(self.net, coarse)
        return lambda name: ids.get(name.removeprefix('net.'), top)

    @torch.jit.ignore
    def init_classifier(self) -> None:
        """Draw the classifier again, as PyTorch draws a linear layer, with a bias of zero.

        The weights then start near 1/n (AMF, Section IV-C4). Some architectures draw theirs so wide for a few classes
        that the softmax starts saturated, and a saturated policy does not learn.
        """
        for layer in classifiers(self.net):
            layer.reset_parameters()
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.net.get_classifier()


def gumbel_noise(logits: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
    """Standard Gumbel noise -log(-log(U)), in the shape, type and place of the logits."""
    if generator is not None:
        exponential = torch.empty(logits.shape, device=generator.device).exponential_(generator=generator)
        return exponential.log().neg().to(logits)
    return torch.empty_like(logits, requires_grad=False).exponential_().log().neg()


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Straight-through Gumbel-softmax: exact one-hot samples whose gradient is that of the relaxed ones.

    Args:
        logits: (..., categories), the log of unnormalised probabilities.
        noise: Gumbel noise of the same shape.
        temperature: Above 0; the gradient's, it does not change what is drawn.

    Returns:
        One-hot samples argmax(logits + noise) (SpotTune, equation 3), with the gradient of
        softmax((logits + noise) / temperature) (equation 4).
    """
    perturbed = logits + noise
    soft = (perturbed / temperature).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter(-1, perturbed.argmax(dim=-1, keepdim=True), 1.)
    return hard + (soft - soft.detach())  # the bracket is exactly zero
