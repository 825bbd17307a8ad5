"""Measures of how well pretrained weights fit a data set, from features computed once.

Each is a function of the features (N, D) of N images and their labels (N,), or of the source classifier's probabilities
(N, Z) and the labels; nothing here knows a network. Larger means a better fit, everywhere. `measure` computes them all.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from scipy import linalg, stats
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.metrics import mutual_info_score
from sklearn.utils import check_X_y

from timm_amf.engine.head import logistic_regression
from timm_amf.errors import UserError
from timm_amf.search.features import Features

__all__ = [
    'LABELS', 'RANKING', 'Measures', 'check_features', 'class_means', 'domain_similarity', 'fisher_score',
    'fixed_feature_accuracy', 'h_score', 'leep', 'log_me', 'measure', 'nce', 'trans_rate',
]


def check_features(
        features: np.ndarray,
        labels: np.ndarray,
        class_names: Optional[Sequence[str]] = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What every measure starts with: features that can be measured, and labels without gaps.

    Args:
        features: (N, D).
        labels: (N,) integers.
        class_names: Name of each label, for the messages.

    Returns:
        The features as float64 without those that are constant, (N, D'), and the labels renumbered from 0, (N,).
    """
    features, labels = check_X_y(features, labels, dtype=np.float64)
    found, labels, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(found) < 2:
        raise UserError(f'there are images of {len(found)} class only; a measure of fit needs two')
    if counts.min() < 2:
        which = int(found[counts.argmin()])
        name = which if class_names is None else class_names[which]
        raise UserError(f'class {name!r} has one image, and its spread cannot be measured; add images, or leave it out')
    varies = np.ptp(features, axis=0) > 0
    if not varies.any():
        raise UserError(
            'no feature varies from image to image: the network computes nothing; check its weights and the images')
    return features[:, varies], labels


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean features of each class, (K, D), and its share of the images, (K,). Labels are 0 to K - 1."""
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / counts[:, None], counts / counts.sum()


def fixed_feature_accuracy(
        features: np.ndarray,
        labels: np.ndarray,
        eval_features: np.ndarray,
        eval_labels: np.ndarray,
) -> float:
    """Accuracy in percent of the logistic regression that `fit` starts from (Plested et al., section 4.1, Table 1).

    Args:
        features: Training features, (N, D).
        labels: (N,).
        eval_features: Features that the accuracy is of, (M, D).
        eval_labels: (M,); a class that the training images do not have is always wrong.
    """
    classes, codes = np.unique(labels, return_inverse=True)
    weight, bias, _ = logistic_regression(features, codes, len(classes))
    predicted = classes[(eval_features @ weight.T + bias).argmax(axis=1)]
    return 100 * float((predicted == eval_labels).mean())


def fisher_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Class-normalised Fisher score Tr(Sw^-1 Sb) / K (Plested et al., section 4.1, after Fukunaga, chapter 10).

    Sw = sum_k P_k cov_k is the covariance within classes and Sb = sum_k P_k (m_k - m)(m_k - m)^T that between them.
    With fewer images than features Sw has no inverse, and long before that its inverse is mostly noise, so it is
    shrunk: (1 - a) Sw + a Tr(Sw)/D I, a as Ledoit and Wolf (2004) estimate it, which tends to 0 with many images. The
    paper does not say what it did.

    Args:
        features: (N, D).
        labels: (N,), of K classes.
    """
    features, labels = check_features(features, labels)
    means, shares = class_means(features, labels)
    within = features - means[labels]
    if not np.any(np.abs(within) > 1e-12 * np.abs(features).max()):
        raise UserError('the images of each class have equal features: nothing to compare the classes\' distance with')
    ratio, _ = _trace_of_ratio(within, means - shares @ means, shares)
    return ratio / len(means)


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """H-score Tr(cov(f)^-1 cov(E[f | y])) (Bao et al. 2019).

    It is that of Ibrahim et al. 2022 ("Newer is not always better"): cov(f) is shrunk as in `fisher_score`, and
    cov(E[f | y]) is multiplied by 1 - a.

    Args:
        features: (N, D).
        labels: (N,).
    """
    features, labels = check_features(features, labels)
    means, shares = class_means(features, labels)
    centre = features.mean(axis=0)
    ratio, a = _trace_of_ratio(features - centre, means - centre, shares)
    return (1 - a) * ratio


