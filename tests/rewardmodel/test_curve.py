import json
from itertools import pairwise

import pytest
import torch

import rewardmodel.train
from rewardmodel.curve import prompts_of_share
from rewardmodel.options import RewardOptions
from rewardmodel.score import read_notes
from tests.training.tiny import events, llama, make_run, snapshot, start, weights
from training.errors import InputError
from training.options import OptionError
from training.rankings import read_rankings
from training.rundir import RunDirectory

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl", prompts=60, raters=3, size=4, held_out=20)


def new_run(folder, model, data, **options):
    given = {"learning_rate": 3e-3, "batch_rankings": 12, "epochs": 2.0, "bootstrap_samples": 100, **options}
    return make_run(folder, "reward", model=model, data=data, **given)


def finished(folder, model, data, **options):
    run = new_run(folder, model, data, **options)
    rewardmodel.train.run(run)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, data):
    return finished(tmp_path_factory.mktemp("run") / "r", model, data, learning_curve=[0.5, 0.25])


def report_of(run):
    return json.loads((run.model_folder / "rankloop_report.json").read_text())


@pytest.mark.parametrize(
    "wrong", [{"learning_curve": [0.5, 1.0]}, {"learning_curve": [0.5, 0.5]}, {"train_share": 0.0}, {"train_share": 0.5}]
)
def test_shares_that_make_no_curve_are_refused(wrong):
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in wrong.items()}
    with pytest.raises(OptionError):
        RewardOptions(**given)


def test_a_smaller_share_lies_within_a_larger_one(data):
    prompts = read_rankings(data, split="train")
    shares = [{prompt.key for prompt in prompts_of_share(prompts, share, seed=1)} for share in (0.01, 0.25, 0.5, 1.0)]
    assert [len(keys) for keys in shares] == [1, 10, 20, 40]
    assert all(small < large for small, large in pairwise(shares))
    assert {prompt.key for prompt in prompts_of_share(prompts, 0.25, seed=2)} != shares[1]


def test_the_curve_ends_with_the_full_run(whole):
    rows = report_of(whole)["learning_curve"]
    assert [(row["share"], row["rankings"]) for row in rows] == [(0.25, 30), (0.5, 60), (1.0, 120)]
    metrics = whole.result()["metrics"]
    for name in ("accuracy", "accuracy_low", "accuracy_high", "log_loss"):
        assert rows[-1][name] == pytest.approx(metrics[name])
        assert all(row[name] is not None for row in rows)


def test_each_part_is_judged_on_the_same_held_out_rankings(whole):
    parts = [RunDirectory.open(whole.path / "curve" / share).result() for share in ("0.25", "0.5")]
    assert {part["counts"]["held_out"]["rankings"] for part in parts} == {60}
    assert {part["metrics"]["pairs"] for part in parts} == {whole.result()["metrics"]["pairs"]}


def test_a_part_costs_its_share_and_leaves_no_weights(whole):
    for share, steps in (("0.25", 6), ("0.5", 10)):
        folder = whole.path / "curve" / share
        assert RunDirectory.open(folder).result()["metrics"]["steps"] == steps
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "events.jsonl", "result.json"]


def test_max_steps_are_shared_out_too(tmp_path, model, data):
    run = finished(tmp_path / "r", model, data, learning_curve=[0.25], max_steps=5)
    assert RunDirectory.open(run.path / "curve" / "0.25").result()["metrics"]["steps"] == 2


def test_who_watches_the_run_sees_its_parts_move(whole):
    told = events(whole, "part")
    assert [(event["share"], event["step"], event["steps"]) for event in told[:2]] == [(0.25, 1, 6), (0.25, 2, 6)]
    assert all(event["eta_seconds"] > 0 for event in told)
    assert [(event["share"], event["rankings"]) for event in events(whole, "learning_curve")] == [(0.25, 30), (0.5, 60)]


def test_the_curve_changes_nothing_in_the_full_run(whole, tmp_path, model, data):
    alone = finished(tmp_path / "alone", model, data, learning_curve=[])
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(alone)[name], atol=0, rtol=0)
    assert [row["share"] for row in report_of(alone)["learning_curve"]] == [1.0]
    assert not (alone.path / "curve").exists()


def test_a_part_can_be_repeated_by_hand(whole, tmp_path, model, data):
    by_hand = finished(tmp_path / "hand", model, data, learning_curve=[], train_share=0.25)
    part = RunDirectory.open(whole.path / "curve" / "0.25")
    assert by_hand.result()["metrics"]["log_loss"] == part.result()["metrics"]["log_loss"]


def test_parts_with_a_result_are_passed_over(whole, tmp_path, model, data):
    run = new_run(tmp_path / "r", model, data, learning_curve=[0.25, 0.5])
    made = run.path / "curve" / "0.25"
    made.mkdir(parents=True)
    for name in ("config.json", "result.json"):
        (made / name).write_bytes((whole.path / "curve" / "0.25" / name).read_bytes())
    rewardmodel.train.run(run)
    assert {event["share"] for event in events(run, "part")} == {0.5}
    assert report_of(run)["learning_curve"] == report_of(whole)["learning_curve"]


def test_a_stop_in_a_part_is_a_stop_of_the_run_which_goes_on_from_there(tmp_path, model, data):
    options = {"learning_curve": [0.5], "max_steps": 200, "batch_rankings": 6, "checkpoint_seconds": 0.0}
    run = new_run(tmp_path / "stopped", model, data, **options)
    child = start(run)
    while not events(run, "part"):
        assert child.poll() is None, child.stdout.read()
    child.terminate()
    assert child.wait(timeout=60) == 75
    assert [event["status"] for event in events(run, "end")] == ["stopped"]
    part = RunDirectory.open(run.path / "curve" / "0.5")
    assert run.result() is None and part.result() is None
    rewardmodel.train.run(run)
    assert [event["step"] for event in events(part, "resume")] == [events(part, "end")[0]["step"]]
    alone = finished(tmp_path / "alone", model, data, **options)
    assert report_of(run) == report_of(alone)


def test_two_processes_draw_the_same_curve(whole, tmp_path, model, data):
    run = new_run(tmp_path / "two", model, data, learning_curve=[0.25])
    child = start(run, "--processes", "2", environment={"OMP_NUM_THREADS": "1"})
    assert child.wait(timeout=240) == 0, child.stdout.read()
    one, two = report_of(whole), report_of(run)
    for ours, theirs in zip([one["learning_curve"][0], one["learning_curve"][-1]], two["learning_curve"], strict=True):
        assert ours["log_loss"] == pytest.approx(theirs["log_loss"], abs=1e-3)
    assert read_notes(run.model_folder).mean == pytest.approx(read_notes(whole.model_folder).mean, abs=1e-3)
    assert len(events(run, "learning_curve")) == 1


def test_a_share_with_nothing_to_learn_is_a_hole_in_the_curve_not_the_end(tmp_path, model, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    kept = prompts_of_share(read_rankings(data, split="train"), 0.05, seed=3)
    for row in rows:
        if row["key"] in {prompt.key for prompt in kept}:
            row["bands"] = [[index for band in row["bands"] for index in band]]
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = finished(tmp_path / "r", model, path, learning_curve=[0.05], ties="drop", max_steps=2)
    assert "no point at 0.05" in events(run, "warning")[0]["text"]
    assert [row["share"] for row in report_of(run)["learning_curve"]] == [1.0]


def test_input_that_cannot_be_used_at_all_still_ends_the_run(tmp_path, model, data):
    with pytest.raises(InputError, match="cannot be used"):
        finished(tmp_path / "r", model, data, max_completion_tokens=1)
