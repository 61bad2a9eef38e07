"""Runs the demo's jobs as any job runs: rows in the queue, done here by a worker in this process, or by another worker that was quicker."""

import signal
import time
from collections.abc import Mapping
from types import FrameType

from alignment.models import Job
from alignment.services.jobs import job_resume
from alignment.worker import Worker, WorkerSettings
from annotation.errors import Refused
from demo.display import Display

POLL_SECONDS = 0.4
Ended = (Job.State.FAILED, Job.State.CANCELLED, Job.State.STOPPED)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the jobs are back in the queue, at their checkpoints."""


def jobs_run(jobs: list[Job], display: Display, *, slots: int, weights: Mapping[str, float] | None = None) -> list[Job]:
    """Run the jobs to their end, showing progress. Jobs that ended badly in an earlier demo are resumed first.

    Args:    slots: how many at a time;  weights: {method: seconds}, the share of each in the stage's bar.
    Raises:  Refused naming the job, its error and the remedy;  Interrupted after a stop in good order.
    """
    for job in jobs:
        job.refresh_from_db()
        if job.state in Ended and job.blocked_by_id is None:
            job_resume(job=job)
    ids = [job.pk for job in jobs]
    worker = Worker(WorkerSettings(slots=slots, only=tuple(ids), poll_seconds=POLL_SECONDS, grace_seconds=30.0))
    stop = _Stop()
    with stop:
        while True:
            worker.turn()
            rows = list(Job.objects.filter(pk__in=ids).order_by("id"))
            if stop.asked and not worker.leaving:
                worker.leave()
            if worker.leaving and not worker.held:
                raise Interrupted
            failed = [row for row in rows if row.state in Ended]
            if failed and not worker.held:
                first = failed[0]
                raise Refused("demo_job_failed", f"{first.name} is {first.state}: {first.error} {first.remedy}".rstrip())
            display.update(_share(rows, weights or {}), _told(rows), _left(rows))
            if all(row.state == Job.State.SUCCEEDED for row in rows):
                return rows
            time.sleep(POLL_SECONDS)


class _Stop:
    """Hears Ctrl-C and SIGTERM without an exception in the middle of a database write."""

    def __init__(self) -> None:
        self.asked = False

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _share(rows: list[Job], weights: Mapping[str, float]) -> float:
    total = sum(weights.get(row.method, 1.0) for row in rows)
    return sum(weights.get(row.method, 1.0) * row.share_done for row in rows) / total


def _told(rows: list[Job]) -> str:
    """`DPO step 40 of 120, loss 0.61 · reward model step 12 of 90`; the jobs that wait are counted."""
    parts = []
    for row in rows:
        if row.state in Job.HELD:
            steps = f" step {row.step} of {row.steps}" if row.steps else " starts"
            parts.append(row.get_method_display() + steps + (f", loss {row.loss:.3f}" if row.loss is not None else ""))
    waiting = sum(row.state in (Job.State.WAITING, Job.State.QUEUED) for row in rows)
    return " · ".join([*parts, *([f"{waiting} to come"] if waiting else [])])


def _left(rows: list[Job]) -> float | None:
    """The run's own estimate where one job is all that is left."""
    active = [row for row in rows if row.state != Job.State.SUCCEEDED]
    return active[0].eta_seconds if len(active) == 1 and active[0].steps else None
