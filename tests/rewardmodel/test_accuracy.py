from dataclasses import replace

import numpy as np
import pytest

from rewardmodel.accuracy import Judged, accuracy, clustered_interval
from training.rankings import RaterRanking


def judged(prompt, scores, *rankings):
    return Judged(prompt, scores, [RaterRanking(tuple(map(tuple, bands))) for bands in rankings])


def test_without_a_pair_there_is_no_accuracy():
    assert accuracy([judged("a", [1.0, 2.0], [[0, 1]])]) is None
    assert accuracy([]) is None


def test_pairs_are_counted_by_hand_and_equal_scores_are_half():
    """Rater 1: 0 > 1 > 2 with scores 3, 1, 1: right, right, half. Rater 2: 1 > 0, 2 tied with 0: wrong; 1 > 2: half. 3 of 5 pairs."""
    result = accuracy([judged("a", [3.0, 1.0, 1.0], [[0], [1], [2]], [[1], [0, 2]])])
    assert result.pairs == 5
    assert result.share == pytest.approx(3.0 / 5)


def test_a_majority_pair_counts_once_and_an_even_one_not_at_all():
    """0 before 1 and 0 before 2 by two raters of three; 1 and 2 are even: one each, and tied by the third. Two pairs, both wrong."""
    rankings = [[0], [1], [2]], [[0], [1, 2]], [[2], [1], [0]]
    result = accuracy([judged("a", [0.0, 1.0, 2.0], *rankings)], majority=True)
    assert (result.pairs, result.share) == (2, 0.0)


def test_the_interval_grows_when_pairs_of_one_prompt_go_together():
    """40 prompts of 25 pairs, all right or all wrong: the interval is about that of 40 coins, not of 1,000."""
    tops = np.array([25.0 if n % 2 else 0.0 for n in range(40)])
    low, high = clustered_interval(tops, np.full(40, 25.0), samples=2000, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 40) ** 0.5, rel=0.15)
    assert low < 0.5 < high


def test_items_of_one_prompt_are_one_cluster():
    same = accuracy([judged("a", [1.0, 0.0], [[0], [1]]), judged("a", [1.0, 0.0], [[1], [0]])])
    assert (same.share, same.low, same.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_reproducible():
    items = [judged(str(n), [1.0, 0.0], [[n % 2], [1 - n % 2]]) for n in range(20)]
    assert accuracy(items, seed=1) == accuracy(items, seed=1)


@pytest.mark.parametrize("majority", [False, True])
def test_a_weight_of_two_is_the_ranking_twice_and_0_is_none(majority):
    right, wrong = RaterRanking(((0,), (1,))), RaterRanking(((1,), (0,)))
    points = [1.0, 0.0]
    heavy = [Judged("a", points, [replace(right, weight=2.0), wrong]), Judged("b", points, [right, replace(wrong, weight=0.0)])]
    copies = [Judged("a", points, [right, right, wrong]), Judged("b", points, [right])]
    assert accuracy(heavy, majority=majority) == accuracy(copies, majority=majority)
