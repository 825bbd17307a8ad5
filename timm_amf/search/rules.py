"""Which settings a data set wants, by its measures: Table 7 of the non-binary paper.

Plested, Shen and Gedeon, "Rethinking binary hyperparameters for deep transfer learning for image classification". The
paper has four data sets and one network, Inception-v4. Its rules are here as they stand in the paper, and so are the
numbers behind them, from which the thresholds come; another network's features have other scales, so a threshold is
approximate and what it says is never more than likely.
"""
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

__all__ = ['PAPER', 'PAPER_BLOCKS', 'Decision', 'PaperSet', 'Rule', 'RULES', 'Vote', 'decide', 'sureness']

# Inception-v4 counts `features.0` to `features.21`; "new layers" 1, 2 and 3 are the classifier and 0, 1, 2 of these.
PAPER_BLOCKS = 22
# The paper does not tell its batch size. The same authors' AMF paper has 32, with the same network and the same LRs.
PAPER_BATCH = 32


@dataclass(frozen=True)
class PaperSet:
    """A data set of the paper.

    Attributes:
        suited: The pretrained weights are well suited (Table 7's left side; section 4.6).
        classes: Number of classes (section 3.1.2).
        random_init: Accuracy from random initialisation (Table 1).
        fixed: Accuracy of fixed features (Table 1).
        emd: EMD domain similarity (Table 1).
        fisher: Normalised Fisher score (Table 1).
        lr: Best single LR (Table 2).
        gains: What each rule's setting gained alone over the default, and the sum of the two standard deviations, in
            points: re-initialised blocks (Table 3, the best of 2 and 3 layers), low LR (Table 4, 1 layer), L2-SP (Table
            5, on all layers; one run, so without deviation).
        new_layers: Of the optimal settings together (Table 6), as are the rest.
        low_lr: LR of the low layers, None where they have that of the others.
        low_layers: Number of low layers.
        head_lr: LR of the classifier.
        l2sp: (alpha, beta, number of L2-SP layers), or None.
    """
    suited: bool
    classes: int
    random_init: float
    fixed: float
    emd: float
    fisher: float
    lr: float
    gains: Mapping[str, tuple[float, float]]
    new_layers: int
    low_lr: Optional[float]
    low_layers: int
    head_lr: float
    l2sp: Optional[tuple[float, float, int]]

    @property
    def measures(self) -> dict[str, float]:
        """By the names of `Vote.measure`."""
        chance = 100 / self.classes
        return {
            'random_minus_fixed': self.random_init - self.fixed,
            'fixed_accuracy': 100 * (self.fixed - chance) / (100 - chance),
            'fisher': self.fisher,
        }


PAPER = {
    'Caltech-256-30': PaperSet(
        True, 256, 67.2, 83.4, 0.568, 1.35, 0.0025,
        dict(reinit=(84.31 - 83.69, 0.078 + 0.114), low=(83.95 - 83.69, 0.078 + 0.196), l2sp=(84.52 - 83.69, 0.)),
        1, None, 0, 0.0025, (0.01, 0.01, PAPER_BLOCKS)),
    'DTD': PaperSet(
        True, 47, 66.8, 74.6, 0.540, 3.47, 0.002,
        dict(reinit=(78.92 - 77.30, 0.726 + 0.191), low=(77.753 - 77.30, 0.726 + 0.456), l2sp=(78.32 - 77.30, 0.)),
        2, None, 0, 0.002, (0.001, 0.001, 14)),
    'Cars': PaperSet(
        False, 196, 92.7, 64.2, 0.536, 1.18, 0.025,
        dict(reinit=(94.59 - 94.59, 0.110 + 0.205), low=(94.86 - 94.59, 0.110 + 0.046), l2sp=(94.42 - 94.59, 0.)),
        1, 0.01, 8, 0.025, None),
    'Aircraft': PaperSet(
        False, 100, 88.8, 59.9, 0.557, 0.83, 0.025,
        dict(reinit=(93.56 - 93.78, 0.137 + 0.942), low=(94.32 - 93.78, 0.137 + 0.144), l2sp=(93.29 - 93.78, 0.)),
        3, 0.01, 8, 0.01, None),
}

# measure -> how far it can be trusted, and why (section 4.6). EMD similarity has no vote: "a poor predictor".
RELIABILITY = {
    'random_minus_fixed': (1.0, "the paper's best measure; its threshold is 0"),
    'fixed_accuracy': (0.5, "one half of the best measure; parts the paper's four sets"),
    'fisher': (0.25, 'less pronounced; its scale depends on the network'),
}


