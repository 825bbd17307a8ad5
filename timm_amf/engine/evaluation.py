"""What one pass over labelled images gave, as arrays; every metric, table and figure is drawn from them."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from timm_amf.engine.intervals import mean_interval, wilson_interval
from timm_amf.engine.metrics import (
    bootstrap,
    class_metrics,
    expected_calibration_error,
    fit_temperature,
    mended_error,
    reliability,
)
from timm_amf.models.records import Record

__all__ = ['Evaluation', 'Row', 'mean_rows', 'short', 'top_k']


@dataclass(frozen=True)
class Row:
    """Metrics of one run, of the mean of the runs, or of their ensemble; in percent but for the loss.

    Args:
        run: The run's folder, `mean of N runs` or `ensemble of N runs`.
        component: Component of the mixture, '' for all images.
        images: Number of images.
        loss: Mean of -log of the averaged softmax at the target; of the mean row the mean of the runs'.
        top1: Accuracy, and `top1_std` over the runs (ddof 1), of the mean row alone. `_low` and `_high` are the limits
            of Wilson's interval over the images, of the mean row Student's over the runs, cut to 0 to 100.
        top5: Share of images whose class is among the five likeliest.
        balanced_accuracy: Mean recall of the classes; limits by the bootstrap over the images, of the mean as `top1`'s.
        macro_f1: Mean F1 score of the classes; limits as of the balanced accuracy.
        ece: Expected calibration error, 15 bins.
        temperature: What the log-probabilities are to be divided by, fitted to these images; of the mean row none.
        ece_mended: Calibration error with it: each half of the images with the temperature of the other.
    """
    run: str
    component: str
    images: int
    loss: float
    top1: float
    top1_std: Optional[float]
    top1_low: float
    top1_high: float
    top5: float
    balanced_accuracy: float
    balanced_accuracy_low: float
    balanced_accuracy_high: float
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    ece: float
    temperature: Optional[float]
    ece_mended: Optional[float]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One pass of a model, or of several as an ensemble, over N labelled images.

    Attributes:
        run: The run's folder, or what else was evaluated; `ensemble of N runs`.
        class_names: Of the data's classes, which are the first outputs of the model.
        components: Names of the data's components.
        paths: File of each image, in the order of the data.
        targets: Class of each, (N,) int64.
        component_of: Component of each, (N,) int64.
        log_probs: Log of the probabilities, averaged over crops and runs, (N, outputs) float32.
        decision_names: What the columns of `decisions` are: `weight_0`, ... of branches; of routed blocks `block_0`,
            ..., whether the tuned copy was taken, and `probability_0`, ...
        decisions: What the model decided for each image, (N, width) float32, the mean over crops; None of a model that
            decides nothing, and of an ensemble.
        record: The sums of the decisions, for `policy`.
    """
    run: str
    class_names: list[str]
    components: list[str]
    paths: list[str]
    targets: NDArray
    component_of: NDArray
    log_probs: NDArray
    decision_names: Sequence[str] = ()
    decisions: Optional[NDArray] = None
    record: Optional[Record] = None

    @property
    def probabilities(self) -> NDArray:
        return np.exp(self.log_probs)

    @property
    def predicted(self) -> NDArray:
        """Index of the likeliest class of each image, (N,)."""
        return self.log_probs.argmax(1)

    @property
    def hit(self) -> NDArray:
        """Whether that is its class, (N,)."""
        return self.predicted == self.targets

    def confusion(self) -> NDArray:
        """Number of images by class and predicted class, (outputs, outputs) int64."""
        outputs = self.log_probs.shape[1]
        return np.bincount(self.targets * outputs + self.predicted, minlength=outputs ** 2).reshape(outputs, outputs)

    def reliability(self) -> dict[str, NDArray]:
        """See `metrics.reliability`."""
        return reliability(np.exp(self.log_probs.max(1)), self.hit)

    def policy(self) -> dict[str, Any]:
        """Columns of `policy.csv` for these images; empty of a model that decides nothing."""
        return {} if self.record is None else self.record.row()

    def _counts(self) -> tuple[NDArray, NDArray, NDArray]:
        """Images, predictions and hits of each class of the data."""
        kinds = (self.targets, self.predicted, self.targets[self.hit])
        return tuple(np.bincount(kind, minlength=len(self.class_names))[:len(self.class_names)] for kind in kinds)

    def by_class(self, level: float = 0.95) -> list[dict[str, Any]]:
        """For each class that has images: `class`, `images`, and in percent `accuracy` (its recall), Wilson's limits of
        it `low` and `high`, `precision` and `f1`.
        """
        found = []
        for name, images, predicted, hits in zip(self.class_names, *map(np.ndarray.tolist, self._counts())):
            if images:
                low, high = wilson_interval(hits, images, level)
                found.append({
                    'class': name, 'images': images, 'accuracy': 100 * hits / images, 'low': 100 * low,
                    'high': 100 * high, 'precision': 100 * hits / max(predicted, 1),
                    'f1': 200 * hits / (images + predicted)})
        return found

    def rows(self, level: float = 0.95) -> list[Row]:
        """The metrics of all images and, if there are several components, of each that has images."""
        parts = [(name, self.component_of == i) for i, name in enumerate(self.components)]
        parts = [(name, mask) for name, mask in parts if mask.any()] if len(parts) > 1 else []
        return [self._row('', level), *(self._of(mask)._row(name, level) for name, mask in parts)]

    def _of(self, mask: NDArray) -> 'Evaluation':
        return replace(self, targets=self.targets[mask], log_probs=self.log_probs[mask])

    def _row(self, component: str, level: float) -> Row:
        images, hits = len(self.targets), int(self.hit.sum())
        balanced, f1 = class_metrics(*self._counts())
        limits = [wilson_interval(hits, images, level), *bootstrap(self.targets, self.predicted, level)]
        return Row(
            self.run, component, images,
            loss=-float(self.log_probs[np.arange(images), self.targets].mean(dtype=np.float64)),
            top1=100 * hits / images, top1_std=None, top1_low=100 * limits[0][0], top1_high=100 * limits[0][1],
            top5=100 * float((top_k(self.log_probs, 5)[0] == self.targets[:, None]).any(1).mean()),
            balanced_accuracy=float(balanced), balanced_accuracy_low=limits[1][0], balanced_accuracy_high=limits[1][1],
            macro_f1=float(f1), macro_f1_low=limits[2][0], macro_f1_high=limits[2][1],
            ece=expected_calibration_error(np.exp(self.log_probs.max(1)), self.hit),
            temperature=fit_temperature(self.log_probs, self.targets),
            ece_mended=mended_error(self.log_probs, self.targets),
        )


