import numpy as np
import pytest
from scipy.stats import spearmanr

from rewardmodel.partial import partial_correlation, signed_ranks


def names(count, size=1):
    return [f"prompt-{number // size}" for number in range(count)]


def test_signed_ranks_by_hand():
    """With the negatives: 2, -1, 0, -2, 1, 0; ranks 6, 2, 3.5, 1, 5, 3.5; less 3.5."""
    assert signed_ranks(np.array([2.0, -1.0, 0.0])).tolist() == [2.5, -1.5, 0.0]


def test_it_is_the_partial_correlation_of_ranks_over_both_orders():
    """Equality with the textbook formula on scipy's Spearman correlations."""
    generator = np.random.default_rng(0)
    one, other, given = generator.normal(size=(3, 50))
    other = other + one
    r12, r13, r23 = (spearmanr(np.r_[a, -a], np.r_[b, -b]).statistic for a, b in ((one, other), (one, given), (other, given)))
    found = partial_correlation(one, other, given, names(50))
    assert found.value == pytest.approx((r12 - r13 * r23) / ((1 - r13**2) * (1 - r23**2)) ** 0.5)
    assert found.low < found.value < found.high


def test_it_is_the_correlation_of_what_a_regression_on_the_third_leaves():
    generator = np.random.default_rng(3)
    one, other, given = (signed_ranks(values) for values in generator.normal(size=(3, 80)))
    one, other = one + 0.5 * given, other - given
    found = partial_correlation(one, other, given, names(80))
    ranks = [signed_ranks(values) for values in (one, other, given)]
    left = [values - (values @ ranks[2]) / (ranks[2] @ ranks[2]) * ranks[2] for values in ranks[:2]]
    assert found.value == pytest.approx(left[0] @ left[1] / (left[0] @ left[0] * (left[1] @ left[1])) ** 0.5)


def test_two_that_share_a_cause_are_not_correlated_given_the_cause():
    generator = np.random.default_rng(1)
    cause = generator.normal(size=4000)
    one, other = cause + generator.normal(size=4000), cause + generator.normal(size=4000)
    unrelated = generator.normal(size=4000)
    assert partial_correlation(one, other, unrelated, names(4000), samples=100).value > 0.4
    assert abs(partial_correlation(one, other, cause, names(4000), samples=100).value) < 0.05


def test_swapping_a_pair_changes_nothing():
    generator = np.random.default_rng(2)
    columns = generator.normal(size=(3, 40))
    turned = columns * generator.choice([-1.0, 1.0], size=40)
    assert partial_correlation(*columns, names(40)).value == pytest.approx(partial_correlation(*turned, names(40)).value)


def test_a_steady_growth_of_the_scores_changes_nothing():
    columns = np.random.default_rng(4).normal(size=(3, 40))
    assert partial_correlation(columns[0] ** 3, *columns[1:], names(40)) == partial_correlation(*columns, names(40))


def test_the_interval_respects_prompts():
    """Every pair ten times over in its prompt says no more than once: the interval stays as wide."""
    columns = np.random.default_rng(5).normal(size=(3, 60))
    once = partial_correlation(*columns, names(60), samples=2000)
    often = partial_correlation(*np.repeat(columns, 10, axis=1), names(600, 10), samples=2000)
    assert often.value == pytest.approx(once.value, abs=1e-9)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=1e-6)


def test_nothing_to_correlate_is_none():
    zero, some = np.zeros(5), np.arange(5.0)
    assert partial_correlation(zero, some, some**2, names(5)) is None
    assert partial_correlation(some, some, some, names(5)) is None
    assert partial_correlation(np.zeros(0), np.zeros(0), np.zeros(0), []) is None
