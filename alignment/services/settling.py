"""What follows when a job ends: those that waited for it go or end too, and its round is what its jobs are."""

from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone

from alignment.models import Job, Round

State = Job.State


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a run ended, in the words of the job row."""

    exit_code: int | None = None
    error: str = ""
    remedy: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)


def job_let_go(job: Job, state: str, ending: Ending) -> None:
    """Write the new state of a locked row, and that no worker holds it any more."""
    job.state, job.exit_code = state, ending.exit_code
    # PostgreSQL stores no NUL, and what a crashing child says may hold anything.
    job.error, job.remedy = ending.error.replace("\x00", "\ufffd"), ending.remedy.replace("\x00", "\ufffd")
    job.worker, job.lease_expires_at, job.process_group, job.eta_seconds = "", None, None, None
    job.finished_at = None if state in Job.ACTIVE else timezone.now()
    job.save()


def dependents_release(*, job: Job) -> int:
    """Queue each job that waited for this one and now waits for none."""
    # The lock comes first: of two needs that end at the same moment, the second then sees that the first has ended.
    waiting = [one.pk for one in job.dependents.select_for_update().filter(state=State.WAITING)]
    unmet = Job.needs.through.objects.exclude(to_job__state=State.SUCCEEDED).values("from_job")
    return Job.objects.filter(pk__in=waiting).exclude(pk__in=unmet).update(state=State.QUEUED, blocked_by=None)


def dependents_block(*, job: Job) -> int:
    """End every job that needed this one, directly or through others, and say which job it was."""
    ended, front = 0, [job]
    while front:
        source = front.pop()
        for dependent in source.dependents.select_for_update().filter(state__in=[State.WAITING, State.QUEUED]).order_by("id"):
            dependent.blocked_by = job
            dependent.fence += 1
            reason = Ending(error=f"It needs {source.name}, which is {source.state}.", remedy=f"manage.py jobs resume {job.name}")
            job_let_go(dependent, State.FAILED if job.state == State.FAILED else State.CANCELLED, reason)
            front.append(dependent)
            ended += 1
    return ended


def round_settle(*, round: Round | None) -> None:
    """A round runs while one of its jobs does; then it is as good as its worst job. Jobs without a round pass None."""
    if round is None:
        return
    locked = Round.objects.select_for_update(of=("self",)).get(pk=round.pk)
    states = set(locked.jobs.values_list("state", flat=True))
    if states & set(Job.ACTIVE):
        state = Round.State.RUNNING
    elif State.FAILED in states:
        state = Round.State.FAILED
    elif states & {State.CANCELLED, State.STOPPED}:
        state = Round.State.CANCELLED
    else:
        state = Round.State.SUCCEEDED
    if state != locked.state or (state != Round.State.RUNNING and locked.finished_at is None):
        locked.state = state
        locked.finished_at = None if state == Round.State.RUNNING else timezone.now()
        locked.save(update_fields=["state", "finished_at"])
