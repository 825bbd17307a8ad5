"""The classifier of the block-wise paper."""
from collections.abc import Sequence

import torch
from torch import nn

from timm_amf.engine.build import seed_step
from timm_amf.models.blocks import in_eval

__all__ = ['mlp_head']


def mlp_head(model: nn.Module, input_size: Sequence[int], num_classes: int, seed: int) -> nn.Module:
    """Flatten, 128 units, dropout of 0.5, 64 units with ReLU, and a logit for each class (section V).

    On the features before pooling. The paper gives no activation of the first layer, so it has none, as is the default
    of its library, whose initialisation is used too (Glorot's uniform one).

    Args:
        model: What gives the features, by `forward_features`; its modes and the statistics of its norms stay.
        input_size: (C, H, W) of the images.
        num_classes: Classes.
        seed: What its weights follow from.
    """
    first = next(model.parameters())
    with in_eval(model), torch.no_grad():  # else norms would take this image for data
        width = model.forward_features(first.new_zeros((1, *input_size))).numel()
    with torch.random.fork_rng():
        seed_step(seed, 0, 0, 0)
        head = nn.Sequential(
            nn.Flatten(), nn.Linear(width, 128), nn.Dropout(0.5), nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, num_classes))
        for layer in head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    return head.to(device=first.device, dtype=first.dtype)
