"""Best-of-n, and what people are asked next: the choice is the reward model's, and neither a crash nor processes change it."""

import json
from pathlib import Path

import pytest
import torch

from alignment import generate
from alignment.candidates import best_first, most_disputed_texts
from alignment.options import GenerateOptions
from rewardmodel.ensemble import disagreement, mean_disagreement, most_disputed
from rewardmodel.score import Scorer
from tests.alignment.letters import write_ensemble, write_models, write_prompts
from tests.alignment.test_generate import start
from training.errors import InputError
from training.options import OptionError, parse_options
from training.rundir import RunDirectory


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("letters")
    write_models(folder)
    write_ensemble(folder)
    write_prompts(folder / "prompts.jsonl")
    return folder


def make(folder: Path, home: Path, *, reward: str = "ensemble", **options) -> RunDirectory:
    inputs = {"model": str(home / "policy"), "data": str(home / "prompts.jsonl")}
    if reward:
        inputs["reward_model"] = str(home / reward)
    chosen = {"samples": 2, "max_completion_tokens": 8, **options}
    return RunDirectory.create(folder, method="generate", seed=0, inputs=inputs, options=chosen)


def rows_of(run: RunDirectory, name: str = "completions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run.path / name).open(encoding="utf-8")]


def by_prompt(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["key"], []).append(row)
    return found


@pytest.fixture(scope="module")
def drawn(home: Path, tmp_path_factory) -> dict[str, list[dict]]:
    """All eight candidates of each prompt, by a run that keeps them all."""
    run = make(tmp_path_factory.mktemp("all") / "run", home, samples=8)
    generate.run(run)
    return by_prompt(rows_of(run))


@pytest.mark.parametrize(
    "wrong",
    [
        {"candidates": 3},
        {"candidates": 8},
        {"keep": "best"},
        {"keep": "best", "candidates": 4},
        {"keep": "uncertain", "candidates": 8, "samples": 1},
        {"most_uncertain_prompts": 2, "samples": 1},
        {"most_uncertain_prompts": -1},
        {"keep": "best", "candidates": 4, "samples": 1, "greedy": True},
        {"reward_view": "best"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(OptionError):
        parse_options(GenerateOptions, wrong)


def test_a_choice_without_a_reward_model_is_refused(home: Path, tmp_path: Path):
    for number, options in enumerate(({"keep": "best", "candidates": 8}, {"most_uncertain_prompts": 3})):
        with pytest.raises(InputError, match="none is given"):
            generate.run(make(tmp_path / str(number), home, reward="", **options))


def test_a_dispute_among_one_member_is_refused(home: Path, tmp_path: Path):
    disputed = ({"keep": "uncertain", "candidates": 8}, {"most_uncertain_prompts": 3})
    for number, options in enumerate((*disputed, {"keep": "best", "candidates": 8, "reward_view": "worst"})):
        with pytest.raises(InputError, match="one member") as refused:
            generate.run(make(tmp_path / str(number), home, reward="reward", **options))
        assert "ensemble_size" in refused.value.remedy


def test_a_reward_model_that_is_given_scores_what_is_written(home: Path, drawn):
    """The scores are those of the texts as Scorer reads them, and the prompt's disagreement that of its completions."""
    scorer = Scorer.load(home / "ensemble")
    for rows in drawn.values():
        raw = scorer.raw_scores(scorer.rows([(row["messages"], row["text"]) for row in rows]))
        views = scorer.views(raw)
        for place, row in enumerate(rows):
            assert row["score"]["mean"] == pytest.approx(float(views.mean[place]), abs=1e-5)
            assert row["score"]["spread"] == pytest.approx(float(views.spread[place]), abs=1e-5)
            assert row["score"]["worst"] == pytest.approx(float(views.worst[place]), abs=1e-5)
            assert row["score"]["worst"] <= row["score"]["mean"]
            assert row["disagreement"] == pytest.approx(mean_disagreement(disagreement(raw), list(range(8))), abs=1e-6)


def test_a_single_reward_model_chooses_the_best_and_knows_no_disagreement(home: Path, tmp_path: Path):
    run = make(tmp_path / "run", home, reward="reward", keep="best", candidates=8)
    generate.run(run)
    rows = rows_of(run)
    assert all(row["disagreement"] is None and row["score"]["spread"] == 0 for row in rows)
    assert not (run.path / "prompts_by_disagreement.jsonl").exists()
    assert "disagreement" not in run.result()["metrics"]


@pytest.mark.parametrize("view", ["mean", "worst", "mean_minus_spread"])
def test_the_best_candidates_by_the_chosen_view_are_kept(home: Path, tmp_path: Path, drawn, view):
    run = make(tmp_path / "run", home, keep="best", candidates=8, reward_view=view, spread_weight=0.5)
    generate.run(run)
    found = by_prompt(rows_of(run))
    assert found.keys() == drawn.keys()
    differing = 0
    for key, candidates in drawn.items():
        scores = [one["score"] for one in candidates]
        points = {
            "mean": [score["mean"] for score in scores],
            "worst": [score["worst"] for score in scores],
            "mean_minus_spread": [score["mean"] - 0.5 * score["spread"] for score in scores],
        }[view]
        kept = [points[row["sample"]] for row in found[key]]
        expected = best_first(points, [one["text"] for one in candidates])[:2]
        assert kept == pytest.approx([points[place] for place in expected], abs=1e-5)
        assert [row["text"] for row in found[key]] == [candidates[row["sample"]]["text"] for row in found[key]]
        differing += [row["sample"] for row in found[key]] != [0, 1]
    assert differing > len(drawn) / 2
    assert run.result()["metrics"]["score"] == pytest.approx(
        sum(row["score"]["mean"] for rows in found.values() for row in rows) / (2 * len(found))
    )


def test_equal_texts_go_behind_all_others():
    assert best_first([1.0, 3.0, 3.0, 2.0], ["d", "a", "a", "b"]) == [1, 3, 0, 2]
    assert best_first([0.0, 0.0], ["a", "b"]) == [0, 1]


def test_raters_are_not_asked_about_the_same_text_twice():
    """Texts a, a, b, c; pairs (a, b) .20, (a, c) .05, (b, c) .10. With a and b chosen a second a would add most, and say nothing."""
    scores = torch.zeros(4, 4)
    for one, other, value in ((0, 2, 0.2), (1, 2, 0.2), (0, 3, 0.05), (1, 3, 0.05), (2, 3, 0.1)):
        scores[one, other] = scores[other, one] = value
    assert most_disputed(scores, 3) == [0, 2, 1]
    assert most_disputed_texts(scores, ["a", "a", "b", "c"], 3) == [0, 2, 3]
    assert most_disputed_texts(scores, ["a", "a", "b", "a"], 3) == [0, 2, 1]
    assert most_disputed_texts(scores, ["b", "a", "a", "c"], 3) == [0, 3, 1]
    assert most_disputed_texts(scores, ["a", "a", "a", "a"], 2) == [0, 1]


def test_what_members_dispute_is_kept(home: Path, tmp_path: Path, drawn):
    """The more of the letter a, the more the members differ: the text with the most of it stands beside the one with the least."""
    run = make(tmp_path / "run", home, keep="uncertain", candidates=8, samples=3)
    generate.run(run)
    scorer = Scorer.load(home / "ensemble")
    for key, kept in by_prompt(rows_of(run)).items():
        rows = scorer.rows([(one["messages"], one["text"]) for one in drawn[key]])
        pairs = disagreement(scorer.raw_scores(rows))
        texts = [one["text"] for one in drawn[key]]
        assert [row["sample"] for row in kept] == most_disputed_texts(pairs, texts, 3)
        first_three = [texts.index(text) for text in dict.fromkeys(texts)][:3]
        assert kept[0]["disagreement"] >= mean_disagreement(pairs, first_three) - 1e-9
        tokens = [[*row.prompt_ids, *row.completion_ids] for row in rows]
        shares = [one.count(3) / len(one) for one in tokens]
        assert sorted(shares[row["sample"]] for row in kept[:2]) == [min(shares), max(shares)]


def test_prompts_are_listed_by_how_much_they_are_disputed_and_the_most_disputed_kept(home: Path, tmp_path: Path, drawn):
    run = make(tmp_path / "run", home, samples=8, most_uncertain_prompts=5)
    generate.run(run)
    table = rows_of(run, "prompts_by_disagreement.jsonl")
    assert {row["key"] for row in table} == drawn.keys()
    figures = [row["disagreement"] for row in table]
    assert figures == sorted(figures, reverse=True)
    assert figures[0] > figures[-1]
    assert [row["kept"] for row in table] == [True] * 5 + [False] * (len(table) - 5)
    for row in table:
        spreads = [one["score"]["spread"] for one in drawn[row["key"]]]
        assert row["spread"] == pytest.approx(sum(spreads) / 8)
    kept = rows_of(run)
    assert {row["key"] for row in kept} == {row["key"] for row in table[:5]}
    assert kept == [row for rows in drawn.values() for row in rows if row["key"] in {one["key"] for one in table[:5]}]
    assert run.result()["metrics"]["prompts"] == 5
    assert run.result()["artefacts"]["prompts_by_disagreement"].endswith("prompts_by_disagreement.jsonl")


@pytest.mark.training
def test_killed_or_on_two_processes_the_same_is_kept(home: Path, tmp_path: Path):
    """96 candidates a prompt make blocks of two prompts."""
    options = {"samples": 3, "candidates": 96, "keep": "uncertain", "most_uncertain_prompts": 4}
    whole = make(tmp_path / "whole", home, **options)
    generate.run(whole)
    expected = rows_of(whole)
    assert len(expected) == 12

    unfiltered = make(tmp_path / "unfiltered", home, **{**options, "most_uncertain_prompts": 0})
    generate.run(unfiltered)
    lines = (unfiltered.path / "completions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    killed = make(tmp_path / "killed", home, **options)
    (killed.path / generate.PARTIAL).write_text("".join([*lines[:10], lines[10][:20]]), encoding="utf-8")
    generate.run(killed)
    assert [event["step"] for event in killed.read_events()[0] if event["kind"] == "resume"] == [3]

    two = make(tmp_path / "two", home, **options)
    assert start(two, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2").wait(180) == 0
    for run in (killed, two):
        rows = rows_of(run)
        assert [(row["key"], row["sample"], row["text"]) for row in rows] == [(row["key"], row["sample"], row["text"]) for row in expected]
        assert [(row["score"], row["disagreement"]) for row in rows] == [(row["score"], row["disagreement"]) for row in expected]
