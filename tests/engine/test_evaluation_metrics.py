"""The metrics against scikit-learn, SciPy and naive loops in float64."""
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from sklearn import metrics as sklearn_metrics

from timm_amf.engine.evaluate import Tally
from timm_amf.engine.evaluation import Evaluation, mean_rows, short, top_k
from timm_amf.engine.intervals import wilson_interval
from timm_amf.engine.metrics import bootstrap, expected_calibration_error, fit_temperature, mended_error, reliability

NAMES = ['ant', 'bee', 'cat', 'dog', 'élan', 'fox']


def made(images=211, classes=6, outputs=6, seed=0, sharpness=3.):
    """Targets of unequal frequency, and log-probabilities that are overconfident and better than chance."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(classes, images, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    logits = rng.normal(size=(images, outputs))
    logits[np.arange(images), targets] += 1.
    logits *= sharpness
    return targets, (logits - logsumexp(logits, axis=1, keepdims=True)).astype(np.float32)


def evaluation(targets, log_probs, component_of=None, components=('a',), run='r'):
    component_of = np.zeros(len(targets), dtype=np.int64) if component_of is None else component_of
    paths = [f'{i}.png' for i in range(len(targets))]
    return Evaluation(run, NAMES, list(components), paths, targets, component_of, log_probs)


def of_sklearn(targets, predicted):
    there = np.unique(targets)
    return (
        100 * sklearn_metrics.recall_score(targets, predicted, labels=there, average='macro', zero_division=0),
        100 * sklearn_metrics.f1_score(targets, predicted, labels=there, average='macro', zero_division=0))


def naive_error(p, targets, bins=15):
    """Guo et al., equation 3, image by image."""
    members = [[] for _ in range(bins)]
    for row, target in zip(p.astype(np.float64), targets):
        confidence = max(row)
        which = next(b for b in range(bins) if b / bins < confidence <= (b + 1) / bins + 1e-12)
        members[which].append((confidence, row.argmax() == target))
    return 100 * sum(
        len(m) / len(targets) * abs(np.mean([c for c, _ in m]) - np.mean([h for _, h in m])) for m in members if m)


@pytest.mark.parametrize('outputs', [6, 8])
def test_tally_and_evaluation_against_scikit_learn(outputs):
    targets, log_probs = made(outputs=outputs)
    targets[targets == 5] = 4  # a class without images that is predicted
    predicted = log_probs.argmax(1)
    assert (predicted == 5).any() and (outputs == 6 or (predicted > 5).any())
    component = torch.from_numpy(targets % 2)
    halves = [Tally(['a', 'b'], 6) for _ in range(3)]  # as of three processes, the last of which has no batch
    for i in range(0, len(targets), 10):
        part = slice(i, i + 10)
        halves[i // 10 % 2].update(torch.from_numpy(log_probs[part]), torch.from_numpy(targets[part]), component[part])
    for tensor, *others in zip(*(half.tensors() for half in halves)):
        tensor.add_(sum(others))
    balanced, f1 = of_sklearn(targets, predicted)
    found = halves[0].metrics()
    assert (found['balanced_accuracy'], found['macro_f1']) == pytest.approx((balanced, f1))
    if outputs == 6:
        with pytest.warns(UserWarning, match='y_pred contains classes'):
            assert balanced == pytest.approx(100 * sklearn_metrics.balanced_accuracy_score(targets, predicted))

    rows = evaluation(targets, log_probs, targets % 2, ('a', 'b', 'empty')).rows()
    assert [(row.component, row.images) for row in rows] == [
        ('', 211), ('a', (targets % 2 == 0).sum()), ('b', (targets % 2 == 1).sum())]
    for row, mask in zip(rows, (targets >= 0, targets % 2 == 0, targets % 2 == 1)):
        t, own = targets[mask], log_probs[mask].astype(np.float64)
        assert (row.balanced_accuracy, row.macro_f1) == pytest.approx(of_sklearn(t, own.argmax(1)))
        assert row.top1 == pytest.approx(100 * np.mean(own.argmax(1) == t))
        assert row.top5 == pytest.approx(
            100 * sklearn_metrics.top_k_accuracy_score(t, own, k=5, labels=range(outputs)))
        assert row.loss == pytest.approx(sklearn_metrics.log_loss(t, np.exp(own), labels=range(outputs)), rel=1e-5)
        assert row.ece == pytest.approx(naive_error(np.exp(own), t))
        assert row.balanced_accuracy_low < row.balanced_accuracy < row.balanced_accuracy_high
        assert row.macro_f1_low < row.macro_f1_high
    assert rows[0].top1 == pytest.approx(found['top1']) and rows[0].loss == pytest.approx(found['loss'], rel=1e-5)


def test_classes_and_confusion_against_scikit_learn():
    targets, log_probs = made()
    targets[targets == 2] = 3
    found = evaluation(targets, log_probs)
    confusion = sklearn_metrics.confusion_matrix(targets, log_probs.argmax(1), labels=range(6))
    assert (found.confusion() == confusion).all()
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        targets, log_probs.argmax(1), labels=range(6), zero_division=0)
    rows = found.by_class(0.9)
    assert [row['class'] for row in rows] == [name for name in NAMES if name != 'cat']
    for row, k in zip(rows, (0, 1, 3, 4, 5)):
        assert row['images'] == support[k]
        assert (row['accuracy'], row['precision'], row['f1']) == pytest.approx(
            (100 * recall[k], 100 * precision[k], 100 * f1[k]))
        low, high = wilson_interval(confusion[k, k], support[k], 0.9)
        assert (row['low'], row['high']) == pytest.approx((100 * low, 100 * high))


def test_calibration_against_a_naive_loop():
    targets, log_probs = made(1000)
    p = np.exp(log_probs)
    confidence, hit = p.max(1), p.argmax(1) == targets
    assert expected_calibration_error(confidence, hit) == pytest.approx(naive_error(p, targets)) != 0
    bins = reliability(confidence, hit)
    assert bins['images'].sum() == 1000 and len(bins['images']) == 15
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        assert bins['images'][b] == inside.sum()
        if inside.any():
            assert bins['accuracy'][b] == pytest.approx(hit[inside].mean())
            assert bins['confidence'][b] == pytest.approx(confidence[inside].mean())
    # The limits of the bins: a bin is without its lower one, and 0 and 1 have a place.
    images = reliability(np.array([0., 0.2, 0.2000001, 1.]), np.array([1, 1, 0, 1]))['images']
    assert images.tolist() == [1, 0, 1, 1, *[0] * 10, 1]


@pytest.mark.parametrize('sharpness', [0.3, 1., 3.])
def test_temperature_against_scipy(sharpness):
    targets, log_probs = made(1500, sharpness=sharpness)

    def loss(temperature, rows=slice(None)):
        scaled = log_probs[rows].astype(np.float64) / temperature
        own = scaled[np.arange(len(scaled)), targets[rows]]
        return (logsumexp(scaled, axis=1) - own).mean()

    def best(rows=slice(None)):
        return minimize_scalar(loss, bounds=(0.05, 20), args=(rows,), method='bounded', options={'xatol': 1e-6}).x

    assert fit_temperature(log_probs, targets) == pytest.approx(best(), rel=1e-3)
    scaled = log_probs.astype(np.float64)
    scaled[::2] /= best(slice(1, None, 2))
    scaled[1::2] /= best(slice(0, None, 2))
    mended = np.exp(scaled - logsumexp(scaled, axis=1, keepdims=True))
    found = mended_error(log_probs, targets)
    assert found == pytest.approx(naive_error(mended, targets), abs=0.05)
    before = expected_calibration_error(np.exp(log_probs.max(1)), log_probs.argmax(1) == targets)
    assert found < before or sharpness == 1


def test_bootstrap_against_drawing_images(monkeypatch):
    monkeypatch.setattr('timm_amf.engine.metrics._REPLICATES', 20000)
    targets, log_probs = made()
    predicted = log_probs.argmax(1)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(500):
        index = rng.integers(0, len(targets), len(targets))
        drawn.append(of_sklearn(targets[index], predicted[index]))
    found = bootstrap(targets, predicted, 0.9)
    assert found == bootstrap(targets, predicted, 0.9)
    for limits, values in zip(found, np.transpose(drawn)):
        width = np.percentile(values, 95) - np.percentile(values, 5)
        assert limits == pytest.approx(np.percentile(values, (5, 95)), abs=0.12 * width)


def test_means_of_runs():
    runs = [evaluation(*made(seed=0)[:1], made(seed=seed)[1]).rows() for seed in (1, 2, 3)]
    mean, = mean_rows(runs)
    assert mean.temperature is None and mean.ece_mended is None  # a mean of these says nothing
    for name in ('balanced_accuracy', 'macro_f1', 'ece', 'loss', 'top5'):
        assert getattr(mean, name) == pytest.approx(np.mean([getattr(row, name) for row, in runs]))
    assert mean.balanced_accuracy_low <= mean.balanced_accuracy <= mean.balanced_accuracy_high
    alike, = mean_rows([runs[0], runs[0]])
    assert (alike.macro_f1_low, alike.macro_f1_high) == (runs[0][0].macro_f1_low, runs[0][0].macro_f1_high)


def test_one_image_and_certainty():
    row, = evaluation(np.array([0]), np.log(np.array([[1., 1e-38, 0, 0, 0, 0]], dtype=np.float32) + 1e-45)).rows()
    assert (row.images, row.top1, row.balanced_accuracy, row.macro_f1) == (1, 100, 100, 100)
    assert row.ece == pytest.approx(0, abs=1e-4) and math.isfinite(row.temperature) and math.isfinite(row.ece_mended)


def test_probabilities_are_written_to_the_bit():
    _, log_probs = made()
    indices, values = top_k(log_probs, 9)
    assert values.shape == (211, 6) and values.dtype == np.float32
    assert (indices[:, 0] == log_probs.argmax(1)).all() and (np.diff(values, axis=1) <= 0).all()
    assert values == pytest.approx(np.exp(np.sort(log_probs.astype(np.float64))[:, ::-1]), rel=1e-6)
    assert all(np.float32(repr(short(v))) == v and len(repr(short(v))) < 16 for v in values.flat)
    one = [top_k(row[None], 9)[1][0] for row in log_probs]
    assert (np.array(one) == values).all()
