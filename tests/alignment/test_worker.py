"""The worker with real children: it ends runs well, stops them, survives being killed, and never lets two work in one folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.child import RunBusy, end_leftovers, holders, start_child
from alignment.worker import WorkerSettings
from tests.alignment.stand import BASE, Stand, stand, wait_until, write_demonstrations, write_tiny_model
from training.rundir import RunDirectory

__all__ = ["stand"]
pytestmark = pytest.mark.training
STEPS = 600  # enough that no run ends by itself while a test looks away
LONG = ("--set", f"max_steps={STEPS}", "--set", "checkpoint_steps=20", "--set", "log_steps=5", "--set", "tokens_per_micro_batch=512")
RACE = """
from alignment.services.claims import job_claim
import sys, time
time.sleep(max(0, {begin} - time.time()))
won = []
while (job := job_claim(worker=sys.argv[0] + str(time.time_ns()), lease_seconds=60, slots=1, free=1)) is not None:
    won.append(job.name)
print(",".join(won))
"""


@pytest.fixture(scope="module")
def start(stand: Stand) -> tuple[str, ...]:
    """The words that name the model and the data of an SFT job."""
    model = write_tiny_model(stand.var / "start")
    data = write_demonstrations(stand.var / "demonstrations.jsonl")
    return ("align", "sft", "--model", str(model), "--data", str(data))


def show(stand: Stand, name: str) -> dict:
    return stand.answer("jobs", "show", name, "--json")


def test_settings_that_would_lose_jobs_are_refused():
    with pytest.raises(ValueError, match="lost between two"):
        WorkerSettings(poll_seconds=5, lease_seconds=10)
    with pytest.raises(ValueError, match="slots"):
        WorkerSettings(slots=0)


def test_of_many_workers_each_job_has_one_owner(stand: Stand):
    stand.python(
        "from alignment.services.jobs import *\n"
        "data = {'path': '/nowhere', 'digest': '0' * 64}\n"
        "[job_create(request=JobRequest(method='sft', name=f'race-{n}', inputs={'model': '/m', 'data': data})) for n in range(40)]"
    )
    code = "import django; django.setup()\n" + RACE.format(begin=time.time() + 5)
    environment = {**stand.env, "DJANGO_SETTINGS_MODULE": "config.settings"}
    racers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=BASE, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    won = []
    for racer in racers:
        out, err = racer.communicate(timeout=90)
        assert racer.returncode == 0, err
        won += [name for name in out.strip().split(",") if name]
    assert sorted(won) == sorted(f"race-{n}" for n in range(40)), "each job once: none lost, none twice"
    stand.python("from alignment.models import Job; Job.objects.all().delete()")


def test_a_second_child_in_a_folder_is_refused_and_what_was_left_running_can_be_ended(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run", method="sft", seed=0, inputs={"model": "/nowhere"}, options={})
    sleeper = start_sleeper(run.path)
    assert sleeper.pid in holders(run.path)
    with pytest.raises(RunBusy, match="at work"):
        start_child(run.path)
    assert end_leftovers(run.path, None, grace_seconds=0.2)
    assert sleeper.wait(timeout=5) == -signal.SIGKILL, "it did not listen to SIGTERM"
    assert not end_leftovers(run.path, None, grace_seconds=0.2)


def start_sleeper(folder: Path) -> subprocess.Popen:
    """A real process that holds the run's log like a child, in a session of its own, and is deaf to SIGTERM."""
    with (folder / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, start_new_session=True)
    wait_until(lambda: "deaf" in (folder / "log.txt").read_text(), 10, "the sleeper started")
    return process


def test_a_run_that_refuses_its_input_fails_with_the_reason_and_the_remedy(stand: Stand, start):
    empty = stand.var / "empty.jsonl"
    empty.write_text('{"neither": "prompt", "nor": "completion"}\n')
    answer = stand.answer("align", "sft", "--model", start[3], "--data", str(empty), "--name", "refused", "--wait", "--json", code=1)
    assert answer["state"] == "failed"
    assert answer["exit_code"] == 2
    assert answer["error"]
    assert answer["attempt"] == 1, "what was refused once is not tried again"


def test_ctrl_c_of_who_waits_stops_the_job_and_leaves_no_child_behind(stand: Stand, start):
    waiting = stand.start(*start, "--name", "left", "--wait", *LONG)
    folder = stand.var / "runs/left"
    wait_until(lambda: folder.exists() and holders(folder), 150, "the child started")
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=120) == 4
    assert show(stand, "left")["state"] in ("stopped", "cancelled")
    assert not holders(folder)


def kinds_of(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "events.jsonl").read_text().splitlines()]


def test_cancel_stops_at_a_checkpoint_and_resume_goes_on_from_it(stand: Stand, start):
    stand.answer(*start, "--name", "long", "--json", *LONG)
    worker = stand.start("worker", "--poll-seconds", "0.2", "--lease-seconds", "5")
    wait_until(lambda: list((stand.var / "runs/long/checkpoints").glob("step-*")), 150, "a checkpoint")
    stopped = stand.answer("jobs", "cancel", "long", "--wait", "--json")
    assert (stopped["state"], stopped["exit_code"], stopped["model"]) == ("stopped", 75, None)
    assert 0 < stopped["step"] < STEPS
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=90) == 0, "a worker that is asked to leave leaves in good order"
    resumed = stand.answer("jobs", "resume", "long", "--wait", "--json")
    assert (resumed["state"], resumed["step"], resumed["model"]["name"]) == ("succeeded", STEPS, "long")
    assert "resume" in kinds_of(stand.var / "runs/long")


def test_a_job_whose_worker_and_child_were_killed_is_taken_up_from_its_checkpoint_and_ends_well(stand: Stand, start):
    stand.answer(*start, "--name", "killed", "--json", *LONG)
    worker = stand.start("worker", "--poll-seconds", "0.2", "--lease-seconds", "1")
    folder = stand.var / "runs/killed"
    wait_until(lambda: list((folder / "checkpoints").glob("step-*")), 150, "a checkpoint")
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    for orphan in holders(folder):  # as if the power had gone; test_worker_killed.py leaves it alive
        os.kill(orphan, signal.SIGKILL)
    time.sleep(1.1)  # its lease
    assert stand.run("worker", "--once", "--poll-seconds", "0.2", "--lease-seconds", "20").returncode == 0
    job = show(stand, "killed")
    assert (job["state"], job["attempt"], job["step"]) == ("succeeded", 2, STEPS)
    assert job["model"]["digest"]
    assert "resume" in kinds_of(folder)
    assert not holders(folder)
    assert "Traceback" not in (folder / "log.txt").read_text()
