"""Metrics of classification beyond the accuracy: from counts by class, and from the probabilities. All in percent."""
import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ['bootstrap', 'class_metrics', 'expected_calibration_error', 'fit_temperature', 'mended_error', 'reliability']

_BINS, _REPLICATES = 15, 1000


def class_metrics(support: NDArray, predicted: NDArray, hits: NDArray) -> tuple[NDArray, NDArray]:
    """Balanced accuracy and macro F1: the mean recall and the mean F1 score of the classes that have images.

    As scikit-learn's, which counts classes without images that were predicted in its F1, too, unless its `labels` are
    those that have images. Classes are the last axis.

    Args:
        support: Images of each class.
        predicted: Images that were given to it.
        hits: Images of it that were given to it.
    """
    there = np.maximum((support > 0).sum(-1), 1)
    scores = ((hits, support), (2 * hits, support + predicted))
    return tuple(
        100 * np.divide(part, whole, out=np.zeros(np.shape(part)), where=support > 0).sum(-1) / there
        for part, whole in scores)


def bootstrap(targets: NDArray, predicted: NDArray, level: float = 0.95) -> list[tuple[float, float]]:
    """Percentile intervals of balanced accuracy and macro F1 over images drawn with replacement (Efron, 1979).

    Drawing N images is drawing how often each pair of class and prediction occurs, so the cost follows the number of
    different pairs and not that of the images.

    Args:
        targets: Class of each image, (N,).
        predicted: Predicted class of each, (N,).
        level: Confidence, between 0 and 1.

    Returns:
        (lower, upper) of both.
    """
    pairs, counts = np.unique(np.stack([targets, predicted]), axis=1, return_counts=True)
    names, (of, to) = np.unique(pairs, return_inverse=True)  # only classes that occur
    of, to = (np.eye(len(names))[index] for index in np.reshape((of, to), pairs.shape))
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=_REPLICATES)
    found = class_metrics(draws @ of, draws @ to, draws @ (of * to))
    tails = 50 * (1 - level), 50 * (1 + level)
    return [tuple(np.percentile(values, tails).tolist()) for values in found]


def reliability(confidence: NDArray, hit: NDArray) -> dict[str, NDArray]:
    """What a reliability diagram shows of 15 bins of equal width: `images`, mean `confidence` and `accuracy` (0 to 1).

    Args:
        confidence: Largest probability of each image, (N,).
        hit: Whether its class is the image's, (N,).
    """
    index = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)  # a bin is without its lower limit
    images, *sums = (np.bincount(index, values, _BINS) for values in (np.ones(len(index)), confidence, hit))
    means = [np.divide(total, images, out=np.zeros(_BINS), where=images > 0) for total in sums]
    return dict(images=images, confidence=means[0], accuracy=means[1])


def expected_calibration_error(confidence: NDArray, hit: NDArray) -> float:
    """Mean distance of confidence and accuracy over the bins, by their images (Guo et al., "On calibration of modern
    neural networks", 2017, equation 3).
    """
    found = reliability(confidence, hit)
    return float(100 * found['images'] @ abs(found['accuracy'] - found['confidence']) / found['images'].sum())


def fit_temperature(log_probs: NDArray, targets: NDArray) -> float:
    """The T with which softmax(log_probs / T) has the smallest mean -log of the target's probability (Guo et al.,
    section 4.2), between 0.01 and 100; 1 where there are no images.

    The loss is convex in 1 / T; its slope is what the logits are on average more than that of the target.

    Args:
        log_probs: (N, classes).
        targets: (N,).
    """
    logits, index = torch.as_tensor(log_probs), torch.as_tensor(targets)[:, None]
    low, high = (-2., 2.) if len(index) else (0., 0.)
    for _ in range(20):
        middle = (low + high) / 2  # of log10(1 / T)
        expected = (torch.softmax(logits * 10 ** middle, 1) * logits.clamp(min=-1e4)).sum(1)
        slope = (expected - logits.gather(1, index)[:, 0]).double().mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 10 ** -((low + high) / 2)


def mended_error(log_probs: NDArray, targets: NDArray) -> float:
    """The calibration error that a temperature leaves on images that it was not fitted to: each half of the images
    (every second one) has the temperature of the other.
    """
    halves = [slice(i, None, 2) for i in (0, 1)]
    confidence = np.zeros(len(targets))
    for half, other in zip(halves, halves[::-1]):
        scaled = torch.as_tensor(log_probs[half]) / fit_temperature(log_probs[other], targets[other])
        confidence[half] = scaled.softmax(1).amax(1)
    return expected_calibration_error(confidence, log_probs.argmax(1) == targets)
