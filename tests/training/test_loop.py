"""The loop, driven through its three methods with tiny models: the same numbers however the work is cut, killed or spread."""

import os
import signal
import time

import pytest
import torch

import alignment.dpo
import alignment.sft
import rewardmodel.train
from tests.training.tiny import demonstrations, events, llama, make_run, snapshot, start, weights
from training.errors import InputError, TrainingFailed
from training.loop import plan
from training.options import TrainingOptions
from training.rundir import file_digest

pytestmark = pytest.mark.training
METHODS = {"sft": alignment.sft.run, "reward": rewardmodel.train.run, "dpo": alignment.dpo.run}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {
        "model": llama(folder / "model"),
        "sft": demonstrations(folder / "sft.jsonl"),
        "reward": snapshot(folder / "rankings.jsonl"),
        "dpo": folder / "rankings.jsonl",
    }


def new_run(parts, folder, method, **options):
    batch = {"batch_rows": 8} if method == "sft" else {"batch_rankings": 8}
    batch |= {"learning_curve": []} if method == "reward" else {}
    return make_run(folder, method, model=parts["model"], data=parts[method], **{"learning_rate": 1e-3, **batch, **options})


def finished(parts, folder, method, **options):
    run = new_run(parts, folder, method, **options)
    METHODS[method](run)
    return run


def assert_same(one, other, *, atol):
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], atol=atol, rtol=0)


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(InputError, match="Nothing to train on"):
        plan([0.0, 0.0], TrainingOptions(), batch=4, seed=0)


