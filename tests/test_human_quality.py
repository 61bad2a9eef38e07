"""The judges that `benchmarks.human_quality` compares, by hand. What they find is measured, not tested."""

import math

import numpy as np
import pytest
import torch

from benchmarks.quality_data import as_pairs, shortened
from benchmarks.quality_judges import Sums, difference, figure, measure, tie_model, verdicts
from rewardmodel.tie_models import Davidson, NoTies, RaoKupper
from tests.training.tiny import snapshot
from training.rankings import RankedPrompt, RaterRanking, read_rankings


def prompt(digest: str, *said: tuple[tuple[int, ...], ...]) -> RankedPrompt:
    size = sum(map(len, said[0]))
    messages = [{"role": "user", "content": digest}]
    return RankedPrompt(digest, digest, "held_out", messages, [f"text {n}" for n in range(size)], [RaterRanking(bands) for bands in said])


def test_a_judge_is_right_on_majorities_and_on_single_raters_and_half_right_where_it_sees_no_difference():
    """Prompt p, two raters: 0 before 1 twice. Prompt q, three raters: 0 before 1, 1 before 0, a tie: no majority.

    A judge of +1 and 0: right on the one majority; of single raters' pairs 2 of 2 and half of 2: 3 of 4."""
    said = verdicts([prompt("p", ((0,), (1,)), ((0,), (1,))), prompt("q", ((0,), (1,)), ((1,), (0,)), ((0, 1),))])
    found = measure(said, said.differences([[1.0, 0.0], [0.5, 0.5]]), NoTies())
    assert found["majority_accuracy"].value == 1.0
    assert found["majority_accuracy"].bottoms.sum() == 1
    assert found["accuracy"].value == 3 / 4
    assert found["log_loss"].value == pytest.approx((2 * math.log1p(math.exp(-1)) + 2 * math.log(2)) / 4)
    assert "outcome_log_loss" not in found


def test_ties_count_where_the_model_knows_them():
    """Davidson with nu = 1 and equal scores: win, loss and tie have a third each."""
    said = verdicts([prompt("p", ((0,), (1,)), ((0, 1),))])
    found = measure(said, np.zeros(1), tie_model("davidson", 1.0))
    assert found["outcome_log_loss"].value == pytest.approx(math.log(3))
    assert found["log_loss"].value == pytest.approx(math.log(2))


def test_the_tie_model_is_that_of_the_notes():
    assert isinstance(tie_model("davidson", 0.5), Davidson)
    rao_kupper = tie_model("rao_kupper", 3.0)
    assert isinstance(rao_kupper, RaoKupper)
    torch.testing.assert_close(float(rao_kupper.strength), 3.0)
    for ties, strength in (("davidson", 0.0), ("rao_kupper", 1.0), ("half", 0.0), ("drop", 0.0)):
        assert isinstance(tie_model(ties, strength), NoTies)


def test_a_difference_is_of_the_same_pairs_or_refused():
    ours = Sums(np.array([2.0, 1.0]), np.array([2.0, 2.0]))
    theirs = Sums(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    assert difference([ours], [theirs]).value == pytest.approx(1 / 4)
    assert figure([ours, theirs]).seeds == (3 / 4, 2 / 4)
    with pytest.raises(ValueError, match="same pairs"):
        difference([ours], [Sums(np.array([1.0, 1.0]), np.array([2.0, 1.0]))])


def test_shuffled_pairs_say_what_the_rankings_said_and_weigh_as_much(tmp_path):
    """Each training ranking of three becomes three rankings of two; held-out lines stay as they are."""
    file = snapshot(tmp_path / "r.jsonl", prompts=8)
    before = [row for row in read_rankings(file) if row.split == "train"]
    lines = list(as_pairs(file))
    train = [line for line in lines if line["split"] == "train"]
    assert sum(line["weight"] for line in train) == pytest.approx(sum(len(item.rankings) for item in before))
    for line in train:
        whole, pair = line["ranking"].rsplit("/", 1)
        first, second = map(int, pair.split("-"))
        (item, ranking) = next((item, one) for item in before for one in item.rankings if one.uid == whole)
        place = {index: level for level, band in enumerate(ranking.bands) for index in band}
        sign = np.sign(place[first] - place[second])
        assert line["bands"] == ([[0, 1]] if sign == 0 else [[0], [1]] if sign < 0 else [[1], [0]])
        assert [one["text"] for one in line["completions"]] == [item.completions[first], item.completions[second]]
    assert [line for line in lines if line["split"] == "held_out"]


def test_long_conversations_lose_their_oldest_turns_and_never_the_last():
    turns = [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b" * 60}, {"role": "user", "content": "c" * 90}]
    assert shortened({"prompt": turns}, 160)["prompt"] == turns[1:]
    assert shortened({"prompt": turns}, 10)["prompt"] == turns[2:]
    assert shortened({"prompt": "a text"}, 1)["prompt"] == "a text"
