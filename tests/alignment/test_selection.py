"""Best-of-n and rejection sampling: the kept texts have the distribution that is claimed, and are as near to the policy as is claimed."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from alignment import answers, generate
from alignment.answers import stream_of
from alignment.options import GenerateOptions
from alignment.rollout.sampling import Sampling
from alignment.selection import (
    acceptance_number,
    acceptance_probabilities,
    best_of_n_kl_bound,
    rejected,
    rejection_kl_bound,
    tilted_kl,
)
from tests.alignment.letters import write_ensemble, write_models, write_prompts
from tests.alignment.test_candidates import by_prompt, make, rows_of
from training.options import OptionError, parse_options

POLICY, SCORES = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.0, 1.0])


def kl(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * np.log(np.maximum(one, 1e-300) / other)).sum())


def kept_law(candidates: int, kept: int, *, beta: float, highest: float) -> np.ndarray:
    """The exact distribution of a random one of the kept texts, over all candidates and all decisions."""
    law = np.zeros(3)
    for drawn in itertools.product(range(3), repeat=candidates):
        scores = SCORES[list(drawn)].tolist()
        probabilities = acceptance_probabilities(scores, beta, highest)
        best = sorted(range(candidates), key=lambda place: -scores[place])
        for decisions in itertools.product((False, True), repeat=candidates):
            # A uniform number of 0 is accepted wherever anything is, one of 1 nowhere.
            uniforms = [0.0 if accepted else 1.0 for accepted in decisions]
            weight = POLICY[list(drawn)].prod()
            weight *= math.prod(p if accepted else 1 - p for p, accepted in zip(probabilities, decisions, strict=True))
            for place in rejected(scores, best, uniforms, beta=beta, highest=highest, kept=kept).order:
                law[drawn[place]] += weight / kept
    return law


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": "rejection"},
        {"keep": "rejection", "candidates": 4},
        {"keep": "rejection", "candidates": 8, "rejection_beta": 0},
        {"keep": "best", "candidates": 8, "highest_score": 2.0},
    ],
)
def test_a_rejection_that_cannot_be_meant_is_refused(wrong: dict):
    with pytest.raises(OptionError):
        parse_options(GenerateOptions, wrong)
    for numbers in ((3, 4), (0, 0)):
        with pytest.raises(ValueError, match="candidates"):
            best_of_n_kl_bound(*numbers)
        with pytest.raises(ValueError, match="candidates"):
            rejection_kl_bound(0.5, *numbers)
    with pytest.raises(ValueError, match="beta"):
        acceptance_probabilities([0.0], 0.0, 1.0)


def test_what_is_accepted_is_the_policy_tilted_by_the_score():
    """pi exp(s / beta) / Z, by the numbers that decide in a run. Of 4,000 prompts the total variation of chance is about .01."""
    sampling, beta, highest, chooser = Sampling(8, seed=3, step=7), 1.0, 1.5, np.random.default_rng(0)
    counts, accepted, asked = np.zeros(3), 0.0, 0
    for stream in range(4000):
        drawn = chooser.choice(3, size=8, p=POLICY)
        scores = SCORES[drawn].tolist()
        uniforms = [acceptance_number(sampling, stream, sample) for sample in range(8)]
        found = rejected(scores, list(range(8)), uniforms, beta=beta, highest=highest, kept=1)
        if found.accepted:
            counts[drawn[found.order[0]]] += 1
        accepted += found.acceptance
        asked += 1
    tilted = POLICY * np.exp(SCORES / beta)
    rate = float(tilted.sum()) * math.exp(-highest / beta)
    tilted /= tilted.sum()
    assert 0.5 * np.abs(tilted - POLICY).sum() > 0.25
    assert 0.5 * np.abs(tilted - counts / counts.sum()).sum() < 0.03
    assert accepted / asked == pytest.approx(rate, rel=0.03)
    assert counts.sum() / asked == pytest.approx(1 - (1 - rate) ** 8, abs=0.02)


@pytest.mark.parametrize(("candidates", "kept"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 3)])
def test_rejection_stays_within_its_bound_fill_ups_included(candidates: int, kept: int):
    for beta, highest in ((0.3, 1.0), (1.0, 1.0), (1.0, 3.0), (5.0, 1.0)):
        law = kept_law(candidates, kept, beta=beta, highest=highest)
        acceptance = float(POLICY @ np.array(acceptance_probabilities(SCORES.tolist(), beta, highest)))
        bound = rejection_kl_bound(acceptance, candidates, kept)
        assert law.sum() == pytest.approx(1)
        assert kl(law, POLICY) <= bound + 1e-12
        assert bound <= min(math.log(1 / acceptance), math.log(candidates / kept)) + 1e-12


def test_many_candidates_come_to_the_bound_of_the_acceptance_rate_and_certain_acceptance_costs_nothing():
    assert rejection_kl_bound(0.25, 400) == pytest.approx(math.log(4))
    assert rejection_kl_bound(1.0, 16, 2) == pytest.approx(0, abs=1e-12)
    assert rejection_kl_bound(0.0, 16, 2) == pytest.approx(math.log(8))


@pytest.mark.parametrize("candidates", [1, 2, 5, 64])
def test_best_of_n_stays_within_its_bound_and_reaches_it_without_ties(candidates: int):
    """The best of n has the distribution F(y)^n - F(y-)^n, with F the policy's distribution of scores."""
    ends = np.concatenate([[0], np.cumsum(POLICY)])
    assert kl(np.diff(ends**candidates), POLICY) <= best_of_n_kl_bound(candidates) + 1e-12
    fine = np.linspace(0, 1, 200_001)
    assert kl(np.diff(fine**candidates), np.diff(fine)) == pytest.approx(best_of_n_kl_bound(candidates), abs=1e-3)
    assert best_of_n_kl_bound(candidates) <= math.log(candidates)


