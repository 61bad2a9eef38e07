"""A run survives what machines do to it, and ends with an error that can be acted on where it cannot."""

import pytest
import torch

from tests.training import test_loop
from tests.training.test_loop import METHODS, assert_same_story, finished, new_run
from tests.training.tiny import events, start, weights
from training.checkpoint import read_checkpoint
from training.errors import TrainingFailed

pytestmark = pytest.mark.training
parts = test_loop.parts
KILLS = 2
OPTIONS = {
    "sft": {"max_steps": 30, "checkpoint_steps": 1, "log_steps": 7},
    "reward": {"max_steps": 30, "checkpoint_steps": 2, "log_steps": 7, "lora_rank": 4, "ties": "davidson"},
    "dpo": {"max_steps": 30, "checkpoint_steps": 3, "log_steps": 7, "schedule": "linear", "weight_decay": 0.1},
}


def test_runs_killed_again_and_again_end_bit_by_bit_as_if_left_alone(parts, tmp_path):
    """Weights, optimiser, schedule, order of data and metrics; killed between steps, in steps, and while a checkpoint is written."""
    runs = [new_run(parts, tmp_path / method, method, **options) for method, options in OPTIONS.items()]
    child = start(runs[0], "5", str(KILLS), *(str(run.path) for run in runs[1:]), module="tests.training.killed")
    alone = [finished(parts, tmp_path / f"{method}-alone", method, **options) for method, options in OPTIONS.items()]
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    told = {words[0]: (int(words[1]), int(words[2])) for words in map(str.split, output.splitlines()) if words and words[0] in METHODS}
    assert set(told) == set(METHODS)
    assert sum(halves for halves, _ in told.values()) >= 1, "at least one checkpoint was half-written when its run was killed"
    assert all(resumed >= 1 for _, resumed in told.values())
    for run, other in zip(runs, alone, strict=True):
        assert_same_story(run, other)


def infinite_loss(monkeypatch, *, from_step):
    """Losses become infinite by a constant, so their gradients stay finite."""
    objective = test_loop.alignment.sft.Demonstrations
    forward = objective.forward
    now = {"step": -1}  # the rehearsal is the first

    def broken(self, indices):
        loss, sums = forward(self, indices)
        now["step"] += 1
        return (loss + float("inf") if now["step"] >= from_step else loss), sums

    monkeypatch.setattr(objective, "forward", broken)


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradients_are_finite(parts, tmp_path, monkeypatch):
    infinite_loss(monkeypatch, from_step=3)
    run = finished(parts, tmp_path / "run", "sft", max_steps=4, keep_checkpoints=9, checkpoint_steps=1)
    assert run.result()["metrics"]["skipped_steps"] == 2
    (first, _) = events(run, "warning")
    assert first["text"].startswith("step 3 was skipped: the loss of ")
    assert "is not finite" in first["text"]
    two, three = (read_checkpoint(run.checkpoints / f"step-{step}")[1].tensors["model"] for step in (2, 3))
    assert all(torch.equal(two[name], three[name]) for name in two)


def test_ten_such_steps_end_the_run_with_the_items_and_good_weights_in_a_checkpoint(parts, tmp_path, monkeypatch):
    good = finished(parts, tmp_path / "good", "sft", max_steps=50, keep_checkpoints=99, checkpoint_steps=1)
    infinite_loss(monkeypatch, from_step=3)
    run = new_run(parts, tmp_path / "run", "sft", max_steps=50)
    with pytest.raises(
        TrainingFailed, match=r"10 steps in a row were not finite. The last, step 12: the loss of .+ is not finite"
    ) as failed:
        METHODS["sft"](run)
    assert "newest checkpoint" in failed.value.remedy
    kept = read_checkpoint(run.newest_checkpoint())[1].tensors["model"]
    expected = read_checkpoint(good.checkpoints / "step-2")[1].tensors["model"]
    assert all(torch.equal(kept[name], expected[name]) for name in kept)


def test_a_saved_model_that_is_not_the_trained_one_ends_the_run_before_its_result(parts, tmp_path, monkeypatch):
    """The head lost on the way to the disk, as LoRA loses it where nobody asks to keep it."""
    import training.artefact
    from rewardmodel.network import load_reward_model

    real = training.artefact.save_model

    def without_head(model, encoder, folder, *, notes):
        other = load_reward_model(parts["model"])
        torch.nn.init.normal_(other.score.weight)
        real(other, encoder, folder, notes=notes)

    monkeypatch.setattr(training.artefact, "save_model", without_head)
    run = new_run(parts, tmp_path / "run", "reward", max_steps=2)
    with pytest.raises(TrainingFailed, match=r"saved model gives other scores.* It stands in .*model\.refused"):
        METHODS["reward"](run)
    assert run.result() is None
    assert not run.model_folder.exists()
    assert run.newest_checkpoint().name == "step-2", "what was trained is kept"
    monkeypatch.undo()
    METHODS["reward"](run)
    assert run.result()["metrics"]["steps"] == 2
    assert [event["step"] for event in events(run, "step")] == [1, 2], "nothing was trained again"
    monkeypatch.setattr(training.artefact, "save_model", without_head)
    assert finished(parts, tmp_path / "unverified", "reward", max_steps=2, verify_saved=False).result() is not None


@pytest.mark.parametrize("method", METHODS)
def test_lora_ends_as_a_model_that_says_what_was_trained(parts, tmp_path, method):
    run = finished(parts, tmp_path / "run", method, max_steps=6, lora_rank=4, learning_rate=0.02)
    start_weights = finished(parts, tmp_path / "start", method, max_steps=1, learning_rate=1e-12)
    changed = [name for name, tensor in weights(run).items() if not torch.equal(tensor, weights(start_weights)[name])]
    assert any("proj" in name for name in changed), "the adapters were merged"
    assert (run.model_folder / "adapter").is_dir()