@dataclass(frozen=True)
class Vote:
    """What one measure says.

    Attributes:
        measure: `random_minus_fixed` (points), `fixed_accuracy` (percent, corrected for chance) or `fisher`.
        value: Its value.
        threshold: Where it changes sides, from the paper's numbers.
        score: Distance from there in units of half the distance between the paper's two sides, in [-1, 1]; above 0 for
            well-suited weights.
        reliability: How far the measure can be trusted, in [0, 1].
        why: Reason of that.
    """
    measure: str
    value: float
    threshold: float
    score: float
    reliability: float
    why: str


@dataclass(frozen=True)
class Decision:
    """Which side of Table 7 a data set is on.

    Attributes:
        suited: The weights are well suited.
        sure: How surely, in [0, 1].
        votes: Of each measure, the most reliable first.
        like: The data set of the paper on that side that the most reliable measure is nearest to.
    """
    suited: bool
    sure: float
    votes: tuple[Vote, ...]
    like: str


@dataclass(frozen=True)
class Rule:
    """A row of Table 7.

    Attributes:
        name: What it sets.
        suited: Setting for well-suited weights.
        unsuited: Setting for others.
        support: Share of the paper's own results that agree with it: for each data set, the setting alone (Tables 2 to
            5; a gain must exceed the standard deviations) and in the best combination (Table 6).
    """
    name: str
    suited: str
    unsuited: str
    support: float


def _threshold(measure: str) -> tuple[float, float]:
    """(where the sides part, half the distance of their means), in the scale of `_scaled`."""
    unsuited, suited = (
        [_scaled(measure, s.measures[measure]) for s in PAPER.values() if s.suited == side] for side in (False, True))
    half = abs(sum(suited) / len(suited) - sum(unsuited) / len(unsuited)) / 2
    if measure == 'random_minus_fixed':
        return 0., half  # section 5 says so
    return (max(unsuited) + min(suited)) / 2, half


def _scaled(measure: str, value: float) -> float:
    return math.log(max(value, 1e-12)) if measure == 'fisher' else value


def _vote(measure: str, value: float) -> Vote:
    middle, half = _threshold(measure)
    direction = -1 if measure == 'random_minus_fixed' else 1
    score = max(-1., min(1., direction * (_scaled(measure, value) - middle) / half))
    return Vote(measure, value, math.exp(middle) if measure == 'fisher' else middle, score, *RELIABILITY[measure])


def decide(measures: Mapping[str, Optional[float]]) -> Decision:
    """The side of Table 7 that the measures speak for.

    The most reliable measure decides. The others make it surer or less sure: the sureness is the mean of all scores in
    its direction, weighted by reliability, times the reliability of the best.

    Args:
        measures: Values by name of `Vote.measure`; others and None are ignored.

    Raises:
        ValueError: If there is no measure that votes.
    """
    votes = sorted(
        (_vote(name, measures[name]) for name in RELIABILITY if measures.get(name) is not None),
        key=lambda v: -v.reliability)
    if not votes:
        raise ValueError(f'none of {", ".join(RELIABILITY)} is among the measures')
    best = votes[0]
    suited = best.score > 0
    mean = sum(v.reliability * v.score for v in votes) / sum(v.reliability for v in votes)
    sure = max(0., mean if suited else -mean) * best.reliability
    side = {name: s for name, s in PAPER.items() if s.suited == suited}
    like = min(side, key=lambda n: abs(
        _scaled(best.measure, side[n].measures[best.measure]) - _scaled(best.measure, best.value)))
    return Decision(suited, sure, tuple(votes), like)


def sureness(value: float) -> str:
    """A number in [0, 1] in words; four data sets are not enough for more than `fairly sure`."""
    return next(word for limit, word in (
        (0.6, 'fairly sure'), (0.3, 'likely'), (0.1, 'weak'), (-1., 'a guess')) if value >= limit)


def _support(agrees) -> float:
    found = [x for s in PAPER.values() for x in agrees(s)]
    return sum(found) / len(found)


def _gained(s: PaperSet, what: str) -> bool:
    gain, deviation = s.gains[what]
    return gain > deviation


RULES = {
    'lr': Rule('learning rate', 'low', 'high', _support(lambda s: [(s.lr < 0.01) == s.suited])),
    'l2sp': Rule('L2-SP', 'yes', 'no (L2)', _support(
        lambda s: [_gained(s, 'l2sp') == s.suited, (s.l2sp is not None) == s.suited])),
    'reinit': Rule('more blocks re-initialised', 'yes', 'no', _support(
        lambda s: [_gained(s, 'reinit') == s.suited, (s.new_layers > 1) == s.suited])),
    'low': Rule('low LR for low blocks', 'no', 'yes', _support(
        lambda s: [_gained(s, 'low') != s.suited, (s.low_layers > 0) != s.suited])),
}
