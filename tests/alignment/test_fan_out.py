"""One run in several processes: what their end tells the one who started them."""

import time

import pytest
import torch

import alignment.sft
from alignment.fan_out import asked_of_accelerate
from tests.training.tiny import demonstrations, events, llama, make_run, start, weights

pytestmark = pytest.mark.training


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"ACCELERATE_USE_CPU": "true"},
        {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "1", "WORLD_SIZE": "2"},
        {"MASTER_PORT": "1"},
    ],
)
def test_without_accelerates_lonely_launch_nothing_fans_out(environment):
    assert asked_of_accelerate(environment) == (1, {})


def test_bad_input_of_all_processes_is_status_2(tmp_path):
    run = make_run(tmp_path / "run", "sft", model=tmp_path, data=demonstrations(tmp_path / "d.jsonl"), epoch=1)
    child = start(run, "--processes", "2")
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 2, output
    assert "Did you mean 'epochs'" in run.error()["error"]


def test_two_processes_stop_at_one_checkpoint_and_one_process_goes_on(tmp_path):
    model, data = llama(tmp_path / "model"), demonstrations(tmp_path / "d.jsonl")
    options = {"max_steps": 200, "batch_rows": 8, "learning_rate": 1e-4, "checkpoint_seconds": 0.0}
    run = make_run(tmp_path / "run", "sft", model=model, data=data, **options)
    child = start(run, "--processes", "2")
    deadline = time.monotonic() + 200
    while not events(run, "step"):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.terminate()
    output = child.communicate(timeout=100)[0]
    assert child.returncode == 75, output
    assert [event["status"] for event in events(run, "end")] == ["stopped"]
    assert len(events(run, "checkpoint")) == 1
    alignment.sft.run(run)
    alone = make_run(tmp_path / "alone", "sft", model=model, data=data, **options)
    alignment.sft.run(alone)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=1e-4, rtol=0)
