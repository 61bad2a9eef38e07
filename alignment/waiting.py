"""Waits for jobs in a terminal, and does them there as long as no other worker has taken them."""

import signal
import time

from django.db.models import Max

from alignment.models import Job
from alignment.progress import Display
from alignment.services.jobs import job_cancel
from alignment.worker import Worker, WorkerSettings
from annotation.errors import Refused

POLL_SECONDS = 0.5


def wait_for(*, ids: list[int]) -> tuple[list[Job], bool]:
    """Show the jobs until all have ended. Returns them, and whether some go on elsewhere because the person who waited left.

    Ctrl-C (or SIGTERM) stops what is done here at a checkpoint, and takes what nobody has begun out of the queue; a second one does not
    wait for checkpoints. Jobs that another worker holds go on: that worker may belong to somebody else.
    """
    places = Job.objects.filter(pk__in=ids).aggregate(Max("gpu_slots"))["gpu_slots__max"] or 1
    worker = Worker(WorkerSettings(only=tuple(ids), poll_seconds=POLL_SECONDS, slots=places))
    asked = 0

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    told = 0
    try:
        with Display() as display:
            while True:
                if asked > told:
                    told = asked
                    display.say("Stopping at a checkpoint; Ctrl-C again to stop at once." if asked == 1 else "Stopping at once.")
                    _cancel_ours(ids, worker)
                    if asked > 1:
                        worker.leave(kill=True)
                worker.turn()
                jobs = list(Job.objects.filter(pk__in=ids).select_related("project").order_by("id"))
                display.show(jobs)
                active = [job for job in jobs if job.is_active]
                if not active:
                    return jobs, False
                if asked and all(_is_anothers(job, worker) for job in active):
                    display.say(f"{', '.join(job.name for job in active)}: another worker does it and goes on.")
                    return jobs, True
                time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_anothers(job: Job, worker: Worker) -> bool:
    return job.state in Job.HELD and job.worker != worker.name


def _cancel_ours(ids: list[int], worker: Worker) -> None:
    for job in Job.objects.filter(pk__in=ids).active().order_by("-id"):
        if not _is_anothers(job, worker):
            try:
                job_cancel(job=job)
            except Refused:
                continue  # ended meanwhile, or with one that it needs
