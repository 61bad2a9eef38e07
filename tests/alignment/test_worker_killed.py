"""A worker is killed with SIGKILL in the middle of PPO; another takes the job up and it ends as if nothing had been."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from alignment.child import holders
from tests.alignment.stand import WORDS, Stand, stand, wait_until, write_tiny_model

__all__ = ["stand"]
pytestmark = pytest.mark.training
STEPS = 240  # enough that the child is still at work when the second worker has started, also on an idle machine


def write_rankings(path: Path) -> Path:
    """A snapshot's file by hand: of two texts the shorter is preferred."""
    rows = []
    for number, word in enumerate(WORDS):
        messages = [{"role": "user", "content": f"Say {word}."}]
        texts = sorted([f"The {word} sleeps.", f"The {word} {word} eats the quick cup."])
        best = min(range(2), key=lambda index: len(texts[index]))
        rows.append(
            {
                "ranking": f"r{number}", "revision": 1, "key": f"k{number:02}", "round": 0, "messages": messages,
                "prompt": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "split": "held_out" if number < 4 else "train",
                "completions": [{"text": text, "policy": ""} for text in texts], "bands": [[best], [1 - best]], "displayed": [0, 1],
                "criteria": {}, "flags": {}, "rater": "anna", "rater_kind": "human", "duration_seconds": None,
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return path


def test_a_worker_killed_in_the_middle_of_ppo_loses_nothing(stand: Stand):
    start = str(write_tiny_model(stand.var / "start"))
    data = str(write_rankings(stand.var / "rankings.jsonl"))
    reward = stand.answer("align", "reward", "--model", start, "--data", data, "--name", "rm", "--set", "epochs=1", "--wait", "--json")
    assert reward["state"] == "succeeded", reward

    options = ["prompts_per_step=8", "samples_per_prompt=2", "max_completion_tokens=10", f"max_steps={STEPS}", "checkpoint_steps=3"]
    options += ["evaluate_steps=20", "evaluation_prompts=4"]
    words = ["align", "ppo", "--model", start, "--reward-model", "rm", "--data", data, "--name", "ppo", "--json"]
    stand.answer(*words, *(f"--set={option}" for option in options))
    folder = stand.var / "runs/ppo"
    worker = stand.start("worker", "--poll-seconds", "0.2", "--lease-seconds", "1")
    wait_until(lambda: list((folder / "checkpoints").glob("step-*")), 180, "a checkpoint of PPO")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert holders(folder), "the child of the killed worker is still at work"
    time.sleep(1.1)

    assert stand.run("worker", "--once", "--poll-seconds", "0.2", "--lease-seconds", "30").returncode == 0
    job = stand.answer("jobs", "show", "ppo", "--json")
    assert (job["state"], job["attempt"], job["step"]) == ("succeeded", 2, STEPS), job
    assert job["model"]["digest"]
    assert not holders(folder), "one child at a time, and none in the end"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    resumed = next(event["step"] for event in events if event["kind"] == "resume")
    assert 0 < resumed < STEPS
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == sorted(steps), "it was stopped at a checkpoint, so no step was done twice"
    assert set(steps) == set(range(1, STEPS + 1)), "and none left out"
