"""Measures of how well pretrained weights fit a data set, from features computed once.

Each is a function of features (N, D) and labels (N,), or of the source classifier's probabilities (N, Z) and labels;
nothing here knows a network. Larger means a better fit, everywhere. `measure` computes them all. scikit-learn and POT
are imported where they are needed.
"""
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional, Union

import numpy as np

from timm_amf.engine.head import held_out
from timm_amf.errors import UserError
from timm_amf.search.features import Features

__all__ = [
    'LABELS', 'RANKING', 'Measures', 'check_features', 'class_means', 'domain_similarity', 'fisher_score',
    'fixed_feature_accuracy', 'h_score', 'leep', 'log_me', 'measure', 'nce', 'trans_rate',
]

_logger = logging.getLogger(__name__)

Shrinkage = Union[str, float, None]

# Inverse strengths of the logistic regression's L2 penalty, from strong to weak, for standardised features.
_C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1., 10., 100.)


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
    features, labels = _as_features(features), np.asarray(labels)
    labels, found = _check_labels(labels, len(features))
    counts = np.bincount(labels)
    if counts.min() < 2:
        which = found[counts.argmin()]
        name = class_names[which] if class_names is not None else int(which)
        raise UserError(f'class {name!r} has one image, and its spread cannot be measured; add images, or leave it out')
    varies = features.max(axis=0) > features.min(axis=0)
    if not varies.any():
        raise UserError(
            'no feature varies from image to image: the network computes nothing; check its weights and the images')
    if not varies.all():
        _logger.info(f'{(~varies).sum()} of {features.shape[1]} features are constant and left out.')
        features = features[:, varies]
    return features, labels


