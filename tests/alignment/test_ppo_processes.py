"""PPO as child processes: killed, asked to stop, and spread over two processes, it gives what one undisturbed process gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignment.ppo import train as ppo
from tests.alignment.letters import ppo_run
from training.rundir import RunDirectory, checkpoint_folders, file_digest

pytestmark = pytest.mark.training
HOUSE = Path(__file__).resolve().parents[2]
LONG = {"max_steps": 20, "checkpoint_steps": 2, "evaluate_steps": 4}


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> RunDirectory:
    torch.set_num_threads(1)
    run = ppo_run(home / "undisturbed", home, **LONG)
    ppo.run(run)
    return run


def start(run: RunDirectory, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "alignment", str(run.path)]
    with (run.path / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=HOUSE, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(run: RunDirectory, ready, child: subprocess.Popen, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert child.poll() is None, (run.path / "log.txt").read_text()
        assert time.monotonic() < until, (run.path / "log.txt").read_text()
        time.sleep(0.02)


def assert_same(run: RunDirectory, other: RunDirectory) -> None:
    for file in ("model/model.safetensors", "value_model/model.safetensors", "samples.jsonl"):
        assert file_digest(run.path / file) == file_digest(other.path / file), file
    assert run.result()["metrics"] == other.result()["metrics"]


def test_a_killed_run_resumes_to_the_same_bits(home: Path, undisturbed: RunDirectory):
    """SIGKILL after the second checkpoint, at whatever point the child then is; one later checkpoint is damaged on disk as well."""
    run = ppo_run(home / "killed", home, **LONG)
    child = start(run)
    wait_for(run, lambda: len(checkpoint_folders(run.checkpoints)) >= 2, child)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    newest = checkpoint_folders(run.checkpoints)[-1]
    with (newest / "policy.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")
    ppo.run(RunDirectory.open(run.path))
    events = run.read_events()[0]
    assert [event["kind"] for event in events].count("resume") == 1
    assert any("passed over" in event.get("text", "") for event in events)
    assert_same(run, undisturbed)


def test_sigterm_ends_at_a_checkpoint_with_status_75_and_the_run_goes_on_from_there(home: Path, undisturbed: RunDirectory):
    run = ppo_run(home / "stopped", home, **{**LONG, "checkpoint_steps": 0})
    child = start(run)
    wait_for(run, lambda: any(event["kind"] == "step" for event in run.read_events()[0]), child)
    child.terminate()
    assert child.wait(60) == 75
    assert run.result() is None
    assert len(checkpoint_folders(run.checkpoints)) == 1
    ppo.run(RunDirectory.open(run.path))
    assert_same(run, undisturbed)


def test_two_processes_give_the_result_of_one(home: Path):
    """Sums run in another order, so float32 weights differ in their last bits. Adam's epsilon of 1e-5 keeps a gradient that is noise from
    becoming a full step; after 4 steps of 4 updates at 3e-3 the weights agree to 1e-4, a hundredth of what they moved."""
    small = {"max_steps": 4, "prompts_per_step": 7, "evaluate_steps": 0, "kl_target_nats": 1.0}
    one, two = ppo_run(home / "one", home, **small), ppo_run(home / "two", home, **small)
    ppo.run(one)
    child = start(two, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    assert child.wait(180) == 0, (two.path / "log.txt").read_text()
    begin = load_file(home / "policy" / "model.safetensors")
    for file in ("model/model.safetensors", "value_model/model.safetensors"):
        weights, others = load_file(one.path / file), load_file(two.path / file)
        assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-4
    moved = load_file(one.path / "model/model.safetensors")
    assert max((moved[name] - begin[name]).abs().max().item() for name in begin) > 1e-2
    first, second = ([event["metrics"] for event in run.read_events()[0] if event["kind"] == "step"] for run in (one, two))
    for mine, theirs in zip(first, second, strict=True):
        for name in ("reward", "kl_k1_nats", "policy_loss", "value_loss", "gradient_norm", "kl_coefficient", "unfinished_share"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    texts = [[json.loads(line)["text"] for line in (run.path / "samples.jsonl").open()] for run in (one, two)]
    assert texts[0] == texts[1]
    assert [event["processes"] for event in two.read_events()[0] if event["kind"] == "start"] == [2]
