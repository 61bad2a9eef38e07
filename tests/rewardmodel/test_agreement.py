import math

import numpy as np
import pytest

from rewardmodel.accuracy import Judged
from rewardmodel.agreement import accuracy_by_agreement, ceiling
from training.rankings import RaterRanking


def judged(prompt, scores, *rankings):
    return Judged(prompt, scores, [RaterRanking(tuple(map(tuple, bands))) for bands in rankings])


FIRST, SECOND, EQUAL = [[0], [1]], [[1], [0]], [[0, 1]]


def crowd(shares, *, raters, seed=0, knows=True):
    """One pair a prompt; each rater prefers the first with the prompt's share. The judge knows the shares, or nothing."""
    generator = np.random.default_rng(seed)
    items = []
    for number, share in enumerate(shares):
        votes = [FIRST if generator.random() < share else SECOND for _ in range(raters)]
        scores = [math.log(share / (1 - share)) if knows else 0.0, 0.0]
        items.append(judged(str(number), scores, *votes))
    return items


def test_without_two_raters_on_a_pair_there_is_no_ceiling():
    assert ceiling([judged("a", [1.0, 0.0], FIRST), judged("b", [1.0, 0.0], FIRST, EQUAL)]) is None
    assert ceiling([]) is None


def test_agreement_ceiling_and_what_is_reached_of_it_by_hand():
    """a: first, first, second. 1 of 3 pairs of raters agree, counted for 3 raters: 1. Against the others' majority: the two for the first
    have one each way, a half each; the one for the second has two against it: 1 of 3. The judge says first: 2 of 3.
    b: first, first. 2 of 2 agree; both right against the other; the judge says second: 0 of 2.
    Together: agreement 3 / 5, leave-one-out 3 / 5, judge 2 / 5, so 2 / 3 of the ceiling; upper (1 + sqrt(0.2)) / 2."""
    found = ceiling([judged("a", [1.0, 0.0], FIRST, FIRST, SECOND), judged("b", [0.0, 1.0], FIRST, FIRST)])
    assert found.rater_agreement.value == pytest.approx(3 / 5)
    assert found.lower.value == pytest.approx(3 / 5)
    assert found.accuracy.value == pytest.approx(2 / 5)
    assert found.reached.value == pytest.approx(2 / 3)
    assert found.upper == pytest.approx((1 + 0.2**0.5) / 2)
    assert found.lower.count == 5


def test_a_tie_is_no_order_and_does_not_count():
    found = ceiling([judged("a", [1.0, 0.0], FIRST, FIRST, EQUAL)])
    assert (found.rater_agreement.value, found.lower.count) == (1.0, 2)


def test_with_equally_contested_pairs_the_upper_bound_is_the_truth():
    """All pairs 0.8: A = 0.68, an oracle reaches 0.8."""
    found = ceiling(crowd([0.8] * 3000, raters=3), samples=100)
    assert found.rater_agreement.value == pytest.approx(0.68, abs=0.02)
    assert found.upper == pytest.approx(0.8, abs=0.02)
    assert found.accuracy.value == pytest.approx(0.8, abs=0.02)


def test_what_an_oracle_reaches_lies_between_the_bounds():
    """Shares from a half to nearly one. The oracle's accuracy is the mean share, 0.745."""
    shares = np.random.default_rng(1).uniform(0.5, 0.99, size=4000)
    found = ceiling(crowd(shares, raters=5), samples=100)
    assert found.accuracy.value == pytest.approx(shares.mean(), abs=0.01)
    assert found.rater_agreement.value < found.lower.value < found.accuracy.value < found.upper
    assert found.reached.value > 1


def test_raters_who_toss_coins_leave_nothing_to_reach():
    found = ceiling(crowd([0.5] * 3000, raters=3, knows=False), samples=100)
    assert found.lower.value == pytest.approx(0.5, abs=0.02)
    assert found.accuracy.value == 0.5


def test_accuracy_by_agreement_by_hand():
    """Unanimous: a right, b wrong. Two of three: margin 1/3, c right. Split: d, neither. One rater: e, equal scores, a half."""
    rows = accuracy_by_agreement(
        [
            judged("a", [1.0, 0.0], FIRST, FIRST),
            judged("b", [0.0, 1.0], FIRST, FIRST, FIRST),
            judged("c", [0.0, 1.0], SECOND, FIRST, SECOND),
            judged("d", [3.0, 0.0], FIRST, SECOND),
            judged("e", [2.0, 2.0], FIRST),
        ]
    )
    told = {row["band"]: (row["pairs"], row["accuracy"]) for row in rows}
    assert told == {"unanimous": (2, 0.5), "up to one third": (1, 1.0), "split": (1, None), "one rater": (1, 0.5)}
    assert [row["band"] for row in rows] == ["unanimous", "up to one third", "split", "one rater"]
    assert {row["band"]: row["confidence"] for row in rows}["split"] == pytest.approx(1 / (1 + math.exp(-3)))


def test_a_tie_makes_the_raters_less_united():
    """Two for the first, one tie: margin 2 of 3."""
    (row,) = accuracy_by_agreement([judged("a", [1.0, 0.0], FIRST, FIRST, EQUAL)])
    assert row["band"] == "up to two thirds"
    assert row["margin_to"] == pytest.approx(2 / 3)


def test_swapping_all_completions_changes_nothing():
    items = crowd([0.7] * 40, raters=3)
    swapped = [
        Judged(item.prompt, item.scores[::-1], [RaterRanking(tuple((1 - band[0],) for band in one.bands)) for one in item.rankings])
        for item in items
    ]
    assert accuracy_by_agreement(items) == accuracy_by_agreement(swapped)
    assert ceiling(items) == ceiling(swapped)


def test_every_majority_pair_is_in_exactly_one_band():
    items = crowd(np.linspace(0.3, 0.9, 60), raters=4)
    assert sum(row["pairs"] for row in accuracy_by_agreement(items)) == 60