def _as_features(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise UserError(f'features must be an (images, features) array, not of shape {features.shape}')
    bad = ~np.isfinite(features).all(axis=1)
    if bad.any():
        raise UserError(
            f'the features of {bad.sum()} of {len(bad)} images are NaN or infinite (the first: {bad.argmax()}); check '
            f'the weights, and compute without half precision')
    return features


def _check_labels(labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels renumbered from 0, the labels that exist)."""
    if labels.shape != (number,):
        raise UserError(f'there are {number} rows, and labels of shape {labels.shape}; give one label for each')
    found, labels = np.unique(labels, return_inverse=True)
    if len(found) < 2:
        raise UserError(f'there are images of {len(found)} class only; a measure of fit needs two')
    return labels.reshape(-1), found


def class_means(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean features of each class, (K, D), and its share of the images, (K,). Labels are 0 to K - 1."""
    counts = np.bincount(labels)
    sums = np.zeros((len(counts), features.shape[1]))
    np.add.at(sums, labels, features)
    return sums / counts[:, None], counts / counts.sum()


def fixed_feature_accuracy(
        features: np.ndarray,
        labels: np.ndarray,
        eval_features: Optional[np.ndarray] = None,
        eval_labels: Optional[np.ndarray] = None,
        part: float = 0.25,
        grid: Sequence[float] = _C_GRID,
        seed: int = 0,
) -> tuple[float, float]:
    """Accuracy of a logistic regression on fixed features (Plested et al., section 4.1, Table 1).

    Features are standardised. The L2 penalty is chosen on a part of the training images, by class; then the regression
    is fitted to all of them.

    Args:
        features: Training features, (N, D).
        labels: (N,).
        eval_features: Features that the accuracy is of, (M, D). None: the part that the penalty was chosen on, which
            makes the accuracy slightly too high.
        eval_labels: (M,), of the same classes.
        part: Share of the training images that the penalty is chosen on, in (0, 1); at least one image a class.
        grid: Inverse penalties to choose from, increasing.
        seed: Of the choice of the part.

    Returns:
        Accuracy in percent, and the chosen inverse penalty.
    """
    from sklearn.base import clone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    original = np.unique(labels)
    kept, labels = check_features(features, labels)
    held = held_out(labels, part, seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(warm_start=True, max_iter=300, tol=1e-3))
    best, accuracy, worse = None, -1., 0
    with warnings.catch_warnings():
        # Penalties so weak that this happens overfit, and are not chosen.
        warnings.simplefilter('ignore', ConvergenceWarning)
        for c in grid:
            model.set_params(logisticregression__C=c).fit(kept[~held], labels[~held])
            found = 100 * model.score(kept[held], labels[held])
            worse = 0 if found > accuracy else worse + 1
            if found > accuracy:
                best, accuracy = c, found
            if worse == 2:  # beyond the best penalty, weaker ones only overfit more
                break
        if eval_features is None:
            return accuracy, best
        model = clone(model).set_params(logisticregression__C=best).fit(kept, labels)
    varies = np.ptp(np.asarray(features, dtype=np.float64), axis=0) > 0
    codes = np.where(np.isin(eval_labels, original), np.searchsorted(original, eval_labels), -1)
    return 100 * float(model.score(_as_features(eval_features)[:, varies], codes)), best


def fisher_score(features: np.ndarray, labels: np.ndarray, shrinkage: Shrinkage = 'ledoit_wolf') -> float:
    """Class-normalised Fisher score Tr(Sw^-1 Sb) / K (Plested et al., section 4.1, after Fukunaga, chapter 10).

    Sw = sum_k P_k cov_k is the covariance within classes and Sb = sum_k P_k (m_k - m)(m_k - m)^T that between them.
    With fewer images than features Sw has no inverse, and long before that its inverse is mostly noise, so it is
    shrunk: (1 - a) Sw + a Tr(Sw)/D I. The paper does not say what it did.

    Args:
        features: (N, D).
        labels: (N,), K classes.
        shrinkage: a in [0, 1]; `ledoit_wolf` estimates it (Ledoit and Wolf, 2004), and it tends to 0 with many images;
            None is the formula alone, with the pseudo-inverse.
    """
    features, labels = check_features(features, labels)
    means, shares = class_means(features, labels)
    within = features - means[labels]
    if not np.any(np.abs(within) > 1e-12 * np.abs(features).max()):
        raise UserError('the images of each class have equal features: nothing to compare the classes\' distance with')
    covariance, _ = _covariance(within, shrinkage)
    between = np.sqrt(shares)[:, None] * (means - shares @ means)
    return _trace_of_ratio(covariance, between) / len(means)


def h_score(features: np.ndarray, labels: np.ndarray, shrinkage: Shrinkage = 'ledoit_wolf') -> float:
    """H-score Tr(cov(f)^-1 cov(E[f | y])) (Bao et al. 2019).

    With shrinkage a it is that of Ibrahim et al. 2022 ("Newer is not always better"): cov(f) is shrunk and
    cov(E[f | y]) is multiplied by 1 - a.

    Args:
        features: (N, D).
        labels: (N,).
        shrinkage: As for `fisher_score`.
    """
    features, labels = check_features(features, labels)
    means, shares = class_means(features, labels)
    centre = features.mean(axis=0)
    covariance, a = _covariance(features - centre, shrinkage)
    return (1 - a) * _trace_of_ratio(covariance, np.sqrt(shares)[:, None] * (means - centre))


def _covariance(centred: np.ndarray, shrinkage: Shrinkage) -> tuple[np.ndarray, float]:
    """(D, D) covariance of centred rows, shrunk towards a multiple of the identity, and by how much."""
    from sklearn.covariance import ledoit_wolf, shrunk_covariance

    if shrinkage == 'ledoit_wolf':
        covariance, a = ledoit_wolf(centred, assume_centered=True)
        return covariance, float(a)
    a = shrinkage or 0.
    return shrunk_covariance(centred.T @ centred / len(centred), a), a


def _trace_of_ratio(covariance: np.ndarray, rows: np.ndarray) -> float:
    """Tr(S^-1 R^T R) of a covariance (D, D) and rows (K, D); with the pseudo-inverse where S has no inverse."""
    inverse = np.linalg.pinv(covariance, rcond=len(covariance) * np.finfo(float).eps, hermitian=True)
    return float(((rows @ inverse) * rows).sum())


def domain_similarity(
        source_means: np.ndarray,
        source_weights: np.ndarray,
        target_means: np.ndarray,
        target_weights: np.ndarray,
        gamma: float = 0.01,
) -> float:
    """Domain similarity exp(-gamma d), d the earth mover's distance of class means (Cui et al. 2018).

    A class is a point, its mean features, that weighs as much as its share of the images; the ground distance is
    Euclidean.

    Args:
        source_means: (Ks, D).
        source_weights: (Ks,), positive.
        target_means: (Kt, D).
        target_weights: (Kt,), positive.
        gamma: The paper's 0.01.
    """
    import ot

    source, target = _as_features(source_means), _as_features(target_means)
    if source.shape[1] != target.shape[1]:
        raise UserError(
            f'the source has {source.shape[1]} features and the target {target.shape[1]}; '
            f'compute both with one network')
    weights = [np.asarray(w, dtype=np.float64) for w in (source_weights, target_weights)]
    cost = ot.dist(source, target, metric='euclidean')
    distance = ot.emd2(*(w / w.sum() for w in weights), cost, numItermax=10_000_000)
    return float(np.exp(-gamma * distance))


def log_me(features: np.ndarray, labels: np.ndarray, max_steps: int = 100) -> float:
    """LogME: the largest log evidence of a linear model of the labels, per image (You et al. 2021).

    One Bayesian linear regression a class, on the one-hot labels, with a Gaussian prior of precision alpha and noise of
    precision beta; both by the fixed-point iteration of the paper's extended version (You et al. 2022, "Ranking and
    tuning pre-trained models"), from one singular value decomposition. Directions of features that the images do not
    span enter the log determinant with log(alpha) each, as the evidence has it; the authors' code leaves them out.

    Args:
        features: (N, D).
        labels: (N,).
        max_steps: Limit of the iteration.
    """
    features, labels = check_features(features, labels)
    u, s, _ = np.linalg.svd(features, full_matrices=False)
    targets = np.eye(labels.max() + 1)[labels]
    return float(np.mean([
        _log_evidence(s ** 2, u.T @ y, y, features.shape[1], max_steps) for y in targets.T]))


def _log_evidence(sigma: np.ndarray, x: np.ndarray, y: np.ndarray, width: int, max_steps: int) -> float:
    """Largest log evidence per image of targets y (N,), given the squared singular values and u^T y, both (r,)."""
    number, tiny = len(y), 1e-12
    outside = max(0., float(y @ y - x @ x))  # of y, what no combination of features reaches
    alpha = beta = 1.
    for _ in range(max_steps):
        ratio = alpha / beta
        gamma = (sigma / (sigma + ratio)).sum()
        norm = (sigma * x ** 2 / (ratio + sigma) ** 2).sum()
        residual = (x ** 2 / (1 + sigma / ratio) ** 2).sum() + outside
        alpha, beta = gamma / (norm + tiny), max(number - gamma, tiny) / (residual + tiny)
        if abs(alpha / beta - ratio) <= 1e-6 * ratio:
            break
    ratio = alpha / beta
    norm = (sigma * x ** 2 / (ratio + sigma) ** 2).sum()
    residual = (x ** 2 / (1 + sigma / ratio) ** 2).sum() + outside
    log_det = np.log(alpha + beta * sigma).sum() + (width - len(sigma)) * np.log(alpha)
    return 0.5 / number * (
        width * np.log(alpha) + number * np.log(beta / (2 * np.pi)) - beta * residual - alpha * norm - log_det)


def leep(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """LEEP: log expected empirical prediction (Nguyen et al. 2020). At most 0.

    The source classifier's probabilities theta(x)_z and the labels give P(y, z), and the prediction sum_z P(y | z)
    theta(x)_z; LEEP is the mean log of that for the true labels.

    Args:
        probabilities: Of the source classes, (N, Z).
        labels: (N,).
    """
    labels = np.unique(labels, return_inverse=True)[1]
    joint = class_means(probabilities, labels)[0] * (np.bincount(labels) / len(labels))[:, None]
    conditional = joint / np.maximum(joint.sum(axis=0), np.finfo(float).tiny)
    expected = (conditional[labels] * probabilities).sum(axis=1)
    return float(np.log(expected).mean())


def nce(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """NCE: negative conditional entropy -H(Y | Z) in nats (Tran et al. 2019). At most 0.

    Z is the source class of the largest probability.

    Args:
        probabilities: Of the source classes, (N, Z).
        labels: (N,).
    """
    labels = np.unique(labels, return_inverse=True)[1]
    joint = np.zeros((labels.max() + 1, probabilities.shape[1]))
    np.add.at(joint, (labels, probabilities.argmax(axis=1)), 1 / len(labels))
    marginal = np.broadcast_to(joint.sum(axis=0), joint.shape)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / marginal[some])).sum())


