import numpy as np
import pytest

from rewardmodel.raters import agreements, rater_weights, reweighted, shrink
from training.rankings import EncodedRanking, RaterRanking


def said(rater, *bands, weight=1.0):
    return RaterRanking(tuple(map(tuple, bands)), rater, weight)


def panel(qualities, prompts, *, seed=0, each=None):
    """Prompts of two completions; rater r says the truth with probability qualities[r]. each: how many prompts rater r ranks."""
    generator = np.random.default_rng(seed)
    found = []
    for prompt in range(prompts):
        rankings = []
        for rater, quality in enumerate(qualities):
            if each is None or prompt < each[rater]:
                right = generator.random() < quality
                rankings.append(said(f"r{rater}", [0], [1]) if right else said(f"r{rater}", [1], [0]))
        found.append((rankings, 2))
    return found


def mean_weight(prompts, weights):
    rankings = [ranking for rankings, _ in prompts for ranking in rankings]
    return sum(one.weight * weights[one.rater] for one in rankings) / sum(one.weight for one in rankings)


def test_without_overlap_all_weigh_one():
    prompts = [([said(f"r{number % 3}", [0], [1])], 2) for number in range(30)]
    assert rater_weights(prompts) == {"r0": 1.0, "r1": 1.0, "r2": 1.0}
    assert rater_weights([]) == {}
    # The same person twice is no second opinion, and nobody's name is nobody.
    assert rater_weights([([said("a", [0], [1]), said("a", [1], [0])], 2)] * 5) == {"a": 1.0}
    assert rater_weights([([said("", [0], [1]), said("", [1], [0])], 2)] * 5) == {"": 1.0}


def test_agreement_by_hand():
    """Three completions. a: 0, 1, 2. b: 0 and 1 tied, then 2. c: 2, then 1 (and says nothing of 0).

    Pair (0, 1): a strict, b tied: a and b 1/2. (0, 2): a and b alike: 1. (1, 2): a and b alike, c opposite: a and b 1/2, c 0.
    """
    found = agreements([([said("a", [0], [1], [2]), said("b", [0, 1], [2]), said("c", [2], [1])], 3)])
    assert found == {"a": [pytest.approx(2 / 3)], "b": [pytest.approx(2 / 3)], "c": [0.0]}


def test_shrinking_by_hand():
    """a: 1, 1, 0, 0 (mean 1/2); b: 1, 1, 1, 1. sigma^2 = 1 / 6; precision 24 each; centre 3/4; Q = 48 / 16 = 3.

    tau^2 = (3 - 1) / (48 - 24) = 1/12.

    Each keeps tau^2 / (tau^2 + sigma^2 / 4) = (1/12) / (1/12 + 1/24) = 2/3 of its distance of 1/4: 3/4 -+ 1/6."""
    agreed = shrink({"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0] * 4})
    assert agreed.mean == pytest.approx(0.75)
    assert agreed.shrunk == {"a": pytest.approx(0.75 - 1 / 6), "b": pytest.approx(0.75 + 1 / 6)}


def test_a_rater_at_random_weighs_little_and_the_mean_is_one():
    prompts = panel([0.9, 0.9, 0.9, 0.5], 300)
    weights = rater_weights(prompts)
    assert weights["r3"] < 0.35
    assert all(weights[name] > 1.0 for name in ("r0", "r1", "r2"))
    assert mean_weight(prompts, weights) == pytest.approx(1.0)


def test_weights_are_in_proportion_to_the_one_coin_model():
    """2q - 1 is 0.9 and 0.3 for q = 0.95 and 0.65. Others of a good rater are (0.9, 0.3, 0.3) / 3, of a poor one (0.9, 0.9, 0.3) / 3: so
    agreement beyond chance is 0.45 and 0.21, a ratio of 15 / 7."""
    weights = rater_weights(panel([0.95, 0.95, 0.65, 0.65], 3000))
    assert weights["r0"] / weights["r2"] == pytest.approx(15 / 7, rel=0.12)


def test_alike_raters_weigh_alike():
    weights = rater_weights(panel([0.8] * 5, 200))
    assert all(weight == pytest.approx(1.0, abs=0.1) for weight in weights.values())


def test_few_rankings_say_little_about_a_rater():
    """Two raters at random: the one with 300 rankings is known to be, the one with 4 is still near the mean."""
    weights = rater_weights(panel([0.9, 0.9, 0.9, 0.5, 0.5], 300, each=[300, 300, 300, 300, 4]))
    assert weights["r3"] < weights["r4"]


def test_who_contradicts_everybody_weighs_nothing_and_never_less():
    weights = rater_weights(panel([0.95, 0.95, 0.95, 0.05], 200))
    assert weights["r3"] == 0.0


def test_where_nobody_agrees_more_than_chance_all_weigh_one():
    prompts = [([said("a", [0], [1]), said("b", [1], [0])], 2)] * 20
    assert rater_weights(prompts) == {"a": 1.0, "b": 1.0}


def test_a_rankings_own_weight_stays():
    item = EncodedRanking("k", "d", [1], [[2], [3]], [0, 1], [said("a", [0], [1], weight=2.0), said("b", [1], [0])], ["x", "y"])
    (found,) = reweighted([item], {"a": 1.5, "b": 0.5})
    assert [ranking.weight for ranking in found.rankings] == [3.0, 0.5]
    assert [ranking.weight for ranking in item.rankings] == [2.0, 1.0]