def top_k(log_probs: NDArray, k: int) -> tuple[NDArray, NDArray]:
    """Indices and probabilities of the k likeliest classes, (N, k) each, of fewer classes all."""
    values, indices = torch.from_numpy(log_probs).topk(min(k, log_probs.shape[1]))
    return indices.numpy(), values.double().exp().float().numpy()


def short(value: np.floating) -> float:
    """The shortest decimal that is this number in its own precision, to the bit."""
    return float(str(value))


def mean_rows(evaluations: Sequence[Sequence[Row]], level: float = 0.95) -> list[Row]:
    """The mean of the rows of several runs on the same images."""
    found = []
    for rows in zip(*evaluations):
        means = {
            name: sum(getattr(row, name) for row in rows) / len(rows)
            for name in ('loss', 'top5', 'ece')}
        for name in ('top1', 'balanced_accuracy', 'macro_f1'):
            mean, deviation, low, high = mean_interval([getattr(row, name) for row in rows], level)
            if deviation == 0:  # that all runs agree says nothing of other images
                low, high = getattr(rows[0], f'{name}_low'), getattr(rows[0], f'{name}_high')
            # Of a few runs that differ much, the interval knows no percent.
            means.update({name: mean, f'{name}_low': max(low, 0.), f'{name}_high': min(high, 100.)})
            means.setdefault('top1_std', deviation)
        found.append(replace(
            rows[0], run=f'mean of {len(rows)} runs', temperature=None, ece_mended=None, **means))
    return found
