"""The main job on human rankings, without its hours: what is measured, by hand; the plan of its stages; its figures. What it finds is
measured, not tested."""

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from alignment.options import DPOOptions, EvaluateOptions, GenerateOptions, SFTOptions
from alignment.ppo.options import PPOOptions
from benchmarks.e2e_figures import Line, Panel, drawing, ticks
from benchmarks.e2e_measure import Said, best_of, collapse, evaluated, gain, measure
from benchmarks.e2e_stages import PARTS, Stage, Task, json_lines, perform, write_lines
from rewardmodel.options import RewardOptions
from training.options import parse_options
from training.rundir import RunDirectory

MEANING = "name[Xname], food[French], area[riverside]"
ALL, ONE = "Xname is a French place at the riverside.", "Xname is a nice place for you to eat."
OPTIONS = {
    "sft": SFTOptions,
    "reward": RewardOptions,
    "dpo": DPOOptions,
    "ppo": PPOOptions,
    "generate": GenerateOptions,
    "evaluate": EvaluateOptions,
}


def said(*texts: str, meaning: str = MEANING, kl: float = 1.0) -> list[Said]:
    return [Said(meaning, text, float(len(text)), kl) for text in texts]


def test_slots_said_is_of_all_texts_and_its_error_of_meanings():
    """3 of 3 and 1 of 3 slots: 4 of 6. One meaning resampled is always itself: no error between meanings."""
    found = measure(said(ALL, ONE))
    assert found.slots_said == pytest.approx(4 / 6)
    assert found.slots_said_error == pytest.approx(0, abs=1e-12)
    assert found.reward == pytest.approx((len(ALL) + len(ONE)) / 2)
    assert found.kl_nats == 1
    other = "name[Xname], eatType[pub], food[Indian]"
    assert measure([*said(ALL), *said(ONE, meaning=other)]).slots_said_error > 0


def test_a_gain_is_against_the_same_meanings():
    more, error = gain(measure(said(ALL, ALL)), measure(said(ALL, ONE)))
    assert more == pytest.approx(2 / 6)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([ONE, ONE], "slots said"),
        ([ALL, ""], "empty texts"),
        ([ALL] * 8, "distinct pairs"),
        ([ALL + " It is good." * 9] * 2, "words"),
    ],
)
def test_a_collapsed_policy_says_why(texts: list[str], reason: str):
    start = measure(said(ALL, ALL.replace("is a", "has"), ONE + " French", "A riverside one, Xname, has French food"))
    assert any(found.startswith(reason) for found in collapse(measure(said(*texts)), start))


def test_a_policy_that_is_sft_has_not_collapsed():
    start = measure(said(ALL, ONE))
    assert collapse(start, start) == []
    cut = measure([Said(MEANING, text, 0.0, finished=False) for text in (ALL, ONE)])
    assert collapse(cut, start) == ["unfinished 1.000"]


def test_best_of_n_takes_the_best_of_each_n_samples(tmp_path: Path):
    """16 samples of one prompt, of which the fourth says all and scores best: n = 4 has it once in four."""
    rows = [
        {
            "key": "p",
            "messages": [{"role": "user", "content": MEANING}],
            "text": ALL if number == 3 else "Eat here.",
            "score": {"mean": 5.0 if number == 3 else -number},
            "sampling": {"finished": True},
        }
        for number in range(16)
    ]
    write_lines(tmp_path / "completions.jsonl", rows)
    assert best_of(tmp_path / "completions.jsonl", 1).slots_said == pytest.approx(3 / 48)
    four = best_of(tmp_path / "completions.jsonl", 4)
    assert (four.texts, four.slots_said) == (4, pytest.approx(3 / 12))
    assert four.reward == pytest.approx((5 - 4 - 8 - 12) / 4)
    assert four.kl_nats == pytest.approx(math.log(4) - 3 / 4)
    assert best_of(tmp_path / "completions.jsonl", 16).slots_said == 1


def test_an_evaluation_is_read_one_policy_at_a_time_and_words_are_counted_in_first_samples(tmp_path: Path):
    row = {"messages": [{"role": "user", "content": MEANING}], "score": 1.0, "kl_k1_nats": 2.0, "finished": True}
    texts = [("dpo-0.1", text) for text in (ALL, ALL, ALL, ONE)] + [("dpo-0.3", ONE)] * 4
    write_lines(tmp_path / "samples.jsonl", [{"policy": policy, "text": text, **row} for policy, text in texts])
    found = evaluated(tmp_path / "samples.jsonl", "dpo-0.1")
    assert (found.texts, found.slots_said, found.kl_nats) == (4, pytest.approx(10 / 12), 2.0)
    assert found.distinct_2 == 1  # no pair twice in the first text


@pytest.fixture
def task(tmp_path: Path) -> Task:
    write_lines(tmp_path / "sft.jsonl", [{"prompt": MEANING, "completion": ALL}])
    write_lines(tmp_path / "rankings.jsonl", [{}])
    for seed in (0, 1):
        (tmp_path / f"seed-{seed}" / "start").mkdir(parents=True)
        (tmp_path / f"seed-{seed}" / "start" / "config.json").write_text("{}")  # no model is made
    return Task(tmp_path, tmp_path / "sft.jsonl", tmp_path / "rankings.jsonl")


def test_each_stage_comes_after_what_it_needs_with_options_that_its_method_knows(task: Task):
    done: set[tuple[int, str]] = set()
    for stage in task.stages(PARTS, [0, 1], [0]):
        assert all((stage.seed, need) in done for need in stage.needs), stage.name
        parse_options(OPTIONS[stage.method], json.loads(json.dumps(stage.options)))
        done.add((stage.seed, stage.name))
    assert (0, "long-pessimistic") in done
    assert (1, "long-pessimistic") not in done


def test_a_stage_that_is_done_is_not_done_again_and_one_that_fails_is_named(task: Task):
    first = Stage(0, "first", "sft", {}, {}, ())
    RunDirectory.create(task.home(0) / "first", method="sft", seed=0, inputs={}, options={}).write_result(
        metrics={}, artefacts={}, seconds=7.0
    )
    assert perform(task, [first], 2)[0, "first"]["seconds"] == 7
    with pytest.raises(SystemExit, match="second ended with status"):
        perform(task, [Stage(0, "second", "sft", {}, {}, ("first",)), first], 2)
    assert next(json_lines(task.home(0) / "second" / "events.jsonl"))


def test_the_figure_has_every_seed_and_every_mean():
    lines = [Line("dpo", "DPO", [(0, 0.6), (7, 0.7)], [[(6, 0.68), (8, 0.72)]]), Line("ppo", "PPO", [(0, 0.6), (5, 0.71)], [], joined=True)]
    tree = ElementTree.fromstring(drawing("Title", [Panel("KL", "slots", lines)] * 2))
    circles = tree.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 * (2 + 2 + 2) + 2
    assert ticks([0.61, 0.72])[0] <= 0.61
    assert ticks([0.61, 0.72])[-1] >= 0.72
