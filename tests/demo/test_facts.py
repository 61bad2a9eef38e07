"""The demo's task: what the grammar writes, and what counts as having said a fact."""

import random

import pytest

from demo.facts import FLAWLESS, OPTIONAL, SLOTS, Defects, corpus, prompt_text, prompts, random_facts, read_prompt
from demo.measure import facts_said, fluency_faults, judge, mean_with_interval, wins

PROMPT = "item: kite; colour: red; found at: duck pond; day: Monday"
GOOD = "A red kite was found at the duck pond on Monday."


def test_a_text_that_is_no_slip_is_refused_with_the_piece() -> None:
    for text in ("", "item: dragon", "colour red", "item: kite; mood: gloomy"):
        with pytest.raises(ValueError, match="is no fact of the demo"):
            read_prompt(text)


def test_a_slip_reads_back_as_the_facts_it_was_made_of() -> None:
    rng = random.Random(3)
    for _ in range(200):
        facts = random_facts(rng)
        assert read_prompt(prompt_text(facts)) == facts
        assert 3 <= len(facts) <= 6


def test_prompts_differ_and_are_the_same_for_the_same_seed() -> None:
    first = prompts(300, seed=5)
    assert len(set(first)) == 300
    assert first == prompts(300, seed=5) != prompts(300, seed=6)


def test_no_value_belongs_to_two_slots() -> None:
    values = [value for slot in SLOTS.values() for value in slot]
    assert len(set(values)) == len(values)


def test_a_flawless_notice_says_everything_and_is_fluent() -> None:
    for row in corpus(1500, seed=1, defects=FLAWLESS):
        verdict = judge(row["prompt"], row["completion"])
        assert (verdict.facts_said, verdict.fluency, verdict.invented) == (1.0, 1.0, 0), row
        assert verdict.utility == pytest.approx(6.0), row


def test_the_corpus_drops_about_the_share_of_facts_that_it_should() -> None:
    rows = list(corpus(4000, seed=2, defects=Defects(drop=0.3, repeat=0.0, empty_talk=0.0)))
    optional = dropped = 0
    for row in rows:
        verdict = judge(row["prompt"], row["completion"])
        optional += verdict.asked - 1  # the item is never dropped
        dropped += verdict.asked - verdict.said
        assert verdict.invented == 0
    assert dropped / optional == pytest.approx(0.3, abs=0.02)


def test_the_corpus_is_the_same_for_the_same_seed() -> None:
    assert list(corpus(50, seed=9)) == list(corpus(50, seed=9)) != list(corpus(50, seed=10))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        PROMPT,
        "item kite colour red found at duck pond day Monday",
        "kite red duck pond Monday",
        "Kites, ponds and Mondays are red.",
        "No red kite was found at the duck pond on Monday.",
        "A red kite was not found at the duck pond on Monday.",
    ],
)
def test_nothing_is_said_by_silence_echo_word_lists_or_denial(text: str) -> None:
    assert facts_said(PROMPT, text) == 0.0


def test_a_list_of_all_values_earns_nothing() -> None:
    for slot in OPTIONAL:
        everything = " ".join(f"A red kite was found on {value} at the {value} with {value} by the {value}." for value in SLOTS[slot])
        prompt = prompt_text({"item": "kite", slot: SLOTS[slot][0]})
        without = facts_said(prompt, "A kite was found.")
        assert facts_said(prompt, everything) <= without, slot


def test_a_wrong_value_does_not_count_and_is_an_invention() -> None:
    verdict = judge(PROMPT, "A blue kite was found at the duck pond on Monday.")
    assert (verdict.said, verdict.asked, verdict.invented) == (3, 4, 1)


def test_a_fact_that_was_not_asked_for_is_an_invention() -> None:
    verdict = judge(PROMPT, GOOD[:-1] + " by the baker.")
    assert (verdict.said, verdict.invented) == (4, 1)


def test_facts_count_in_other_words_than_the_grammar_s() -> None:
    assert facts_said(PROMPT, "On Monday we saw a red kite lying near the duck pond.") == 1.0
    prompt = "item: teapot; mark: a brass bell; finder: baker; waits at: chapel"
    assert facts_said(prompt, "The baker found the teapot that has a brass bell. It is kept at the chapel.") == 1.0


def test_found_at_and_waits_at_are_told_apart() -> None:
    prompt = "item: teapot; waits at: chapel; day: Friday"
    assert facts_said(prompt, "A teapot was found at the chapel on Friday.") == pytest.approx(2 / 3)


def test_repeating_a_notice_says_no_more_and_is_worth_less() -> None:
    once, twice = judge(PROMPT, GOOD), judge(PROMPT, f"{GOOD} {GOOD} {GOOD}")
    assert twice.facts_said == once.facts_said == 1.0
    assert twice.fluency <= 0.25
    assert twice.utility < once.utility - 0.7


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        ("A red kite was found", "no full stop"),
        ("a red kite was found.", "no capital"),
        ("A red kite.", "no clause"),
        ("A orange kite was found.", "a for an"),
        ("An red kite was found.", "a for an"),
        ("A red red kite was found.", "word twice running"),
        ("A kite was found on Monday. It was on Monday.", "fact repeated"),
        ("A kite was found. What a lovely day it was.", "empty talk"),
        ("A kite was found. It is red. It has a brass bell.", "more than two sentences"),
    ],
)
def test_each_fault_of_writing_is_named(text: str, fault: str) -> None:
    assert fault in fluency_faults(text)
    assert not fluency_faults(GOOD)


def test_utility_prefers_complete_then_fluent_then_short() -> None:
    complete = judge(PROMPT, GOOD).utility
    assert complete > judge(PROMPT, "A red kite was found on Monday.").utility > judge(PROMPT, "A kite was found.").utility
    assert complete > judge(PROMPT, GOOD + " What a lovely day it was.").utility > judge(PROMPT, "A kite was found.").utility
    long = GOOD[:-1] + ", as " + "everybody in this town will surely be glad to hear today because we like good news so very much indeed."
    assert complete > judge(PROMPT, long).utility


def test_the_interval_holds_prompts_together() -> None:
    """Two prompts, each with ten equal samples: the mean is 0.5, and resampling two prompts gives 0, 0.5 or 1."""
    mean, low, high = mean_with_interval([0.0] * 10 + [1.0] * 10, ["a"] * 10 + ["b"] * 10)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="at least one value"):
        mean_with_interval([], [])


def test_equal_utilities_are_half_a_win() -> None:
    assert [wins(1, 1), wins(2, 1), wins(1, 2)] == [0.5, 1.0, 0.0]