def test_steps_follow_from_epochs_or_are_said():
    assert len(plan([1.0] * 10, TrainingOptions(epochs=2), batch=4, seed=0)) == 6
    assert len(plan([1.0] * 10, TrainingOptions(epochs=1.5), batch=4, seed=0)) == 5
    assert len(plan([1.0] * 10, TrainingOptions(epochs=0.1), batch=4, seed=0)) == 1
    assert len(plan([1.0] * 10, TrainingOptions(max_steps=7), batch=4, seed=0)) == 7


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_what_the_contract_says(parts, tmp_path, method):
    run = finished(parts, tmp_path / "run", method, max_steps=6)
    result = run.result()
    assert set(result) == {"format", "method", "metrics", "artefacts", "seconds", "counts"}
    assert result["artefacts"]["model"] == str(run.model_folder)
    assert result["artefacts"]["weights"] == {"model.safetensors": file_digest(run.model_folder / "model.safetensors")}
    kinds = [event["kind"] for event in run.read_events()[0] if event["kind"] != "part"]
    assert kinds[:2] == ["counts", "start"]
    assert kinds[-2:] == ["evaluation", "end"]
    steps = events(run, "step")
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert {"steps", "metrics", "tokens", "seconds", "eta_seconds", "memory_bytes"} <= set(steps[0])
    assert {"loss", "learning_rate", "gradient_norm", "tokens_per_second"} <= set(steps[0]["metrics"])
    assert (run.model_folder / "rankloop_encoder.json").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_small_micro_batches_give_the_same_update(parts, tmp_path, method):
    """One batch of 8 equals eight of 1 accumulated: losses are divided by the denominators of the whole batch."""
    whole = finished(parts, tmp_path / "whole", method, max_steps=4)
    cut = finished(parts, tmp_path / "cut", method, max_steps=4, tokens_per_micro_batch=1)
    assert_same(whole, cut, atol=1e-5)
    for one, other in zip(events(whole, "step"), events(cut, "step"), strict=True):
        assert one["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], abs=1e-5)


def test_a_run_repeats_bit_by_bit_and_another_seed_does_not(parts, tmp_path):
    one, two = (finished(parts, tmp_path / name, "dpo", max_steps=4) for name in ("one", "two"))
    assert_same(one, two, atol=0)
    other = make_run(tmp_path / "seed", "dpo", model=parts["model"], data=parts["dpo"], seed=4, max_steps=4, learning_rate=1e-3)
    METHODS["dpo"](other)
    assert file_digest(other.model_folder / "model.safetensors") != file_digest(one.model_folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_keeps_weights_and_losses_in_float32(parts, tmp_path, method):
    rough = finished(parts, tmp_path / "rough", method, max_steps=3, dtype="bfloat16")
    exact = finished(parts, tmp_path / "exact", method, max_steps=3)
    assert events(rough, "start")[0]["dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in weights(rough).values())
    for one, other in zip(events(rough, "step"), events(exact, "step"), strict=True):
        assert one["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], rel=0.02)


def test_recomputed_activations_and_weight_decay_are_options_that_work(parts, tmp_path):
    one = finished(parts, tmp_path / "one", "dpo", max_steps=3, gradient_checkpointing=True)
    two = finished(parts, tmp_path / "two", "dpo", max_steps=3)
    assert_same(one, two, atol=1e-5)
    three = finished(parts, tmp_path / "three", "dpo", max_steps=3, weight_decay=0.5, max_gradient_norm=0)
    with pytest.raises(AssertionError):
        assert_same(two, three, atol=1e-5)


def launched_by_accelerate(run):
    return start(run, launcher=("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"))


def launched_by_torch_elastic(run):
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    return start(run, launcher=launcher, environment={"ACCELERATE_USE_CPU": "true"})


@pytest.mark.parametrize(
    ("method", "launch"),
    [("sft", launched_by_accelerate), ("reward", launched_by_torch_elastic), ("dpo", lambda run: start(run, "--processes", "2"))],
    ids=["sft-accelerate", "reward-elastic", "dpo-own"],
)
def test_two_processes_give_the_single_process_result(parts, tmp_path, method, launch):
    run = new_run(parts, tmp_path / "two", method, max_steps=4)
    child = launch(run)
    alone = finished(parts, tmp_path / "one", method, max_steps=4)
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    assert [event["processes"] for event in events(run, "start")] == [2]
    assert [event["step"] for event in events(run, "step")] == [1, 2, 3, 4], "one process writes events, not two"
    assert_same(run, alone, atol=1e-5)
    for name, value in alone.result()["metrics"].items():
        assert run.result()["metrics"][name] == pytest.approx(value, abs=1e-4), name
    for one, other in zip(events(alone, "step"), events(run, "step"), strict=True):
        for name in ("loss", "gradient_norm"):
            assert one["metrics"][name] == pytest.approx(other["metrics"][name], abs=1e-4)
        assert one["tokens"] == other["tokens"]


def wait_for(run, child, kind, count):
    deadline = time.monotonic() + 200
    while len(events(run, kind)) < count:
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_same_story(run, alone):
    assert_same(run, alone, atol=0)
    assert run.result()["metrics"] == alone.result()["metrics"]
    stories = []
    for one in (run, alone):
        steps = {event["step"]: (event["tokens"], event["metrics"]) for event in events(one, "step")}
        stories.append({n: (tokens, {**metrics, "tokens_per_second": 0}) for n, (tokens, metrics) in steps.items()})
    assert stories[0] == stories[1], "no metric has a hole or counts a step twice"


def test_a_run_killed_at_any_step_resumes_bit_by_bit(parts, tmp_path):
    options = {"max_steps": 150, "checkpoint_steps": 5, "log_steps": 7}
    run = new_run(parts, tmp_path / "killed", "dpo", **options)
    child = start(run)
    wait_for(run, child, "checkpoint", 2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert run.result() is None
    METHODS["dpo"](run)
    assert 10 <= events(run, "resume")[0]["step"] < 150
    assert_same_story(run, finished(parts, tmp_path / "alone", "dpo", **options))


def test_sigterm_ends_at_a_checkpoint_with_status_75_and_the_run_goes_on(parts, tmp_path):
    options = {"max_steps": 150, "checkpoint_seconds": 0.0, "log_steps": 7}
    run = new_run(parts, tmp_path / "stopped", "reward", **options)
    child = start(run)
    wait_for(run, child, "step", 1)
    child.terminate()
    assert child.wait(timeout=60) == 75
    (end,) = events(run, "end")
    assert end["status"] == "stopped"
    assert run.newest_checkpoint().name == f"step-{end['step']}"
    assert run.result() is None
    METHODS["reward"](run)
    assert_same_story(run, finished(parts, tmp_path / "alone", "reward", **options))


def test_a_corrupt_newest_checkpoint_is_passed_over_with_a_warning(parts, tmp_path):
    options = {"max_steps": 6, "checkpoint_steps": 2, "checkpoint_seconds": 0.0}
    run = finished(parts, tmp_path / "run", "sft", **options)
    before = weights(run)
    (run.path / "result.json").unlink()
    (run.newest_checkpoint() / "optimiser.safetensors").write_bytes(b"nothing")
    METHODS["sft"](run)
    assert "step-4" in events(run, "warning")[0]["text"]
    assert events(run, "resume")[0]["step"] == 2
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, before[name])


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(parts, tmp_path, monkeypatch):
    forward = alignment.sft.Demonstrations.forward
    broken = {"steps": {2, 3}, "now": 0}

    def sometimes(self, indices):
        loss, sums = forward(self, indices)
        broken["now"] += 1
        return (loss * float("nan") if broken["now"] in broken["steps"] else loss), sums

    monkeypatch.setattr(alignment.sft.Demonstrations, "forward", sometimes)
    run = finished(parts, tmp_path / "run", "sft", max_steps=5)
    assert run.result()["metrics"]["skipped_steps"] == 2
    assert len(events(run, "warning")) == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())
    broken.update(steps=set(range(100)), now=0)
    with pytest.raises(TrainingFailed, match="10 steps in a row"):
        finished(parts, tmp_path / "bad", "sft", max_steps=50)


@pytest.mark.parametrize(
    ("options", "says"), [({"lerning_rate": 1.0}, "Did you mean 'learning_rate'"), ({"max_prompt_tokens": 2}, "cannot be used")]
)
def test_bad_input_ends_with_status_2_and_says_what_to_mend(parts, tmp_path, options, says):
    from alignment.__main__ import main

    run = make_run(tmp_path / "run", "sft", model=parts["model"], data=parts["sft"], **options)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([str(run.path)]) == 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert says in run.error()["error"]
    assert run.error()["remedy"]
    assert run.result() is None
