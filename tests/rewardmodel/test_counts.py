import pytest

from rewardmodel.counts import encode_counted
from tests.training.tiny import llama, user
from training.encode import Encoder
from training.ledger import Ledger
from training.rankings import RankedPrompt, RaterRanking

LONG = "the cat sat on a red mat and ate some fish while two dogs ran home in rain. " * 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder.load(llama(tmp_path_factory.mktemp("model") / "m"), max_prompt_tokens=30, max_completion_tokens=30)


def prompt(key, texts, *rankings, text="a cat"):
    return RankedPrompt(key, key, "train", user(text), texts, list(rankings))


def said(*bands, uid="", weight=1.0, displayed=()):
    return RaterRanking(bands, rater="r", uid=uid, weight=weight, displayed=displayed)


def counted(encoder, *prompts, ties="davidson"):
    return encode_counted(prompts, encoder, Ledger("completions"), ties=ties)


def test_every_ranking_that_teaches_nothing_is_listed_with_its_reason(encoder):
    _, counts = counted(
        encoder,
        prompt("a", ["sat.", "ran.", LONG], said((2,), (0,), uid="lost"), said((0,), (1,), uid="fine"), said((0,), uid="alone")),
        prompt("b", ["sat.", "ran."], said((0,), (1,), uid="gone"), text=LONG),
        prompt("c", ["sat.", "ran."], said((0,), (1,), uid="weightless", weight=0.0), said((0, 1), uid="tied")),
        ties="drop",
    )
    assert counts["rankings_left_out_keys"] == {
        "fewer than two of its completions are left": ["lost", "gone"],
        "fewer than two completions were ranked": ["alone"],
        "its weight is 0": ["weightless"],
        "nothing but ties": ["tied"],
    }
    assert sum(counts["rankings_left_out"].values()) == 5
    assert (counts["prompts"], counts["rankings"]) == (2, 5)


def test_ties_that_teach_are_not_left_out_but_counted(encoder):
    _, counts = counted(encoder, prompt("a", ["sat.", "ran.", "ate."], said((0, 1), (2,)), said((0, 1, 2))))
    assert counts["rankings_left_out"] == {}
    assert (counts["preference_pairs"], counts["tied_pairs"]) == (2, 4)
    assert counts["tied_pairs_keys"] == ["a/r"]


def test_a_ranking_that_lost_a_completion_is_used_and_listed(encoder):
    items, counts = counted(encoder, prompt("a", ["sat.", LONG, "ran."], said((1,), (2,), (0,), displayed=(2, 1, 0))))
    assert (counts["rankings_shortened"], counts["rankings_shortened_keys"]) == (1, ["a/r"])
    assert items[0].rankings[0].bands == ((1,), (0,))
    assert items[0].rankings[0].displayed == (1, 0)


def test_pairs_that_no_model_can_tell_apart_are_counted(encoder):
    _, counts = counted(encoder, prompt("a", ["sat.", "ran.", "sat."], said((0,), (1,), (2,)), said((0, 2), (1,)), said((0,), (1,))))
    assert counts["pairs_of_equal_completions"] == 2
    assert counts["pairs_of_equal_completions_keys"] == ["a/r"]