def trans_rate(features: np.ndarray, labels: np.ndarray, eps: float = 1e-4, scaled: bool = True) -> float:
    """TransRate: coding rate of all features less that within classes (Huang et al. 2022).

    R(Z) = 1/2 log det(I + Z^T Z / (N eps)) of centred features, and R(Z | Y) = sum_k (N_k / N) R(Z_k).

    Args:
        features: (N, D).
        labels: (N,).
        eps: Distortion.
        scaled: Divide the features by the root of the sum of their squares first, so that eps means the same for every
            network; the formula of the paper does not.
    """
    features, labels = check_features(features, labels)
    if scaled:
        features = features / np.linalg.norm(features)
    features = features - features.mean(axis=0)
    within = sum(
        (labels == k).mean() * _coding_rate(features[labels == k], eps) for k in range(labels.max() + 1))
    return _coding_rate(features, eps) - within


def _coding_rate(rows: np.ndarray, eps: float) -> float:
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows  # of equal determinant
    return float(0.5 * np.linalg.slogdet(np.eye(len(gram)) + gram / (len(rows) * eps))[1])


# -- All of them.

# Name -> what it is called in tables.
LABELS = {
    'random_minus_fixed': 'random init minus fixed',
    'random_init': 'random init accuracy',
    'fixed_accuracy': 'fixed features above chance',
    'fixed_top1': 'fixed features accuracy',
    'fisher': 'normalised Fisher score',
    'emd': 'EMD domain similarity',
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
    missing: dict[str, str] = field(default_factory=dict)
    images: int = 0
    classes: int = 0


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
    result = Measures({}, {}, len(labels), int(labels.max()) + 1)
    values, missing = result.values, result.missing
    values['fixed_top1'], penalty = fixed_feature_accuracy(train.pooled, train.labels, val.pooled, val.labels)
    _logger.info(f'Logistic regression on fixed features: C = {penalty:g}.')
    chance = 100 / result.classes
    values['fixed_accuracy'] = 100 * (values['fixed_top1'] - chance) / (100 - chance)
    values['fisher'] = fisher_score(features, labels)
    values['log_me'] = log_me(features, labels)
    values['h_score'] = h_score(features, labels)
    values['trans_rate'] = trans_rate(features, labels)
    probabilities = train.probabilities()
    if probabilities is not None:
        values['leep'] = leep(probabilities, labels)
        values['nce'] = nce(probabilities, labels)
    else:
        missing['leep'] = missing['nce'] = 'the weights have no classifier of the source classes'
    if source is not None:
        means, weights = class_means(train.pooled.astype(np.float64), labels)
        values['emd'] = domain_similarity(*source, means, weights)
    else:
        missing['emd'] = 'needs images of the source data: --source-dir DIR'
    if random_init is not None:
        values['random_init'], loss = random_init()
        difference = values['random_init'] - values['fixed_top1']
        limit = _UNTRAINED * math.log(result.classes)
        if difference < 0 and not loss <= limit:  # more epochs could change its sign
            missing['random_minus_fixed'] = (
                f'not trained long enough: {difference:.1f} at a training loss of {loss:.2f}, above {limit:.2f}; more '
                f'--random-init EPOCHS')
        else:
            values['random_minus_fixed'] = difference
    else:
        missing['random_minus_fixed'] = 'needs training from scratch: --random-init EPOCHS'
    return result