def _trace_of_ratio(rows: np.ndarray, means: np.ndarray, shares: np.ndarray) -> tuple[float, float]:
    """Tr(S^-1 B) of the shrunk covariance S of centred rows (N, D) and that of class means, B; and the shrinkage."""
    a = float(ledoit_wolf_shrinkage(rows, assume_centered=True))
    inverse = linalg.pinvh(shrunk_covariance(rows.T @ rows / len(rows), a))
    return float(np.einsum('kd,de,ke,k->', means, inverse, means, shares, optimize=True)), a


def domain_similarity(
        source_means: np.ndarray,
        source_weights: np.ndarray,
        target_means: np.ndarray,
        target_weights: np.ndarray,
        gamma: float = 0.01,
) -> float:
    """Domain similarity exp(-gamma d), d the earth mover's distance of class means (Cui et al. 2018).

    A class is a point, its mean features (D), that weighs as much as its share of the images; the ground distance is
    Euclidean. Both sets are of one network; the paper's gamma is 0.01.
    """
    import ot  # slow, and rarely asked for

    weights = (source_weights / source_weights.sum(), target_weights / target_weights.sum())
    distance = ot.emd2(*weights, ot.dist(source_means, target_means, metric='euclidean'), numItermax=10_000_000)
    return float(np.exp(-gamma * distance))


