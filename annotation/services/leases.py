"""Hands prompts to raters: one slot, one rater, one grant at a time.

Order: lowest prompt first, then lowest slot. Prompts finish in the order in which they came in, so the ones nearest to completion
are worked on first without counting anything, and the partial index `lease_open` serves the search. Raters who ask at the same moment
do not queue for one row: on PostgreSQL each skips the rows that others are just taking (SKIP LOCKED), on SQLite
writers take turns anyway (BEGIN IMMEDIATE).

Who may rank: every member of the project, managers and reviewers too. Trying one's own guidelines is how they get better, and the
ranking carries its author's name, so a snapshot can leave him out.
"""

import random
import uuid
from datetime import datetime, timedelta

from django.db import IntegrityError, transaction
from django.db.models import Exists, OuterRef, Q, QuerySet
from django.utils import timezone

from annotation.errors import Refused
from annotation.models import Completion, Lease, Membership, Project, Skip, User
from annotation.services.announcements import progress_announce
from annotation.services.wording import clean_text

ATTEMPTS = 20
COMMENT_CHARACTERS = 4000
_shuffler = random.SystemRandom()


def claimable(*, projects: list[Project], rater: User, now: datetime) -> QuerySet[Lease]:
    """Slots that this rater could be given now: free or run out, of prompts that he neither holds, ranked nor skipped."""
    his_own = Lease.objects.filter(prompt=OuterRef("prompt"), rater=rater)
    skipped = Skip.objects.filter(prompt=OuterRef("prompt"), rater=rater)
    return (
        Lease.objects.filter(project__in=projects)
        .exclude(state=Lease.State.DONE)
        .filter(Q(state=Lease.State.FREE) | Q(state=Lease.State.HELD, expires_at__lte=now))
        .filter(~Exists(his_own), ~Exists(skipped))
    )


def lease_next(*, project: Project, rater: User) -> Lease | None:
    """The rater's own prompt if he holds one, else the next one that is open to him, else None.

    A slot that he let run out, and that nobody took since, comes back first and in the same order on screen: his draft still fits.
    Raises: Refused("not_a_member", 403); Refused("project_closed", 409) if he holds nothing and the project is closed.
    """
    for _ in range(ATTEMPTS):
        try:
            with transaction.atomic():
                lease, settled = _take(project=project, rater=rater)
        except IntegrityError:
            # The unique constraints are the last word: somebody was quicker. Look again.
            continue
        if settled:
            return lease
    raise Refused("busy", "Many raters are asking at this moment. Nothing is lost: ask again in a few seconds.", 503)


def _take(*, project: Project, rater: User) -> tuple[Lease | None, bool]:
    """One attempt inside one transaction: (the lease or None, whether that is the final answer)."""
    # Locking the membership makes one rater's own requests take turns: two tabs get one prompt, not two.
    member = Membership.objects.select_for_update(of=("self",)).select_related("project").filter(project=project, user=rater).first()
    if member is None:
        raise Refused("not_a_member", "You are not a member of this project. Its manager can add you.", 403)
    now = timezone.now()
    held = Lease.objects.select_related("prompt").filter(project=project, rater=rater, state=Lease.State.HELD).order_by("prompt", "slot")
    for lease in held:
        if lease.expires_at is not None and lease.expires_at > now:
            return lease, True
    if not member.project.is_open:
        raise Refused("project_closed", "This project is closed and hands out no prompts.", 409)
    for lease in held:
        if _grant(lease, rater=rater, project=member.project, now=now):
            return lease, True
    candidate = (
        claimable(projects=[project], rater=rater, now=now)
        .select_for_update(skip_locked=True, of=("self",))
        .select_related("prompt")
        .order_by("prompt_id", "slot")
        .first()
    )
    if candidate is None:
        return None, True
    taken = _grant(candidate, rater=rater, project=member.project, now=now)
    return (candidate, True) if taken else (None, False)


