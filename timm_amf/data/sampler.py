"""Which samples make up each step, on each process: a pure function of (seed, epoch, step)."""
import math
from collections.abc import Iterator
from typing import NamedTuple, Optional

import numpy as np
import torch.utils.data

from timm_amf.errors import UserError

__all__ = ['Key', 'StepSampler', 'EvalSampler']


class Key(NamedTuple):
    """Names one draw of one sample: all that its augmentation may depend on, and its place in the step.

    Args:
        epoch: Epoch of the draw.
        index: Index into the dataset.
        repeat: How often the sample was drawn before in this epoch.
        position: Place in the step, over all processes.
        step_size: Number of samples in the step, over all processes.
    """
    epoch: int
    index: int
    repeat: int
    position: int
    step_size: int


class StepSampler(torch.utils.data.Sampler):
    """Batch sampler of training: each process's part of each step, as lists of `Key`.

    An epoch is a permutation drawn from (seed, epoch), cut into steps whose sizes differ by at most one. Process r of w
    takes every w-th sample of a step, from the r-th. So each sample is seen exactly once an epoch, none is dropped,
    and a step of two processes has the same samples as one of a single process with twice the batch size.

    Args:
        num_samples: Samples in the dataset.
        batch_size: Most samples a process has in a step.
        seed: Seed of the permutations.
        rank: This process.
        world_size: Number of processes.
        aug_repeats: Draw each sample this many times in succession, and only so many samples that the epoch keeps its
            length (timm's `--aug-repeats`; "Augment your batch", https://arxiv.org/abs/1901.09335). 0: off.
        epoch_repeats: Passes over the dataset in an epoch, each with its own permutation (timm's `--epoch-repeats`,
            which timm heeds for iterable datasets only). 0 or 1: one pass.
        classes: Class of each sample: draw each class equally often in a pass of the same length, its samples in turn
            in a random order, instead of each sample once. None: each once.
    """

    def __init__(
            self,
            num_samples: int,
            batch_size: int,
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
            aug_repeats: float = 0,
            epoch_repeats: float = 0,
            classes: Optional[np.ndarray] = None,
    ):
        if num_samples < world_size:
            raise UserError(f'data: {num_samples} training images for {world_size} processes; use fewer processes')
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.aug_repeats = aug_repeats
        self.members = None if classes is None else [np.flatnonzero(classes == label) for label in np.unique(classes)]
        self.draws = int(num_samples * max(1., epoch_repeats))
        # A step needs a sample for each process; with a batch size of one that can take one sample more in a step.
        self.steps = min(math.ceil(self.draws / (batch_size * world_size)), self.draws // world_size)
        self.epoch = 0
        self.start_step = 0

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch, and the step at which the next iteration (only that one) begins."""
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        return self.steps

    def step_size(self, step: int) -> int:
        """Number of samples in a step, over all processes."""
        return len(range(step, self.draws, self.steps))

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start_step = self.start_step, 0
        for draws in np.array_split(self._draws(), self.steps)[start:]:
            mine = range(self.rank, len(draws), self.world_size)
            yield [Key(self.epoch, *draws[place].tolist(), place, len(draws)) for place in mine]

    def _draws(self) -> np.ndarray:
        """Index and number of earlier draws of it, for each draw of the epoch, (draws, 2)."""
        passes = []
        for number in range(math.ceil(self.draws / self.num_samples)):
            rng = np.random.default_rng((self.seed, self.epoch, number))
            if self.members is not None:
                order, repeat = self._balanced(rng)
                most = self.num_samples
            else:
                # timm's `--aug-repeats`: in succession, so many times each.
                most = math.ceil(max(1, self.aug_repeats))
                which = (np.arange(self.num_samples) // max(1, self.aug_repeats)).astype(np.int64)
                order = rng.permutation(self.num_samples)[which]
                repeat = np.arange(self.num_samples) - np.searchsorted(which, which)
            passes.append(np.stack([order, repeat + number * most], axis=1))
        return np.concatenate(passes)[:self.draws]

    def _balanced(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A pass of each class equally often: their numbers differ by one at most."""
        number, more = divmod(self.num_samples, len(self.members))
        sizes = number + (rng.permutation(len(self.members)) < more)
        drawn = [
            np.concatenate([rng.permutation(members) for _ in range(math.ceil(size / len(members)))])[:size]
            for members, size in zip(self.members, sizes)]
        rounds = [np.arange(size) // len(members) for members, size in zip(self.members, sizes)]
        order = rng.permutation(self.num_samples)
        return np.concatenate(drawn)[order], np.concatenate(rounds)[order]


class EvalSampler(torch.utils.data.Sampler):
    """Batch sampler of evaluation: process r of w has every w-th sample, each exactly once and none twice.

    Processes may have different numbers of batches, or none at all.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, num_samples, world_size)
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.world_size = world_size

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Evaluation is the same in every epoch."""

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for low in range(0, len(self.indices), self.batch_size):
            chunk = self.indices[low:low + self.batch_size]
            total = min(self.num_samples - low * self.world_size, self.batch_size * self.world_size)
            yield [Key(0, index, 0, index - low * self.world_size, total) for index in chunk]