def log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """LogME: the largest log evidence of a linear model of the labels, per image (You et al. 2021).

    One Bayesian linear regression a class, on the one-hot labels, with a Gaussian prior of precision alpha and noise of
    precision beta; both by the fixed-point iteration of the paper's extended version (You et al. 2022, "Ranking and
    tuning pre-trained models"), from one singular value decomposition. Directions of features that the images do not
    span enter the log determinant with log(alpha) each, as the evidence has it; the authors' code leaves them out.
    """
    features, labels = check_features(features, labels)
    number, width = features.shape
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    targets = np.eye(labels.max() + 1)[labels]
    sigma, x = s[:, None] ** 2, (u.T @ targets) ** 2  # (r, 1) and (r, K)
    outside = np.maximum(targets.sum(axis=0) - x.sum(axis=0), 0)  # of the labels, what no combination of features gives
    alpha = beta = np.ones(targets.shape[1])
    tiny = 1e-12
    for _ in range(100):
        ratio = alpha / beta
        gamma = (sigma / (sigma + ratio)).sum(axis=0)
        norm = (sigma * x / (sigma + ratio) ** 2).sum(axis=0)
        residual = (x * (ratio / (sigma + ratio)) ** 2).sum(axis=0) + outside
        alpha, beta = gamma / (norm + tiny), np.maximum(number - gamma, tiny) / (residual + tiny)
    log_det = np.log(alpha + beta * sigma).sum(axis=0) + (width - len(s)) * np.log(alpha)
    evidence = width * np.log(alpha) + number * np.log(beta / (2 * np.pi)) - beta * residual - alpha * norm - log_det
    return float(evidence.mean() / (2 * number))


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """LEEP: log expected empirical prediction (Nguyen et al. 2020). At most 0.

    The source classifier's probabilities theta(x)_z and the labels give P(y, z), and the prediction sum_z P(y | z)
    theta(x)_z; LEEP is the mean log of that for the true labels.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    means, shares = class_means(probabilities, labels)
    joint = means * shares[:, None]
    conditional = joint / np.maximum(joint.sum(axis=0), np.finfo(float).tiny)
    return float(np.log((conditional[labels] * probabilities).sum(axis=1)).mean())


def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """NCE: negative conditional entropy -H(Y | Z) = I(Y; Z) - H(Y) in nats (Tran et al. 2019). At most 0.

    Z is the source class of the largest probability.
    """
    entropy = stats.entropy(np.unique(labels, return_counts=True)[1])
    return float(mutual_info_score(labels, probabilities.argmax(axis=1)) - entropy)


def trans_rate(features: np.ndarray, labels: np.ndarray, eps: float = 1e-4) -> float:
    """TransRate: coding rate of all features less that within classes (Huang et al. 2022).

    R(Z) = 1/2 log det(I + Z^T Z / (N eps)) of centred features, and R(Z | Y) = sum_k (N_k / N) R(Z_k). The features are
    divided by the root of the sum of their squares first, so that eps means the same for every network.

    Args:
        features: (N, D).
        labels: (N,).
        eps: Distortion.
    """
    features, labels = check_features(features, labels)
    features = features / np.linalg.norm(features)
    features = features - features.mean(axis=0)

    def rate(rows: np.ndarray) -> float:
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows  # of equal determinant
        return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram / (len(rows) * eps))[1])

    return rate(features) - sum((labels == k).mean() * rate(features[labels == k]) for k in range(labels.max() + 1))


# -- All of them.

# Name -> what it is called in tables, in the order of these.
LABELS = {
    'random_minus_fixed': 'random init minus fixed',
    'fixed_accuracy': 'fixed features above chance',
    'fisher': 'normalised Fisher score',
    'emd': 'EMD domain similarity',
    'random_init': 'random init accuracy',
    'fixed_top1': 'fixed features accuracy',
    'log_me': 'LogME',
    'leep': 'LEEP',
    'nce': 'NCE',
    'h_score': 'H-score (shrunk)',
    'trans_rate': 'TransRate',
}
# Those that compare networks on one data set; EMD and the Fisher score depend on the scale or width of the features.
RANKING = ('fixed_top1', 'log_me', 'leep', 'nce', 'h_score', 'trans_rate')

# A network from random weights whose training loss is above this share of chance's has not been trained to its end.
_UNTRAINED = 0.5


@dataclass
class Measures:
    """What was measured.

    Attributes:
        values: By the names of `LABELS`; accuracies in percent.
        missing: For each measure that is left out, why.
        images: Training images.
        classes: Classes.
    """
    values: dict[str, float]
    missing: dict[str, str]
    images: int
    classes: int


def measure(
        train: Features,
        val: Features,
        class_names: Optional[Sequence[str]] = None,
        source: Optional[tuple[np.ndarray, np.ndarray]] = None,
        random_init: Optional[Callable[[], tuple[float, float]]] = None,
) -> Measures:
    """Compute every measure that can be.

    Args:
        train: Features of the training images: all measures are of these.
        val: Features of the validation images: the accuracy of fixed features is of these.
        class_names: Name of each label.
        source: Mean features (Ks, D) of the classes of the source data, and their weights (Ks,).
        random_init: Trains the network from random weights and gives its accuracy in percent and last training loss.
    """
    features, labels = check_features(train.pooled, train.labels, class_names)
    classes = int(labels.max()) + 1
    top1, chance = fixed_feature_accuracy(train.pooled, train.labels, val.pooled, val.labels), 100 / classes
    values = dict(
        fixed_top1=top1, fixed_accuracy=100 * (top1 - chance) / (100 - chance), fisher=fisher_score(features, labels),
        log_me=log_me(features, labels), h_score=h_score(features, labels), trans_rate=trans_rate(features, labels))
    missing = dict(
        leep='the weights have no classifier of the source classes',
        nce='the weights have no classifier of the source classes',
        emd='needs images of the source data: --source-dir DIR',
        random_minus_fixed='needs training from scratch: --random-init EPOCHS')
    if train.logits is not None:
        probabilities = train.probabilities()
        values.update(leep=leep(probabilities, labels), nce=nce(probabilities, labels))
    if source is not None:
        values['emd'] = domain_similarity(*source, *class_means(train.pooled, labels))
    if random_init is not None:
        values['random_init'], loss = random_init()
        difference, limit = values['random_init'] - top1, _UNTRAINED * math.log(classes)
        if difference < 0 and not loss <= limit:  # more epochs could change its sign
            missing['random_minus_fixed'] = (
                f'not trained long enough: {difference:.1f} at a training loss of {loss:.2f}, above {limit:.2f}; more '
                f'--random-init EPOCHS')
        else:
            values['random_minus_fixed'] = difference
    return Measures(values, {name: why for name, why in missing.items() if name not in values}, len(labels), classes)
