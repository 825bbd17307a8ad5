"""How sure an accuracy is: over the images of a test set, and over runs."""
import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

__all__ = ['holm', 'mean_interval', 'paired_p', 't_quantile', 'wilson_interval']


def wilson_interval(hits: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, `hits` of `count`.

    It says what other images of the same kind could have given, for this one network (Wilson, "Probable inference, the
    law of succession, and statistical inference", 1927). Unlike the normal approximation it stays within 0 and 1, and
    has a width where all or none are hits.

    Args:
        hits: 0 to `count`.
        count: Above 0.
        level: Confidence, between 0 and 1.

    Returns:
        Lower and upper limit, 0 to 1.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the limits are 0 and 1 exactly; rounding must not put the share outside.
    return 0. if hits == 0 else centre - half, 1. if hits == count else centre + half


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float, float]:
    """Mean of the values of several runs, and Student's interval of what it would be over many more.

    It holds the test images fixed: it says what other seeds would give, not what other images would.

    Args:
        values: Two at least.
        level: Confidence, between 0 and 1.

    Returns:
        Mean, standard deviation (with n - 1 in the denominator, ddof 1), lower and upper limit.
    """
    mean, deviation = fmean(values), stdev(values)
    half = t_quantile((1 + level) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return mean, deviation, mean - half, mean + half


def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t distribution, above its median.

    Args:
        p: 0.5 to below 1.
        freedom: Degrees of freedom, at least 1.
    """
    within = 2 * p - 1
    low, high = 0., math.pi / 2
    for _ in range(64):  # half the angle's interval each time: to the last bit
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < within else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """P value of Student's paired test, two-sided: that pairs with no difference on average are this far apart.

    Args:
        one: Values of several runs, two at least.
        other: Values of the runs that they are paired with, of the same seeds, say.

    Returns:
        0 to 1; NaN where all differences are the same, of which the test knows no spread.
    """
    differences = [a - b for a, b in zip(one, other)]
    deviation = stdev(differences)
    if deviation <= 1e-9 * max(map(abs, (*one, *other))):  # rounding
        return math.nan
    t = fmean(differences) / (deviation / math.sqrt(len(differences)))
    freedom = len(differences) - 1
    return 1 - _within(math.atan(abs(t) / math.sqrt(freedom)), freedom)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979).

    All that are at most x together reject a true hypothesis with a probability of at most x.

    Args:
        p_values: Of each comparison; NaN, of one that was no test, counts as a comparison and stays NaN.
    """
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    corrected, highest = [math.nan] * len(p_values), 0.
    for rank, i in enumerate(order):
        if not math.isnan(p_values[i]):
            highest = corrected[i] = max(highest, min(1., (len(order) - rank) * p_values[i]))
    return corrected


def _within(angle: float, freedom: int) -> float:
    """P(|t| < sqrt(freedom) tan(angle)), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.), 0.
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