def test_the_estimate_of_the_tilted_kl_is_right_on_a_table():
    drawn = np.random.default_rng(1).choice(3, size=20_000, p=POLICY)
    tilted = POLICY * np.exp(SCORES / 0.7)
    assert tilted_kl(SCORES[drawn].tolist(), 0.7) == pytest.approx(kl(tilted / tilted.sum(), POLICY), abs=0.02)
    assert tilted_kl([3.0, 3.0], 0.1) == 0


# -- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_ensemble(folder)
    write_prompts(folder / "prompts.jsonl")
    return folder


REJECTION = {"keep": "rejection", "candidates": 8, "samples": 2, "rejection_beta": 0.5, "highest_score": 2.0}


def test_a_run_keeps_what_the_numbers_say_and_reports_it(home: Path, tmp_path: Path, monkeypatch):
    everything = make(tmp_path / "all", home, samples=8)
    generate.run(everything)
    run = make(tmp_path / "run", home, **REJECTION)
    generate.run(run)
    kept, drawn = by_prompt(rows_of(run)), by_prompt(rows_of(everything))
    sampling = Sampling(8, seed=0, step=stream_of(str(home / "policy")))
    fills = 0
    for place, (key, candidates) in enumerate(drawn.items()):
        scores = [one["score"]["mean"] for one in candidates]
        numbers = [acceptance_number(sampling, place, sample) for sample in range(8)]
        probabilities = acceptance_probabilities(scores, 0.5, 2.0)
        accepted = [n for n in range(8) if numbers[n] < probabilities[n]][:2]
        rows = kept[key]
        assert [row["sample"] for row in rows if row["rejection"]["accepted"]] == accepted
        assert len(rows) == 2
        assert rows[0]["rejection"]["acceptance"] == pytest.approx(sum(probabilities) / 8, abs=1e-4)
        fills += 2 - len(accepted)
    metrics = run.result()["metrics"]
    assert 0 < fills < 48, "some prompts have two accepted texts and some have not"
    assert metrics["not_accepted_share"] == pytest.approx(fills / 48)
    bounds = [rejection_kl_bound(rows[0]["rejection"]["acceptance"], 8, 2) for rows in kept.values()]
    assert metrics["kl_bound_nats"] == pytest.approx(sum(bounds) / len(bounds))
    assert metrics["kl_bound_nats"] <= math.log(4)
    assert 0 < metrics["kl_estimate_nats"] < math.log(8)
    assert 0 <= metrics["above_highest_share"] < 1

    monkeypatch.setattr(answers, "SEQUENCES_PER_BLOCK", 8)
    other = make(tmp_path / "other", home, **REJECTION)
    generate.run(other)
    assert [row["text"] for row in rows_of(other)] == [row["text"] for row in rows_of(run)], "nothing depends on the blocks"


def test_without_a_highest_score_that_of_the_candidates_is_taken_and_the_best_always_accepted(home: Path, tmp_path: Path):
    run = make(tmp_path / "run", home, **{**REJECTION, "highest_score": None, "samples": 1})
    generate.run(run)
    metrics = run.result()["metrics"]
    assert metrics["not_accepted_share"] == 0
    assert metrics["above_highest_share"] == 0
    assert metrics["kl_bound_nats"] == pytest.approx(math.log(8)), "not accepted independently: only the bound of any choice holds"


def test_best_of_n_tells_its_bound_and_plain_sampling_has_none(home: Path, tmp_path: Path):
    found = {}
    for name, options in {"best": {"keep": "best", "candidates": 8, "samples": 1}, "first": {"samples": 2}}.items():
        run = make(tmp_path / name, home, **options)
        generate.run(run)
        found[name] = json.loads((run.path / "result.json").read_text())["metrics"]
    assert found["best"]["kl_bound_nats"] == pytest.approx(math.log(8) - 7 / 8)
    assert "kl_bound_nats" not in found["first"]
    assert "rejection" not in rows_of(run)[0]
