"""The worker: claims jobs, starts their children, follows their events, and writes how they ended.

One thread. Each turn of the loop renews the leases, so a worker that hangs loses its jobs, as it should. Whatever happens to the worker,
a job goes on: killed, its jobs are taken up from their checkpoints when the lease ends; cut off from the database, it ends its children
before another worker may start them again.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.db import DatabaseError, OperationalError, close_old_connections
from django.utils import timezone

from alignment.child import Child, RunBusy, end_leftovers, gpu_count, start_child
from alignment.follow import numbers, progress_of
from alignment.methods import CHILD_BAD_INPUT, CHILD_STOPPED
from alignment.models import Job
from alignment.samples import printable
from alignment.selectors import inputs_resolved, jobs_lost_for_good
from alignment.services.claims import job_claim, job_fail, job_finish, job_heartbeat, job_return, job_stop
from alignment.services.lineage import folder_digest
from alignment.services.settling import Ending
from annotation.errors import Refused
from training.errors import InputError
from training.rundir import RunDirectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    slots: int = 1
    once: bool = False  # end when nothing is left that this worker could do
    only: tuple[int, ...] | None = None  # these jobs, and no other
    poll_seconds: float = 1.0
    lease_seconds: float = 30.0
    grace_seconds: float = 60.0  # between "stop at a checkpoint" and SIGKILL

    def __post_init__(self) -> None:
        if self.slots < 1 or self.poll_seconds <= 0 or self.grace_seconds < 0:
            raise ValueError("slots must be at least 1, poll_seconds above 0 and grace_seconds not negative.")
        if self.lease_seconds < 3 * self.poll_seconds:
            raise ValueError(
                f"lease_seconds must be at least three polls ({3 * self.poll_seconds:g}), or a job is lost between two of them."
            )


@dataclass(slots=True)
class Held:
    """A job that this worker holds, and the child that works at it."""

    job: Job
    fence: int
    run: RunDirectory
    child: Child
    gpus: tuple[int, ...] = ()
    renewed_at: float = field(default_factory=time.monotonic)
    beaten_at: float = 0.0
    stop_at: float | None = None  # when it was asked to stop
    killed: bool = False


class Worker:
    """`run()` works until told to stop; `turn()` is one turn, for callers that have a loop of their own."""

    def __init__(self, options: WorkerSettings, *, announce: Callable[[str], None] = logger.info) -> None:
        self.options = options
        self.announce = lambda text: announce(printable(text))  # errors quote logs and servers
        self.name = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(3)}"
        self.held: list[Held] = []
        self.leaving = False
        self._gpus = gpu_count()
        self._breath_at = 0.0

    # -- the loop

    def run(self) -> None:
        with self._signals():
            try:
                while True:
                    busy = self.turn()
                    if (self.leaving and not self.held) or (self.options.once and not busy):
                        return
                    time.sleep(self.options.poll_seconds)
            except BaseException:
                # A defect of ours: the children write their checkpoints, and another worker takes the jobs up when the leases end.
                for held in self.held:
                    held.child.stop()
                raise

    def turn(self) -> bool:
        """Do what there is to do now. Returns False when there was nothing, and nothing runs."""
        close_old_connections()
        try:
            if not self.leaving:
                self._bury()
            for held in list(self.held):
                self._look_after(held)
            claimed = False
            while not self.leaving and self._claim_one():
                claimed = True
            return claimed or bool(self.held)
        except OperationalError as error:
            # The database is away for a moment. Children go on until their leases would have ended.
            logger.warning("worker %s: %s", self.name, error)
            self._end_overdue()
            return True

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def leave(_number: int, _frame: Any) -> None:
            self.leave(kill=self.leaving)

        before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self, *, kill: bool = False) -> None:
        """Stop the children at a checkpoint, put their jobs back into the queue, and end. With `kill`, do not wait for the checkpoints."""
        self.leaving = True
        for held in self.held:
            if kill:
                held.stop_at = time.monotonic() - self.options.grace_seconds - 1
            elif held.stop_at is None:
                self._ask_to_stop(held)

    # -- taking up

    def _free_slots(self) -> int:
        return self.options.slots - sum(held.job.gpu_slots for held in self.held)

    def _claim_one(self) -> bool:
        only = None if self.options.only is None else list(self.options.only)
        free = self._free_slots()
        if free < 1:
            return False
        job = job_claim(worker=self.name, lease_seconds=self.options.lease_seconds, slots=self.options.slots, free=free, only=only)
        if job is None:
            return False
        try:
            self._start(job)
        except (Refused, InputError, OSError, RunBusy) as error:
            remedy = getattr(error, "remedy", "") or f"Mend the cause, then `manage.py jobs resume {job.name}`."
            job_fail(job=job, fence=job.fence, ending=Ending(error=str(error), remedy=remedy))
            self.announce(f"{job.name}: failed: {error}")
        return True

    def _start(self, job: Job) -> None:
        if end_leftovers(job.folder, job.process_group, grace_seconds=min(self.options.grace_seconds, self.options.lease_seconds / 2)):
            self.announce(f"{job.name}: ended what a lost worker had left running")
        if not (job.folder / "config.json").exists():
            RunDirectory.create(job.folder, method=job.method, seed=job.seed, inputs=inputs_resolved(job=job), options=job.options)
        run = RunDirectory.open(job.folder)
        if run.result() is not None:
            self._finish(job, run, 0)
            self.announce(f"{job.name}: had its result already")
            return
        if job.state == Job.State.CANCELLING:
            job_stop(job=job, fence=job.fence, ending=Ending(), has_checkpoint=run.can_go_on())
            return
        (job.folder / "error.json").unlink(missing_ok=True)  # of an earlier attempt
        gpus = self._free_gpus(job.gpu_slots)
        if gpus and len(gpus) < job.processes:
            raise InputError(
                f"{job.processes} processes need as many GPUs; this machine has {self._gpus}.", remedy="Ask again with fewer --processes."
            )
        child = start_child(job.folder, processes=job.processes, gpus=gpus, cwd=settings.BASE_DIR)
        held = Held(job, job.fence, run, child, gpus or ())
        self.held.append(held)
        started = {"process_group": child.process_group, "started_at": job.started_at or timezone.now()}
        if job_heartbeat(job=job, fence=job.fence, lease_seconds=self.options.lease_seconds, progress=started) is None:
            self._drop(held)
        again = f", attempt {job.attempt}" if job.attempt > 1 else ""
        self.announce(f"{job.name}: started ({job.method}{again})")

    def _free_gpus(self, wanted: int) -> tuple[int, ...] | None:
        """None on a machine without GPUs; with fewer GPUs than slots, several jobs share."""
        if not self._gpus:
            return None
        use = {gpu: sum(gpu in held.gpus for held in self.held) for gpu in range(self._gpus)}
        return tuple(sorted(sorted(use, key=lambda gpu: (use[gpu], gpu))[:wanted]))

    # -- looking after

    def _look_after(self, held: Held) -> None:
        # The exit code comes first: all events were written before it.
        exit_code = held.child.exit_code()
        now = time.monotonic()
        if exit_code is None and now - held.beaten_at < min(1.0, self.options.poll_seconds) and held.stop_at is None:
            return
        state = self._beat(held)
        if state is None:
            self._drop(held)
        elif exit_code is not None:
            self._end(held, exit_code)
        elif state == Job.State.CANCELLING and held.stop_at is None:
            self._ask_to_stop(held)
        elif held.stop_at is not None and now - held.stop_at > self.options.grace_seconds:
            held.killed = True
            held.child.kill()

    def _beat(self, held: Held) -> str | None:
        events, offset = held.run.read_events(held.job.event_offset)
        changes = progress_of(events, warnings=held.job.warnings)
        if "metrics" in changes:
            changes["metrics"] = {**held.job.metrics, **changes["metrics"]}
        changes["event_offset"] = offset
        state = job_heartbeat(job=held.job, fence=held.fence, lease_seconds=self.options.lease_seconds, progress=changes)
        for name, value in changes.items():
            setattr(held.job, name, value)
        held.renewed_at = held.beaten_at = time.monotonic()
        return state

    def _ask_to_stop(self, held: Held) -> None:
        held.stop_at = time.monotonic()
        held.child.stop()
        self.announce(f"{held.job.name}: stopping at a checkpoint")

    def _drop(self, held: Held) -> None:
        """The job is no longer ours: end its child and write nothing."""
        held.child.kill()
        self.held.remove(held)
        self.announce(f"{held.job.name}: taken over by another worker; ended our child")

    def _end_overdue(self) -> None:
        for held in list(self.held):
            if time.monotonic() - held.renewed_at > self.options.lease_seconds:
                self._drop(held)

    def _bury(self) -> None:
        """Fail the jobs whose workers were lost too often; what they left running on this machine is ended first."""
        for job in jobs_lost_for_good(now=timezone.now()):
            if self.options.only is not None and job.pk not in self.options.only:
                continue
            try:
                end_leftovers(job.folder, job.process_group, grace_seconds=self.options.lease_seconds / 2)
            except RunBusy as busy:
                logger.warning("%s: %s", job.name, busy)
                continue
            error = f"Its worker was lost {job.attempt} times."
            remedy = f"Read {job.folder / 'log.txt'} (memory?), then `manage.py jobs resume {job.name}`."
            job_fail(job=job, fence=job.fence, ending=Ending(error=error, remedy=remedy))

    # -- endings

    def _end(self, held: Held, exit_code: int) -> None:
        # Kill whatever outlived its leader, so that the directory is free when the row says that the run has ended.
        held.child.kill()
        job, fence, run = held.job, held.fence, held.run
        try:
            if run.result() is not None:
                self._finish(job, run, exit_code)
                outcome = "succeeded"
            else:
                outcome = self._end_without_result(held, exit_code)
        except OperationalError:
            raise  # the job stays held; the next turn tries again, or the lease ends and another worker finds the result
        except (DatabaseError, Refused, OSError, ValueError, KeyError) as error:
            logger.exception("%s: could not be finished", job.name)
            remedy = f"The run itself is whole: mend the cause, then `manage.py jobs resume {job.name}` only repeats the last step."
            job_fail(
                job=job,
                fence=fence,
                ending=Ending(exit_code=exit_code, error=f"What it wrote could not be taken over: {error}", remedy=remedy),
            )
            outcome = "failed"
        self.held.remove(held)
        self.announce(f"{job.name}: {outcome}")

    def _finish(self, job: Job, run: RunDirectory, exit_code: int) -> None:
        digest = folder_digest(run.model_folder, lambda: self._breathe(job)) if run.model_folder.is_dir() else ""
        ending = Ending(exit_code=exit_code, metrics=numbers((run.result() or {}).get("metrics")))
        job_finish(job=job, fence=job.fence, ending=ending, model_digest=digest)

    def _breathe(self, job: Job) -> None:
        """Keep the leases during long work of the worker's own."""
        if time.monotonic() - self._breath_at > self.options.lease_seconds / 4:
            self._breath_at = time.monotonic()
            for one in {job, *(held.job for held in self.held)}:
                job_heartbeat(job=one, fence=one.fence, lease_seconds=self.options.lease_seconds)

    def _end_without_result(self, held: Held, exit_code: int) -> str:
        job, fence, run = held.job, held.fence, held.run
        goes_on = run.can_go_on()
        state = Job.objects.values_list("state", flat=True).get(pk=job.pk)
        if state == Job.State.CANCELLING:
            job_stop(job=job, fence=fence, ending=Ending(exit_code=exit_code), has_checkpoint=goes_on)
            return "stopped at a checkpoint" if goes_on else "cancelled"
        if self.leaving and held.stop_at is not None:
            job_return(job=job, fence=fence, ending=Ending(exit_code=exit_code), counts=False)
            return "back in the queue"
        if exit_code == CHILD_STOPPED:
            ending = Ending(exit_code=exit_code, error="Somebody stopped the run from outside.", remedy=f"manage.py jobs resume {job.name}")
            job_stop(job=job, fence=fence, ending=ending, has_checkpoint=goes_on)
            return "stopped from outside"
        ending = _failure(held, exit_code)
        # A signal that nobody here sent is mostly the machine's want of memory, which may pass; an error of the run's own would come again.
        if exit_code < 0 and run.error() is None and job.attempt < job.max_attempts:
            job_return(job=job, fence=fence, ending=ending, counts=True)
            return f"{ending.error} Back in the queue (attempt {job.attempt} of {job.max_attempts})."
        job_fail(job=job, fence=fence, ending=ending)
        return f"failed: {ending.error}"


def _failure(held: Held, exit_code: int) -> Ending:
    told = held.run.error()
    log = held.job.folder / "log.txt"
    if told:
        return Ending(exit_code=exit_code, error=str(told.get("error", "")), remedy=str(told.get("remedy", "")))
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        error = f"The run was killed ({name})" + (", most often because the machine had no memory left." if name == "SIGKILL" else ".")
        return Ending(exit_code=exit_code, error=error, remedy="Lower tokens_per_micro_batch, or use a larger machine; then `jobs resume`.")
    what = "refused its input" if exit_code == CHILD_BAD_INPUT else f"ended with status {exit_code}"
    return Ending(exit_code=exit_code, error=f"The run {what}: {_last_line(held)}", remedy=f"Read {log}.")


def _last_line(held: Held) -> str:
    try:
        lines = (held.job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][:300] if lines else "it wrote nothing"
