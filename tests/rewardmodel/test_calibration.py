import math

import numpy as np
import pytest

from rewardmodel.accuracy import Judged
from rewardmodel.calibration import Pairs, calibration_error, cross_fitted, fit_temperature, halves, log_loss, preference_pairs, reliability
from training.rankings import RaterRanking


def planted(*, prompts=400, seed=0, times=1.0):
    """Raters who choose by Bradley-Terry on known scores, 10 pairs a prompt; the judge's scores are `times` those."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(scale=1.5, size=prompts * 10)
    wins = generator.random(prompts * 10) < 1 / (1 + np.exp(-truth))
    differences = np.where(wins, truth, -truth) * times
    return Pairs(differences, np.ones(len(truth)), np.repeat([f"prompt-{number}" for number in range(prompts)], 10))


def test_the_pairs_are_those_of_each_rater():
    """Two raters: 0 before 1; one: 2 tied with 1. Pairs 0-1 twice and 0-2 once, 0-2 by the second rater; no pair of 1 and 2."""
    item = Judged("a", [3.0, 1.0, 0.0], [RaterRanking(((0,), (1,))), RaterRanking(((0,), (1, 2)))])
    pairs = preference_pairs([item])
    assert sorted(zip(pairs.differences.tolist(), pairs.weights.tolist(), strict=True)) == [(2.0, 2.0), (3.0, 1.0)]
    assert preference_pairs([]).differences.shape == (0,)


def test_log_loss_by_hand():
    """Differences log 3 and -log 3: probabilities 3/4 and 1/4, the second counted three times. Equal scores: log 2."""
    pairs = Pairs(np.array([math.log(3), -math.log(3)]), np.array([1.0, 3.0]), np.array(["a", "a"]))
    assert log_loss(pairs) == pytest.approx(-(math.log(0.75) + 3 * math.log(0.25)) / 4)
    assert log_loss(Pairs(np.zeros(2), np.ones(2), np.array(["a", "b"]))) == pytest.approx(math.log(2))


def test_the_temperature_of_one_kind_of_pair_by_hand():
    """All differences 2 in size, three of four right: sigmoid(2 / T) = 3/4, so T = 2 / log 3."""
    pairs = Pairs(np.array([2.0, 2.0, 2.0, -2.0]), np.ones(4), np.array(["a", "b", "c", "d"]))
    assert fit_temperature(pairs).value == pytest.approx(2 / math.log(3), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_truth_has_temperature_1_within_its_interval_and_no_more_error_than_noise(seed):
    pairs = planted(seed=seed)
    fitted = fit_temperature(pairs)
    error = (fitted.high - fitted.low) / 2 / 1.96
    assert abs(fitted.value - 1) < 3 * error
    assert error < 0.05
    assert calibration_error(reliability(pairs, samples=100)) < 2 * 0.4 * (10 / 4000) ** 0.5


def test_twice_the_scores_are_twice_the_temperature():
    assert fit_temperature(planted(times=2.0)).value == pytest.approx(2 * fit_temperature(planted()).value, rel=1e-6)
    assert fit_temperature(planted(times=1e-3)).value == pytest.approx(1e-3 * fit_temperature(planted()).value, abs=0.01)


def test_no_temperature_near_the_fitted_one_is_more_likely():
    pairs = planted(seed=5, times=1.7)
    best = fit_temperature(pairs).value
    assert log_loss(pairs, best) <= min(log_loss(pairs, best * 1.02), log_loss(pairs, best / 1.02))


def test_scores_without_error_or_without_sense_stay_within_limits():
    """Where no pair is wrong, no temperature is too low: nothing is fitted, and the interval says that nothing is known."""
    right = Pairs(np.array([1.0, 2.0, -1.0]), np.array([1.0, 1.0, 0.0]), np.array(["a", "b", "b"]))
    fitted = fit_temperature(right)
    assert (fitted.value, fitted.low, fitted.high) == (1.0, 0.01, math.inf)
    wrong = Pairs(np.array([-1.0, -2.0]), np.ones(2), np.array(["a", "b"]))
    assert fit_temperature(wrong).value == pytest.approx(100.0)
    assert fit_temperature(Pairs(np.zeros(2), np.ones(2), np.array(["a", "b"]))).value == 1.0


def test_the_interval_of_the_temperature_grows_when_pairs_of_one_prompt_go_together():
    """Each pair ten times in the same prompt says no more than once."""
    pairs = planted(prompts=40)
    often = Pairs(np.repeat(pairs.differences, 10), np.ones(4000), np.repeat(pairs.prompts, 10))
    once, ten = fit_temperature(pairs), fit_temperature(often)
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high), rel=1e-6)


def test_no_pair_is_scaled_by_a_temperature_that_it_helped_to_fit():
    pairs = planted(prompts=60)
    temperatures = cross_fitted(pairs)
    first = halves(pairs.prompts)
    assert 10 < len(set(pairs.prompts[first])) < 50
    assert temperatures[first] == pytest.approx(fit_temperature(pairs.of(~first)).value)
    turned = Pairs(np.where(first, -pairs.differences, pairs.differences), pairs.weights, pairs.prompts)
    assert cross_fitted(turned)[first] == pytest.approx(temperatures[first])
    assert cross_fitted(pairs.of(pairs.prompts == pairs.prompts[0])) is None


def test_reliability_by_hand():
    """Ten pairs of difference 0 (1/2 predicted, 1/2 seen), ten of log 9 (0.9 predicted), eight of them right. Error (0 + 0.1) / 2."""
    differences = np.array([0.0] * 10 + [math.log(9)] * 8 + [-math.log(9)] * 2)
    pairs = Pairs(differences, np.ones(20), np.array([str(number) for number in range(20)]))
    rows = reliability(pairs)
    assert [(row["predicted"], row["observed"], row["pairs"]) for row in rows] == [
        (0.5, 0.5, 10),
        (pytest.approx(0.9), pytest.approx(0.8), 10),
    ]
    assert rows[1]["observed_low"] < 0.8 < rows[1]["observed_high"]
    assert calibration_error(rows) == pytest.approx(0.05)


def test_bins_hold_about_equal_counts_and_every_pair():
    pairs = planted(prompts=100)
    counts = [row["pairs"] for row in reliability(pairs, samples=100)]
    assert counts == [100] * 10


def test_swapping_a_pair_changes_nothing():
    """Who is named first is no information: the favoured order is looked at either way."""
    pairs = planted(prompts=30)
    assert sorted(set(np.sign(pairs.differences))) == [-1.0, 1.0]
    predicted = [row["predicted"] for row in reliability(pairs, samples=100)]
    assert all(0.5 <= value <= 1 for value in predicted)
    assert predicted == sorted(predicted)


def test_the_right_temperature_mends_scores_that_are_too_sure():
    pairs = planted(times=3.0)
    raw, mended = reliability(pairs, samples=100), reliability(pairs, cross_fitted(pairs), samples=100)
    assert calibration_error(raw) > 0.1
    assert calibration_error(mended) < 0.04