def _grant(lease: Lease, *, rater: User, project: Project, now: datetime) -> bool:
    """Give the slot to the rater by one conditional UPDATE; False if it changed hands since it was read."""
    as_read = Q(pk=lease.pk, token=lease.token, state=lease.state)
    if lease.rater_id != rater.pk or not lease.displayed:
        lease.displayed = [str(uid) for uid in Completion.objects.filter(prompt=lease.prompt_id).values_list("uid", flat=True)]
        _shuffler.shuffle(lease.displayed)
    lease.rater, lease.state, lease.token = rater, Lease.State.HELD, uuid.uuid4()
    lease.granted_at, lease.expires_at = now, now + timedelta(seconds=project.lease_seconds)
    updated = Lease.objects.filter(as_read).update(
        rater=rater, state=lease.state, token=lease.token, displayed=lease.displayed, granted_at=now, expires_at=lease.expires_at
    )
    return updated == 1


def lease_held(*, rater: User, token: uuid.UUID) -> Lease:
    """Lock and return the lease of this grant. Call inside a transaction.

    Raises: Refused("lease_unknown", 404) for somebody else's grant; Refused("lease_lost", 409) for a grant that is over or never was.
    """
    lease = Lease.objects.select_for_update(of=("self",)).select_related("project").filter(token=token).first()
    if lease is None:
        raise Refused("lease_lost", "This prompt is no longer yours: your time on it ended and it went to somebody else.", 409)
    if lease.rater_id is not None and lease.rater_id != rater.pk:
        raise Refused("lease_unknown", "There is no such lease.", 404)
    return lease


def refuse_unless_live(lease: Lease, *, now: datetime) -> None:
    """Raises: Refused 409, saying whether the lease is done, given back or run out."""
    if lease.state == Lease.State.DONE:
        raise Refused("already_ranked", "You have ranked this prompt already. Amend that ranking instead.", 409)
    if lease.state == Lease.State.FREE:
        raise Refused("lease_lost", "You gave this prompt back.", 409)
    if lease.expires_at is None or lease.expires_at <= now:
        message = "Your time on this prompt ended. Your draft is kept: take the prompt again to go on."
        raise Refused("lease_expired", message, 409)


@transaction.atomic
def lease_extend(*, rater: User, token: uuid.UUID) -> Lease:
    """Start the lease's time anew. An expired lease is not revived: somebody may be taking it at this moment."""
    lease = lease_held(rater=rater, token=token)
    refuse_unless_live(lease, now=timezone.now())
    lease.expires_at = timezone.now() + timedelta(seconds=lease.project.lease_seconds)
    lease.save(update_fields=["expires_at"])
    return lease


@transaction.atomic
def lease_skip(*, rater: User, token: uuid.UUID, reason: str, comment: str = "") -> Skip:
    """Give the slot back for somebody else, for good; the second identical request finds it done and says so quietly."""
    if reason not in Skip.Reason.values:
        raise Refused("unknown_reason", f"The reason is one of: {', '.join(Skip.Reason.values)}.", 400)
    comment = clean_text(comment, where="comment", limit=COMMENT_CHARACTERS)
    lease = lease_held(rater=rater, token=token)
    if lease.state == Lease.State.FREE:
        stored = Skip.objects.filter(prompt=lease.prompt_id, rater=rater).first()
        if stored is None:
            raise Refused("lease_unknown", "There is no such lease.", 404)
        return stored
    if lease.state == Lease.State.DONE:
        refuse_unless_live(lease, now=timezone.now())
    skip, _ = Skip.objects.get_or_create(prompt_id=lease.prompt_id, rater=rater, defaults={"reason": reason, "comment": comment})
    lease.rater, lease.state, lease.displayed = None, Lease.State.FREE, []
    lease.granted_at = lease.expires_at = None
    lease.save(update_fields=["rater", "state", "displayed", "granted_at", "expires_at"])
    progress_announce(project_id=lease.project_id)
    return skip
