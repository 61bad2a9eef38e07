"""Too little memory changes how a batch is cut, and nothing else."""

import sys

import pytest
import torch

from tests.training import test_loop
from tests.training.narrow import narrow
from tests.training.short_of_memory import OBJECTIVES
from tests.training.test_loop import METHODS, assert_same, finished, new_run
from tests.training.tiny import demonstrations, events, llama, make_run, start
from training.checkpoint import read_checkpoint
from training.errors import TrainingFailed
from training.gradients import ran_out_of_memory
from training.optimiser import Optimiser

pytestmark = pytest.mark.training
parts = test_loop.parts
SHORT = "tests.training.short_of_memory"
MOST = 60  # tokens that fit: a batch has about 120, the heaviest item 42


def halvings(run):
    return [event for event in events(run, "warning") if "out_of_memory" in event]


def steps_of(run):
    return [(event["tokens"], {**event["metrics"], "tokens_per_second": 0}) for event in events(run, "step")]


def assert_same_but_for_rounding(run, alone, *, halved):
    assert_same(run, alone, atol=1e-5)
    for (tokens, metrics), (expected_tokens, expected) in zip(steps_of(run), steps_of(alone), strict=True):
        assert tokens == expected_tokens, "a batch done twice is counted once"
        assert metrics.pop("out_of_memory") == halved
        assert expected.pop("out_of_memory") == 0
        assert metrics == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_other_errors_are_not_taken_for_memory():
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not ran_out_of_memory(ValueError("not enough memory"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55)
    assert ran_out_of_memory(raised.value)
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize("method", METHODS)
def test_where_memory_runs_out_micro_batches_halve_and_the_update_stays(parts, tmp_path, monkeypatch, method):
    options = {"max_steps": 3, **({"learning_curve": []} if method == "reward" else {})}  # its parts are runs of the loop, too
    alone = finished(parts, tmp_path / "alone", method, **options)
    tried = narrow(OBJECTIVES[method], MOST, patch=monkeypatch.setattr)
    run = finished(parts, tmp_path / "run", method, **options)
    warnings = halvings(run)
    assert len(warnings) >= 1
    assert all("memory ran out before step 1" in warning["text"] for warning in warnings), "the heaviest micro-batch is tried first"
    assert_same_but_for_rounding(run, alone, halved=len(warnings))
    assert run.result()["metrics"]["out_of_memory"] == len(warnings)
    assert max(tried[len(warnings) :]) <= MOST


def test_the_rehearsal_changes_nothing(parts, tmp_path, monkeypatch):
    alone = finished(parts, tmp_path / "alone", "reward", max_steps=3, learning_curve=[])
    monkeypatch.setattr("training.gradients.Gradients.rehearse", lambda self, batches: None)
    assert_same(alone, finished(parts, tmp_path / "without", "reward", max_steps=3, learning_curve=[]), atol=0)


def test_memory_that_runs_out_later_is_noticed_at_its_step_and_kept_through_a_resume(parts, tmp_path, monkeypatch):
    options = {"max_steps": 4, "checkpoint_steps": 1, "learning_curve": []}
    alone = finished(parts, tmp_path / "alone", "reward", **options)
    run = new_run(parts, tmp_path / "run", "reward", **options)
    real = Optimiser.step

    def dies_after_two(self, step, *arguments, **more):
        update = real(self, step, *arguments, **more)
        if step == 0:
            narrow(OBJECTIVES["reward"], MOST, patch=monkeypatch.setattr)
        if step == 2:
            raise KeyboardInterrupt
        return update

    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "step", dies_after_two)
        with pytest.raises(KeyboardInterrupt):
            METHODS["reward"](run)
    before = halvings(run)
    assert "at step 2" in before[0]["text"]
    values = read_checkpoint(run.checkpoints / "step-2")[1].values
    assert values["out_of_memory"] >= 1
    assert values["tokens_per_micro_batch"] < 4096
    METHODS["reward"](run)
    assert events(run, "resume")[0]["step"] == 2
    after = halvings(run)[len(before) :]
    assert run.result()["metrics"]["out_of_memory"] == values["out_of_memory"] + len(after), "it goes on counting, in small micro-batches"
    assert_same(run, alone, atol=1e-5)


def test_an_item_that_never_fits_ends_the_run_with_its_name(parts, tmp_path, monkeypatch):
    narrow(OBJECTIVES["dpo"], 5, patch=monkeypatch.setattr)
    with pytest.raises(TrainingFailed, match=r"prompt-\d+ \(\d+ tokens\) does not fit even alone") as failed:
        finished(parts, tmp_path / "run", "dpo", max_steps=3)
    assert "gradient_checkpointing" in failed.value.remedy


def test_a_run_that_ends_for_want_of_memory_is_resumed_with_the_micro_batches_it_had(parts, tmp_path, monkeypatch):
    run = new_run(parts, tmp_path / "run", "dpo", max_steps=3, learning_rate=1e-3)
    real = Optimiser.step

    def then_narrow(self, step, *arguments, **more):
        update = real(self, step, *arguments, **more)
        narrow(OBJECTIVES["dpo"], 5, patch=monkeypatch.setattr)
        return update

    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "step", then_narrow)
        with pytest.raises(TrainingFailed, match="does not fit even alone"):
            METHODS["dpo"](run)
    assert read_checkpoint(run.newest_checkpoint())[1].values["tokens_per_micro_batch"] == 4096


def test_adapters_side_by_side_are_counted_as_often_as_they_are_computed(parts, tmp_path):
    """Three adapters hold each token three times: micro-batches are a third as long, and the update is the same."""
    options = {"max_steps": 2, "learning_curve": [], "ensemble_size": 3, "ensemble": "adapters", "lora_rank": 2}
    runs = [finished(parts, tmp_path / str(budget), "reward", tokens_per_micro_batch=budget, **options) for budget in (4096, 240)]
    assert_same(*runs, atol=1e-5)


def test_one_process_of_two_that_runs_out_of_memory_takes_the_other_with_it(parts, tmp_path):
    run = new_run(parts, tmp_path / "run", "reward", max_steps=3, learning_curve=[])
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    child = start(run, "rank", "1", str(MOST - 15), launcher=launcher, module=SHORT, environment={"ACCELERATE_USE_CPU": "true"})
    alone = finished(parts, tmp_path / "alone", "reward", max_steps=3, learning_curve=[])
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 0, output
    halved = len(halvings(run))
    assert halved >= 1
    assert_same_but_for_rounding(run, alone, halved=halved)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_process_that_the_system_gives_no_more_memory_still_finishes(tmp_path):
    """Real allocations fail: about 7,000 tokens in one micro-batch do not fit, parts of it do."""
    model, data = llama(tmp_path / "model", hidden=128), demonstrations(tmp_path / "data.jsonl", rows=600)
    options = {"max_steps": 1, "batch_rows": 500, "tokens_per_micro_batch": 100_000, "learning_rate": 1e-3}
    run = make_run(tmp_path / "run", "sft", model=model, data=data, **options)
    child = start(run, "bytes", str(60 * 2**20), module=SHORT)
    alone = make_run(tmp_path / "alone", "sft", model=model, data=data, **options)
    METHODS["sft"](alone)
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 0, output
    halved = len(halvings(run))
    assert halved >= 1
    assert_same_but_for_rounding(run, alone, halved=halved)
