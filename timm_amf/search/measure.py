"""All measures of one data set under one network."""
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np

from timm_amf.search import transferability as tr
from timm_amf.search.features import Features

__all__ = ['LABELS', 'RANKING', 'Measures', 'measure']

_logger = logging.getLogger(__name__)

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

    Raises:
        UserError: If the features or labels cannot be measured.
    """
    features, labels = tr.check_features(train.pooled, train.labels, class_names)
    result = Measures({}, {}, len(labels), int(labels.max()) + 1)
    values, missing = result.values, result.missing
    values['fixed_top1'], penalty = tr.fixed_feature_accuracy(train.pooled, train.labels, val.pooled, val.labels)
    _logger.info(f'Logistic regression on fixed features: C = {penalty:g}.')
    chance = 100 / result.classes
    values['fixed_accuracy'] = 100 * (values['fixed_top1'] - chance) / (100 - chance)
    values['fisher'] = tr.fisher_score(features, labels)
    values['log_me'] = tr.log_me(features, labels)
    values['h_score'] = tr.h_score(features, labels)
    values['trans_rate'] = tr.trans_rate(features, labels)
    probabilities = train.probabilities()
    if probabilities is not None:
        values['leep'] = tr.leep(probabilities, labels)
        values['nce'] = tr.nce(probabilities, labels)
    else:
        missing['leep'] = missing['nce'] = 'the weights have no classifier of the source classes'
    if source is not None:
        means, weights = tr.class_means(train.pooled.astype(np.float64), labels)
        values['emd'] = tr.domain_similarity(*source, means, weights)
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
