"""Stores what raters say. A ranking is checked against the lease it was made under, stored once, and never edited.

Nothing counts until each card is placed: every completion that was shown stands in exactly one band, or nothing is stored.
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from django.db import IntegrityError, transaction
from django.utils import timezone

from annotation.errors import Refused
from annotation.models import Lease, Membership, Project, Ranking, User
from annotation.services.announcements import progress_announce
from annotation.services.leases import lease_held, refuse_unless_live
from annotation.services.wording import clean_text

FLAGS = {"unsafe": "unsafe", "off_topic": "off topic", "wrong": "false claim", "personal_data": "personal data"}
COMMENT_CHARACTERS = 4000
LONGEST_SECONDS = 7 * 86_400.0
Bands = list[list[str]]


@dataclass(frozen=True, slots=True)
class Said:
    """What the rater says, checked: bands in one fixed spelling, so that equal rankings compare equal."""

    bands: Bands
    criteria: dict[str, Bands]
    flags: dict[str, list[str]]
    comment: str
    duration_seconds: float | None

    def same_as(self, ranking: Ranking) -> bool:
        """Whether the stored ranking says the same. The time it took is no part of what was said: a retry comes later."""
        stored = (ranking.bands, ranking.criteria, ranking.flags, ranking.comment)
        return stored == (self.bands, self.criteria, self.flags, self.comment)


def clean_bands(value: object, *, displayed: list[str], ties_allowed: bool, where: str) -> Bands:
    """Bands of completion uids, best first, each band in the order of the screen.

    Raises: Refused 400 unless every displayed completion stands in exactly one band, and no band is empty.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(band, list | tuple) for band in value):
        raise Refused("invalid", f"{where}: expected a list of bands, each a list of completion ids.", 400)
    if any(not isinstance(uid, str | uuid.UUID) for band in value for uid in band):
        raise Refused("invalid", f"{where}: completion ids are texts.", 400)
    place = {uid: index for index, uid in enumerate(displayed)}
    bands = [[str(uid).lower() for uid in band] for band in value]
    given = [uid for band in bands for uid in band]
    if any(uid not in place for uid in given):
        raise Refused("unknown_completion", f"{where}: names a completion that was not on the screen.", 400)
    if len(set(given)) != len(given):
        raise Refused("placed_twice", f"{where}: a completion stands in more than one place.", 400)
    if any(not band for band in bands):
        raise Refused("empty_band", f"{where}: a band is empty. Leave it out.", 400)
    if len(given) != len(displayed):
        missing = len(displayed) - len(given)
        raise Refused("not_placed", f"{where}: {missing} of {len(displayed)} completions not placed. Place each one.", 400)
    if not ties_allowed and len(bands) != len(given):
        raise Refused("ties_not_allowed", f"{where}: this project allows no ties. Put one completion in each band.", 400)
    return [sorted(band, key=place.__getitem__) for band in bands]


def clean_criteria(value: object, *, project: Project, displayed: list[str]) -> dict[str, Bands]:
    """Bands per criterion of the project. A criterion may be left out; one that is given is complete."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused("invalid", "criteria: expected {criterion: bands}.", 400)
    unknown = [str(name)[:80] for name in value if name not in project.criteria]
    if unknown:
        known = ", ".join(project.criteria) or "none"
        raise Refused("unknown_criterion", f"criteria: {unknown[0]!r} is none of this project's criteria ({known}).", 400)
    return {
        name: clean_bands(value[name], displayed=displayed, ties_allowed=project.ties_allowed, where=f"criteria, {name}")
        for name in project.criteria
        if name in value
    }


def clean_flags(value: object, *, displayed: list[str]) -> dict[str, list[str]]:
    """Known flags per displayed completion, in one fixed order."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise Refused("invalid", "flags: expected {completion id: [flag, ...]}.", 400)
    flags = {}
    for uid, names in value.items():
        if str(uid).lower() not in displayed:
            raise Refused("unknown_completion", "flags: names a completion that was not on the screen.", 400)
        if not isinstance(names, list | tuple) or any(not isinstance(name, str) or name not in FLAGS for name in names):
            raise Refused("unknown_flag", f"flags: known flags are {', '.join(FLAGS)}.", 400)
        if names:
            flags[str(uid).lower()] = [name for name in FLAGS if name in names]
    return dict(sorted(flags.items()))


