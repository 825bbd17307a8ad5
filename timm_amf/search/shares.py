"""Shares of a data set that have the same part of every class, and how much of one fits into a time."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from timm_amf.data import Mixture
from timm_amf.errors import UserError

__all__ = ['Fit', 'fit_budget', 'stratified']

# Of a budget; the rest is for what is not timed: the first batches, files, tables.
_USABLE = 0.9


def stratified(dataset: Mixture, shares: Sequence[float], seed: int) -> list[Mixture]:
    """Disjoint parts of a data set, drawn class by class; what the shares leave is in none.

    A part of each class has its share of the images, rounded, and one at least.

    Args:
        dataset: The images.
        shares: Share of each part, above 0; together at most 1.
        seed: What the draw follows from.

    Raises:
        UserError: If a class has fewer images than there are parts.
    """
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    ends = np.cumsum(shares)
    for number in range(dataset.num_classes):
        members = np.flatnonzero(dataset.targets == number)
        if len(members) < len(shares):
            raise UserError(
                f'data: class {dataset.class_names[number]!r} has {len(members)} images, too few for {len(shares)} '
                f'parts; add images, or search without shares')
        drawn = np.random.RandomState((seed + 7919 * number) % 2**32).permutation(members)
        for part, (start, end) in zip(parts, _bounds(ends, len(members))):
            part.append(drawn[start:end])
    return [dataset.subset(np.sort(np.concatenate(part))) for part in parts]


def _bounds(ends: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Where each part begins and ends among the images of a class."""
    bounds, start = [], 0
    for i, end in enumerate(ends):
        left = len(ends) - i - 1
        stop = min(max(round(float(end) * count), start + 1), count - left)
        bounds.append((start, stop))
        start = stop
    return bounds


@dataclass(frozen=True)
class Fit:
    """What a search takes.

    Attributes:
        epochs: Epochs of each candidate.
        share: Share of the training images.
        val_share: Share of the validation images.
        seconds: Time that it is expected to take.
    """
    epochs: int
    share: float
    val_share: float
    seconds: float


def fit_budget(
        seconds: float,
        train_images: int,
        val_images: int,
        train_cost: float,
        val_cost: float,
        epochs: int,
        least_share: float,
) -> Fit:
    """How much a search can do in a time.

    Ten epochs (or as many as were asked for, if fewer) are worth more than more images; then all images; then more
    epochs. Validation, once at the end, gets a third of the time at most.

    Args:
        seconds: The time; a tenth is kept in reserve.
        train_images: Training images.
        val_images: Validation images.
        train_cost: Seconds that a training image takes in one epoch, for all candidates together.
        val_cost: The same of a validation image.
        epochs: Most epochs.
        least_share: Smallest share of the training images that has two of each class.

    Raises:
        UserError: If not even one epoch on the smallest share fits.
    """
    usable = _USABLE * seconds
    val_share = min(1., usable / 3 / (val_images * val_cost))
    left = usable - val_share * val_images * val_cost
    affordable = left / train_cost
    if affordable < least_share * train_images or val_share * val_images < 1:
        least = max(1.5 * least_share * train_images * train_cost, 3 * val_cost) / _USABLE / 60
        raise UserError(
            f'--budget: {seconds / 60:.2g} minutes are too short for one epoch; give {math.ceil(10 * least) / 10:.1f}')
    share = min(1., max(least_share, affordable / (min(10, epochs) * train_images)))
    # The quotient of ten epochs may be a hair below ten.
    chosen = max(1, min(epochs, int(affordable / (share * train_images) + 1e-6)))
    expected = chosen * share * train_images * train_cost + val_share * val_images * val_cost
    return Fit(chosen, share, val_share, expected)
