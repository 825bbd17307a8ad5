"""timm's transforms, each drawn from (seed, epoch, index), and made safe for current Pillow."""
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing

from .sampler import Key

__all__ = ['SeededRandomErasing', 'adapt_transform', 'kept_random_state', 'sample_seed', 'seed_globals']

_MASK = 2 ** 64 - 1


def sample_seed(seed: int, key: Key, stream: int = 0) -> int:
    """A 64-bit seed from (seed, epoch, index, repeat) and the use it is put to: the mixing function of SplitMix64
    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, Figure 17), chained.
    """
    state = 0
    for value in (seed, key.epoch, key.index, key.repeat, stream):
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_globals(seed: int) -> None:
    """Seed the three generators that transforms draw from, and leave those of the accelerators alone."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_random_state(device: Optional[torch.device] = None) -> Iterator[None]:
    """Give the global generators their states back at the end, that of the device among them."""
    module = torch.get_device_module(device) if device is not None and device.type != 'cpu' else None
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    device_state = module.get_rng_state(device) if module else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
        if module:
            module.set_rng_state(device_state, device)


class SeededRandomErasing(RandomErasing):
    """timm's random erasing of a batch on its device, each sample's drawn from (seed, epoch, index).

    With `num_splits` the first part of each *step* (over all processes) stays clean, where timm keeps the first part
    of each process's batch.
    """

    def __init__(self, *args, seed: int = 42, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def __call__(self, input: torch.Tensor, keys: list[Key], splits: int = 1) -> torch.Tensor:
        """Erase in place.

        Args:
            input: Normalised images, (splits * B, C, H, W).
            keys: The keys of the B samples.
            splits: Augmentation splits: the batch holds its samples this many times, one split after the other.
        """
        device = input.device
        with kept_random_state(device):
            for i in range(len(input)):
                split, sample = divmod(i, len(keys))
                key = keys[sample]
                place = split * key.step_size + key.position
                if self.num_splits > 1 and place < splits * key.step_size // self.num_splits:
                    continue
                seed = sample_seed(self.seed, key, stream=1 + 2 * split)
                random.seed(seed)
                torch.default_generator.manual_seed(seed)
                if device.type != 'cpu':
                    torch.get_device_module(device).manual_seed(seed)
                self._erase(input[i], *input[i].shape, input.dtype)
        return input


def adapt_transform(transform: Callable) -> Callable:
    """Make timm's transforms safe for current Pillow, in place.

    `rand-m9-mstd0.5-inc1` at times draws a posterisation to 0 bits. Older Pillow made that image black, as does the
    TPU code that timm follows; Pillow 13 raises ValueError. Here it stays black.
    """
    for node in _walk(transform):
        if isinstance(node, auto_augment.AugmentOp) and node.aug_fn is auto_augment.posterize:
            node.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """Keep the highest bits of each channel; no bits at all is a black image."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep, **kwargs)


def _walk(node: Any) -> Iterator[Any]:
    """A transform and all under it, through whatever holds them."""
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _walk(child)
        return
    yield node
    for name in ('transforms', 'ops', 'policy'):
        if isinstance(getattr(node, name, None), (list, tuple, torch.nn.ModuleList)):
            yield from _walk(list(getattr(node, name)))
