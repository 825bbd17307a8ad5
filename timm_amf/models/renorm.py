"""One input, normalised once, for networks that were trained on differently normalised images."""
from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor, nn

__all__ = ['Renormalize', 'channel_stats', 'create_renorm']

Stats = Sequence[float]


def channel_stats(values: Union[float, Stats], in_chans: int) -> tuple[float, ...]:
    """A mean or standard deviation, one value a channel, as timm's loaders read it for `in_chans` channels.

    Statistics of another number of channels (ImageNet's three for a grey or four-channel input) give their average.
    """
    values = (values,) if isinstance(values, (int, float)) else tuple(values)
    if len(values) not in (1, in_chans):
        values = (sum(values) / len(values),)
    return values * in_chans if len(values) == 1 else values


class Renormalize(nn.Module):
    """Takes an input normalised with one mean and standard deviation to another: one multiply-add a value.

    With input (x - mean_from) / std_from the output is (x - mean_to) / std_to. No parameters, and nothing in the state
    dict: the statistics are the model's configuration.
    """

    def __init__(self, mean_from: Stats, std_from: Stats, mean_to: Stats, std_to: Stats, device=None, dtype=None):
        """
        Args:
            mean_from: Mean that the input was normalised with, one value a channel.
            std_from: Its standard deviation.
            mean_to: Mean that the network behind was trained with.
            std_to: Its standard deviation.
        """
        super().__init__()
        self._scale = [sf / st for sf, st in zip(std_from, std_to, strict=True)]
        self._shift = [(mf - mt) / st for mf, mt, st in zip(mean_from, mean_to, std_to, strict=True)]
        self._set_buffers(device, dtype)

    def _set_buffers(self, device, dtype) -> None:
        for name, values in (('scale', self._scale), ('shift', self._shift)):
            tensor = torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # Computed again after every move: a trip through bf16 or `to_empty` must not leave its rounding behind.
        super()._apply(fn, recurse)
        self._set_buffers(self.scale.device, self.scale.dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)

    def extra_repr(self) -> str:
        return f'scale={self._scale}, shift={self._shift}'


def create_renorm(
        mean_from: Stats,
        std_from: Stats,
        mean_to: Stats,
        std_to: Stats,
        in_chans: int = 3,
        device=None,
        dtype=None,
) -> nn.Module:
    """A `Renormalize`, or nothing at all where the statistics agree."""
    stats = [channel_stats(s, in_chans) for s in (mean_from, std_from, mean_to, std_to)]
    if all(abs(a - b) < 1e-6 for a, b in zip(stats[0] + stats[1], stats[2] + stats[3], strict=True)):
        return nn.Identity()
    return Renormalize(*stats, device=device, dtype=dtype)
