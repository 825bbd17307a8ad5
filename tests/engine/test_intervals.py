"""Intervals against scipy's and against values from the literature."""
import numpy as np
import pytest
from scipy import stats

from timm_amf.engine.intervals import mean_interval, t_quantile, wilson_interval


@pytest.mark.parametrize('freedom', [1, 2, 3, 4, 5, 9, 10, 31, 200])
def test_student_t(freedom):
    for p in (0.5, 0.51, 0.9, 0.975, 0.9999):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)


def test_student_t_of_the_tables():
    assert [round(t_quantile(0.975, n), 3) for n in (1, 2, 3, 4, 10, 30)] == [12.706, 4.303, 3.182, 2.776, 2.228, 2.042]


@pytest.mark.parametrize('hits, count', [(0, 5), (5, 5), (1, 1), (3, 10), (84, 100), (2790, 3333)])
@pytest.mark.parametrize('level', [0.5, 0.95, 0.999])
def test_wilson(hits, count, level):
    expected = stats.binomtest(hits, count).proportion_ci(level, 'wilson')
    low, high = wilson_interval(hits, count, level)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= hits / count <= high <= 1


def test_wilson_of_the_literature():
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, Table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_mean_over_runs():
    values = [94.86, 94.80, 94.91, 94.85]
    mean, deviation, low, high = mean_interval(values, 0.9)
    assert mean == pytest.approx(np.mean(values)) and deviation == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert mean_interval([50., 50.])[1:] == (0., 50., 50.)