def clean_duration(value: object) -> float | None:
    """Seconds on the page, finite and between 0 and a week, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= LONGEST_SECONDS:
        raise Refused("invalid", f"duration_seconds: expected a number from 0 to {LONGEST_SECONDS:.0f}.", 400)
    return float(value)


def clean_said(*, lease: Lease, bands: object, criteria: object, flags: object, comment: object, duration_seconds: object) -> Said:
    """Check everything against the lease. Raises: Refused 400 that names the place."""
    project, displayed = lease.project, list(lease.displayed)
    return Said(
        bands=clean_bands(bands, displayed=displayed, ties_allowed=project.ties_allowed, where="bands"),
        criteria=clean_criteria(criteria, project=project, displayed=displayed),
        flags=clean_flags(flags, displayed=displayed),
        comment=clean_text(comment, where="comment", limit=COMMENT_CHARACTERS),
        duration_seconds=clean_duration(duration_seconds),
    )


def ranking_submit(
    *,
    rater: User,
    token: uuid.UUID,
    client_id: uuid.UUID,
    bands: object,
    criteria: object = None,
    flags: object = None,
    comment: object = "",
    duration_seconds: object = None,
) -> tuple[Ranking, bool]:
    """Store a ranking for the lease's slot, once. Returns (ranking, created).

    A `client_id` that this rater sent before gives the stored ranking and False, even when the lease is over by now, so that a client
    may send again until it hears an answer.
    Raises: Refused 400 (what was said is not valid), 403 (no member any more), 404 (somebody else's lease), 409 (lease expired, lost or
    done; or the client_id stands for something else).
    """
    said = {"bands": bands, "criteria": criteria, "flags": flags, "comment": comment, "duration_seconds": duration_seconds}
    for last in (False, True):
        try:
            with transaction.atomic():
                return _submit(rater=rater, token=token, client_id=client_id, said=said)
        except IntegrityError:
            # Two requests with one client_id at the same moment: the other one is stored by now, and the second look finds it.
            if last:
                raise
    raise AssertionError("unreachable")


def _submit(*, rater: User, token: uuid.UUID, client_id: uuid.UUID, said: dict[str, object]) -> tuple[Ranking, bool]:
    refusal: Refused | None = None
    try:
        lease = lease_held(rater=rater, token=token)
    except Refused as error:
        refusal = error
    stored = _stored(rater=rater, client_id=client_id)
    if stored is not None:
        return _replayed(stored, said=said), False
    if refusal is not None:
        raise refusal
    refuse_unless_live(lease, now=timezone.now())
    refuse_strangers(rater=rater, project=lease.project)
    ranking = _insert(lease=lease, rater=rater, client_id=client_id, said=clean_said(lease=lease, **said), revision=1)
    lease.state, lease.expires_at = Lease.State.DONE, None
    lease.save(update_fields=["state", "expires_at"])
    progress_announce(project_id=lease.project_id)
    return ranking, True


def ranking_amend(
    *,
    rater: User,
    ranking_uid: uuid.UUID,
    client_id: uuid.UUID,
    bands: object,
    criteria: object = None,
    flags: object = None,
    comment: object = "",
    duration_seconds: object = None,
) -> tuple[Ranking, bool]:
    """Store the rater's second thoughts as the next revision; the earlier ones stay. Returns (ranking, created).

    `ranking_uid` may name any revision. Raises: as `ranking_submit`; Refused 404 for a ranking that is not this rater's.
    """
    said = {"bands": bands, "criteria": criteria, "flags": flags, "comment": comment, "duration_seconds": duration_seconds}
    for last in (False, True):
        try:
            with transaction.atomic():
                return _amend(rater=rater, ranking_uid=ranking_uid, client_id=client_id, said=said)
        except IntegrityError:
            if last:
                raise
    raise AssertionError("unreachable")


def _amend(*, rater: User, ranking_uid: uuid.UUID, client_id: uuid.UUID, said: dict[str, object]) -> tuple[Ranking, bool]:
    lease = Lease.objects.select_for_update(of=("self",)).select_related("project").filter(rankings__uid=ranking_uid, rater=rater).first()
    if lease is None:
        raise Refused("ranking_unknown", "You have no such ranking.", 404)
    stored = _stored(rater=rater, client_id=client_id)
    if stored is not None:
        return _replayed(stored, said=said), False
    refuse_strangers(rater=rater, project=lease.project)
    checked = clean_said(lease=lease, **said)
    current = Ranking.objects.current().get(lease=lease)
    Ranking.objects.filter(pk=current.pk).update(is_current=False)
    ranking = _insert(lease=lease, rater=rater, client_id=client_id, said=checked, revision=current.revision + 1)
    progress_announce(project_id=lease.project_id)
    return ranking, True


def refuse_strangers(*, rater: User, project: Project) -> None:
    """Raises: Refused 403 if the rater was taken out of the project since he got the prompt."""
    if not Membership.objects.filter(project=project, user=rater).exists():
        raise Refused("not_a_member", "You are not a member of this project any more. Its manager can add you.", 403)


def _stored(*, rater: User, client_id: uuid.UUID) -> Ranking | None:
    return Ranking.objects.select_related("lease__project").filter(rater=rater, client_id=client_id).first()


def _replayed(ranking: Ranking, *, said: dict[str, object]) -> Ranking:
    """The stored ranking, if the request says the same again. Raises: Refused 409 if it says something else."""
    try:
        same = clean_said(lease=ranking.lease, **said).same_as(ranking)
    except Refused:
        same = False
    if not same:
        message = "This client_id stands for a ranking that is stored already and says something else. Amend it, or send a new client_id."
        raise Refused("client_id_reused", message, 409)
    return ranking


def _insert(*, lease: Lease, rater: User, client_id: uuid.UUID, said: Said, revision: int) -> Ranking:
    return Ranking.objects.create(
        lease=lease,
        project_id=lease.project_id,
        prompt_id=lease.prompt_id,
        rater=rater,
        client_id=client_id,
        revision=revision,
        bands=said.bands,
        displayed=lease.displayed,
        criteria=said.criteria,
        flags=said.flags,
        comment=said.comment,
        duration_seconds=said.duration_seconds,
    )
