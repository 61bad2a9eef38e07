"""A step that is interrupted in its middle: between batches of a rollout, before the first update, between minibatches of any pass."""

from pathlib import Path

import pytest
import torch

from alignment.ppo import actors
from alignment.ppo import train as ppo
from alignment.ppo.voices import Separate
from tests.alignment.letters import ppo_run
from tests.alignment.test_ppo import events
from tests.alignment.test_ppo_shared import KINDS, write_home
from training.checkpoint import read_checkpoint
from training.errors import Stopped, TrainingFailed
from training.rundir import RunDirectory, checkpoint_folders, file_digest

pytestmark = pytest.mark.training
# Batches of few prompts, so that a rollout has several; two passes of three minibatches.
SMALL = {"max_steps": 2, "cache_tokens": 100, "passes": 2, "minibatches": 3, "kl_target_nats": 0.1, "kl_horizon_episodes": 20}


def stopped_at(run: RunDirectory, call: int, monkeypatch) -> dict:
    """Run until the `call`-th time that the run asks whether it should stop. Returns the values of the checkpoint that it leaves."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "stop_requested", lambda: asked.append(None) or len(asked) >= call)
        with pytest.raises(Stopped):
            ppo.run(run)
    step, state = read_checkpoint(checkpoint_folders(run.checkpoints)[-1])
    return {"step": step, "groups": set(state.tensors), **state.values}


def assert_same(run: RunDirectory, other: RunDirectory) -> None:
    for file in ("model/model.safetensors", "value_model/model.safetensors", "samples.jsonl"):
        assert file_digest(run.path / file) == file_digest(other.path / file), file
    assert run.result()["metrics"] == other.result()["metrics"]
    timed = ("seconds", "_per_second")
    for one, two in zip(events(run, "step"), events(other, "step"), strict=True):
        mine, theirs = (
            {name: value for name, value in event["metrics"].items() if not any(t in name for t in timed)} for event in (one, two)
        )
        assert mine == theirs


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> RunDirectory:
    torch.set_num_threads(1)
    run = ppo_run(home / "undisturbed", home, **SMALL)
    ppo.run(run)
    return run


def test_wherever_a_step_is_interrupted_the_run_goes_on_to_the_same_bits(home: Path, undisturbed: RunDirectory, monkeypatch):
    """Every place of the first step at which a run may stop, and two of the second. The last of them are stopped twice."""
    places = set()
    for call in (1, 2, 3, 5, 6, 8, 9, 14, 17):
        run = ppo_run(home / f"stopped-{call}", home, **SMALL)
        left = stopped_at(run, call, monkeypatch)
        assert {"experience", "drawn"} & left["groups"] or "tally" not in left
        places.add((left["step"], "drawn" in left["groups"], left.get("tally", {}).get("done", 0)))
        if call > 8:
            stopped_at(RunDirectory.open(run.path), 3, monkeypatch)
        ppo.run(RunDirectory.open(run.path))
        assert_same(run, undisturbed)
    rollouts = {place for place in places if place[1]}
    updates = {place for place in places if place[0] == 0 and not place[1] and place[2]}
    assert rollouts
    assert len(updates) >= 2
    assert any(step == 1 for step, _, _ in places)


def test_a_shared_backbone_is_interrupted_and_resumed_alike(tmp_path: Path, monkeypatch):
    home = write_home(tmp_path / "home", KINDS["one"])
    runs = [
        ppo_run(tmp_path / name, home, backbone="shared", lora_rank=4, shared_value="adapter", **SMALL) for name in ("whole", "stopped")
    ]
    ppo.run(runs[0])
    stopped_at(runs[1], 8, monkeypatch)
    ppo.run(RunDirectory.open(runs[1].path))
    assert_same(runs[1], runs[0])


def test_without_a_value_model_too(home: Path, tmp_path: Path, monkeypatch):
    runs = [ppo_run(tmp_path / name, home, advantage_estimator="rloo", **SMALL) for name in ("whole", "stopped")]
    ppo.run(runs[0])
    stopped_at(runs[1], 8, monkeypatch)
    ppo.run(RunDirectory.open(runs[1].path))
    assert file_digest(runs[0].path / "model/model.safetensors") == file_digest(runs[1].path / "model/model.safetensors")
    assert not (runs[1].path / "value_model").exists()
    assert "value_loss" not in events(runs[1], "step")[0]["metrics"]


def test_where_memory_runs_out_the_update_is_done_in_smaller_parts_and_stays_the_same(home: Path, tmp_path: Path, monkeypatch):
    runs = [ppo_run(tmp_path / name, home, max_steps=1, tokens_per_micro_batch=512) for name in ("whole", "short")]
    ppo.run(runs[0])
    real = ppo.Updates._backward
    failures = []

    def short(self, batch, said, places, sums):
        if len(places) > 2:
            failures.append(len(places))
            raise MemoryError
        return real(self, batch, said, places, sums)

    monkeypatch.setattr(ppo.Updates, "_backward", short)
    ppo.run(runs[1])
    assert failures
    metrics = [events(run, "step")[0]["metrics"] for run in runs]
    assert metrics[1]["out_of_memory"] > 0 == metrics[0]["out_of_memory"]
    for name in ("policy_loss", "value_loss", "gradient_norm", "value_gradient_norm"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-6)


def test_a_run_goes_on_in_the_form_it_began_in(tmp_path: Path, monkeypatch):
    """One that began with separate models (under sharding, say) is not taken for one backbone by `auto`."""
    home = write_home(tmp_path / "home", KINDS["one"])
    forms = {"whole": {"backbone": "separate"}, "begun": {}}
    runs = [ppo_run(tmp_path / name, home, lora_rank=4, **SMALL, **given) for name, given in forms.items()]
    ppo.run(runs[0])
    with monkeypatch.context() as patch:
        patch.setattr(actors, "why_not_shared", lambda *_: "it was so")
        stopped_at(runs[1], 8, patch)
    ppo.run(RunDirectory.open(runs[1].path))
    assert events(runs[1], "start")[-1]["models"] == "separate models: the run began with them"
    assert_same(runs[1], runs[0])


def test_a_run_stopped_at_its_last_step_stays_stopped(home: Path, tmp_path: Path):
    """Nothing is left in which the alarm could show again."""
    guarded = {"on_alarm": "stop", "kl_limit_nats": 0.05, "evaluate_steps": 0, "max_steps": 1, "learning_rate": 3e-2, "warmup_share": 0.0}
    run = ppo_run(tmp_path / "run", home, **guarded)
    for _ in range(2):
        with pytest.raises(TrainingFailed, match="Stopped by its guards"):
            ppo.run(RunDirectory(run.path, run.config))
        assert run.result() is None


def test_a_checkpoint_between_two_names_is_found(home: Path, tmp_path: Path, monkeypatch):
    """A kill between the two renames that replace a checkpoint in the middle of a step."""
    runs = [ppo_run(tmp_path / name, home, **SMALL) for name in ("whole", "killed")]
    ppo.run(runs[0])
    stopped_at(runs[1], 6, monkeypatch)
    (only,) = checkpoint_folders(runs[1].checkpoints)
    only.rename(only.with_name(f".{only.name}.new"))
    ppo.run(RunDirectory.open(runs[1].path))
    assert events(runs[1], "resume")
    assert_same(runs[1], runs[0])


def test_where_memory_runs_out_in_scoring_it_is_done_in_smaller_passes(home: Path, tmp_path: Path, monkeypatch):
    runs = [ppo_run(tmp_path / name, home, max_steps=1, tokens_per_micro_batch=512) for name in ("whole", "short")]
    ppo.run(runs[0])
    real, budgets = Separate.judged, []

    def short(self, rows, read, *, budget, **given):
        budgets.append(budget)
        if budget > 200:
            raise MemoryError
        return real(self, rows, read, budget=budget, **given)

    monkeypatch.setattr(Separate, "judged", short)
    ppo.run(runs[1])
    assert budgets[:3] == [512, 256, 128]
    metrics = [events(run, "step")[0]["metrics"] for run in runs]
    for name in ("reward", "kl_k3_nats", "value", "policy_loss"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-5)
