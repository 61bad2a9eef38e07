"""What a worker does to a job row: take it up, keep it, and write how it ended. Every write is conditional on the fence."""

from datetime import timedelta
from typing import Any

from django.db import transaction
from django.db.models import Case, F, Q, Value, When
from django.utils import timezone

from alignment.models import Job, Round
from alignment.services import home, lineage
from alignment.services.settling import Ending, dependents_block, dependents_release, job_let_go, round_settle

State = Job.State


def job_claim(*, worker: str, lease_seconds: float, slots: int, free: int, only: list[int] | None = None) -> Job | None:
    """Take the oldest job up, or return None when there is none for this worker now.

    The claim itself is one UPDATE that asks for the fence it has seen: of many workers that read the same row, one changes it.
    A job that fits the worker but not its free places is waited for, or small jobs would keep it waiting for ever.
    """
    now = timezone.now()
    candidates = (
        Job.objects.claimable(now).filter(gpu_slots__lte=slots).filter(Q(state=State.CANCELLING) | Q(attempt__lt=F("max_attempts")))
    )
    if only is not None:
        candidates = candidates.filter(pk__in=only)
    for pk, fence, wanted in candidates.order_by("id").values_list("pk", "fence", "gpu_slots")[:50]:
        if wanted > free:
            return None
        taken = (
            Job.objects.claimable(now)
            .filter(pk=pk, fence=fence)
            .update(
                state=Case(When(state=State.CANCELLING, then=Value(State.CANCELLING)), default=Value(State.RUNNING)),
                attempt=Case(When(state=State.CANCELLING, then=F("attempt")), default=F("attempt") + 1),
                fence=F("fence") + 1,
                worker=worker,
                heartbeat_at=now,
                lease_expires_at=now + timedelta(seconds=lease_seconds),
            )
        )
        if taken:
            return Job.objects.get(pk=pk)
    return None


def job_heartbeat(*, job: Job, fence: int, lease_seconds: float, progress: dict[str, Any] | None = None) -> str | None:
    """Keep the job, and store its progress. Returns the state as it now is, or None if the job is no longer ours: then stop the child."""
    now = timezone.now()
    kept = Job.objects.filter(pk=job.pk, fence=fence, state__in=Job.HELD).update(
        heartbeat_at=now, lease_expires_at=now + timedelta(seconds=lease_seconds), **(progress or {})
    )
    if not kept:
        return None
    return Job.objects.values_list("state", flat=True).get(pk=job.pk)


def _held(job: Job, fence: int) -> Job | None:
    return Job.objects.select_for_update().filter(pk=job.pk, fence=fence, state__in=Job.HELD).first()


@transaction.atomic
def job_finish(*, job: Job, fence: int, ending: Ending, model_digest: str = "") -> bool:
    """The run has its result: register its model, bring its completions home, let the jobs go that waited for it."""
    held = _held(job, fence)
    if held is None:
        return False
    if ending.metrics:
        last_loss = {"loss": held.loss} if held.loss is not None else {}
        held.metrics = {**last_loss, **ending.metrics}
    held.step = held.steps or held.step
    held.blocked_by = None
    job_let_go(held, State.SUCCEEDED, ending)
    lineage.model_register(job=held, metrics=ending.metrics, digest=model_digest)
    dependents_release(job=held)
    if held.round_id:
        home.round_bring_home(round=Round.objects.select_for_update().get(pk=held.round_id))
        round_settle(round=held.round)
    return True


@transaction.atomic
def job_fail(*, job: Job, fence: int, ending: Ending) -> bool:
    return _end(job, fence, State.FAILED, ending)


@transaction.atomic
def job_stop(*, job: Job, fence: int, ending: Ending, has_checkpoint: bool) -> bool:
    """It ended because somebody asked for it: stopped if there is a checkpoint to resume from, else cancelled."""
    return _end(job, fence, State.STOPPED if has_checkpoint else State.CANCELLED, ending)


@transaction.atomic
def job_return(*, job: Job, fence: int, ending: Ending, counts: bool) -> bool:
    """Put it back into the queue, to go on from its checkpoint. With `counts` that was an attempt; without, the worker just left."""
    held = _held(job, fence)
    if held is None:
        return False
    if held.state == State.CANCELLING:
        return _end(job, fence, State.STOPPED if held.step else State.CANCELLED, ending)
    if not counts:
        held.attempt -= 1
    job_let_go(held, State.QUEUED, ending)
    return True


def _end(job: Job, fence: int, state: str, ending: Ending) -> bool:
    held = _held(job, fence)
    if held is None:
        return False
    job_let_go(held, state, ending)
    dependents_block(job=held)
    round_settle(round=held.round)
    return True
