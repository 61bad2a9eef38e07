"""Store rankings that were made elsewhere: each takes a slot of its prompt, under a user who never signs in."""

import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence

from django.contrib.auth.hashers import make_password
from django.db import transaction
from django.utils import timezone

from annotation.content import ContentRefused, canonical
from annotation.models import Lease, Membership, Project, Prompt, Ranking, User
from annotation.orders import Rating
from annotation.rows import Row
from annotation.services.announcements import progress_announce
from annotation.services.prompts import BATCH, StoredPrompt, project_lock, prompts_store

NAMESPACE = uuid.UUID("5a3f7c0e-2f0b-5d0c-9c55-6d1f0c6a4e11")
USERNAME_CHARACTERS = 150
Outcome = ContentRefused | None


def import_uid(*, project: Project, rater: str, key: str) -> uuid.UUID:
    """The uid of an imported ranking: the same file gives the same uid in every database, so a snapshot of it has the same bytes."""
    return uuid.uuid5(NAMESPACE, canonical([project.slug, rater, key]).decode())


def rater_username(*, project: Project, rater: str) -> str:
    """`w001` of project `e2e` is the user `w001@e2e`: raters of two files that share a name are not the same person."""
    return unicodedata.normalize("NFKC", f"{rater}@{project.slug}")


def rankings_import(*, project: Project, rows: Sequence[Row], counts: Counter[str]) -> list[Outcome]:
    """Store one batch of rows, each whole or not at all. Returns a refusal, or None, for each row.

    A ranking that is stored already adds nothing; the same rater's other ranking of the same prompt is refused.
    """
    with transaction.atomic():
        project_lock(project)
        outcomes: list[Outcome] = [None] * len(rows)
        users = _users(project, {rating.rater for row in rows for rating in row.ratings}, counts)
        for place, row in enumerate(rows):
            names = [rater_username(project=project, rater=rating.rater) for rating in row.ratings]
            outcomes[place] = next((_stranger(name) for name in names if not isinstance(users.get(name), User)), None)
        welcome = [place for place, outcome in enumerate(outcomes) if outcome is None]
        stored = prompts_store(project=project, items=[rows[place].item for place in welcome], counts=counts)
        desk = _Desk(project, users, counts, [one for one in stored if isinstance(one, StoredPrompt)])
        for place, one in zip(welcome, stored, strict=True):
            outcomes[place] = one if isinstance(one, ContentRefused) else desk.take(rows[place], one)
        desk.save()
        progress_announce(project_id=project.pk)
    return outcomes


def _users(project: Project, raters: Iterable[str], counts: Counter[str]) -> dict[str, User | None]:
    """Users by user name; None for a name that a person who signs in has, or that is too long."""
    names = {rater_username(project=project, rater=rater) for rater in raters}
    short = {name for name in names if len(name) <= USERNAME_CHARACTERS}
    known = {user.username: user for user in User.objects.filter(username__in=short)}
    fresh = [
        User(username=name, kind=User.Kind.IMPORTED, is_active=False, password=make_password(None)) for name in sorted(short - set(known))
    ]
    User.objects.bulk_create(fresh, batch_size=BATCH)
    counts["raters"] += len(fresh)
    known |= {user.username: user for user in fresh}
    imported = {name: user for name, user in known.items() if user.kind == User.Kind.IMPORTED}
    Membership.objects.bulk_create([Membership(project=project, user=user) for user in imported.values()], ignore_conflicts=True)
    return {name: imported.get(name) for name in names}


def _stranger(name: str) -> ContentRefused:
    if len(name) > USERNAME_CHARACTERS:
        return ContentRefused(f"rater {name[:40]!r}... is too long a name: at most {USERNAME_CHARACTERS} characters with the project's")
    return ContentRefused(f"rater {name!r} is the name of a user whose rankings are not imported; rename the rater in the file")


class _Desk:
    """The leases and rankings of one batch: read once, decided in memory, written in bulk."""

    def __init__(self, project: Project, users: dict[str, User | None], counts: Counter[str], stored: list[StoredPrompt]) -> None:
        self.project, self.users, self.counts = project, users, counts
        self.prompts: dict[int, Prompt] = {one.prompt.pk: one.prompt for one in stored}
        self.leases: dict[int, list[Lease]] = {pk: [] for pk in self.prompts}
        old = {one.prompt.pk for one in stored if not one.is_new}
        for lease in Lease.objects.select_for_update().filter(prompt__in=old).order_by("prompt", "slot"):
            self.leases[lease.prompt_id].append(lease)
        rankings = Ranking.objects.current().filter(prompt__in=old)
        self.said: dict[tuple[int, int], tuple[list[list[str]], dict]] = {
            (prompt, rater): (bands, criteria)
            for prompt, rater, bands, criteria in rankings.values_list("prompt", "rater", "bands", "criteria")
        }
        for one in {one.prompt.pk: one for one in stored if one.is_filled and one.opens}.values():
            self.leases[one.prompt.pk] = [Lease(project=project, prompt=one.prompt, slot=slot) for slot in range(one.prompt.overlap)]
        self.changed: list[Lease] = []
        self.raised: dict[int, Prompt] = {}
        self.rankings: list[Ranking] = []
        self.now = timezone.now()

    def take(self, row: Row, stored: StoredPrompt) -> Outcome:
        """Give each rating of the row a slot, or none of them."""
        uids = [str(stored.uids[row.item.completions[place].identity]) for place in row.item.place_of]
        fresh = []
        for rating in row.ratings:
            user = self.users[rater_username(project=self.project, rater=rating.rater)]
            assert user is not None
            said = self.said.get((stored.prompt.pk, user.pk))
            bands = _by_name(rating.bands, uids)
            criteria = {name: _by_name(order, uids) for name, order in rating.criteria.items()}
            if said is None:
                fresh.append((rating, user, bands, criteria))
            elif (
                _same(said[0], bands)
                and said[1].keys() == criteria.keys()
                and all(_same(said[1][name], criteria[name]) for name in criteria)
            ):
                self.counts["rankings_present"] += 1
            else:
                return ContentRefused(f"rater {rating.rater[:60]!r} has ranked prompt {stored.prompt.key[:60]!r} already, and differently")
        for rating, user, bands, criteria in fresh:
            self._store(stored.prompt, rating, user, (bands, criteria, uids))
        return None

    def _store(self, prompt: Prompt, rating: Rating, user: User, said: tuple) -> None:
        bands, criteria, uids = said
        displayed = list(dict.fromkeys(uids[place] for place in rating.displayed or range(len(uids))))
        uid = import_uid(project=self.project, rater=rating.rater, key=prompt.key)
        self.said[prompt.pk, user.pk] = (bands, criteria)
        self.rankings.append(
            Ranking(
                uid=uid,
                client_id=uid,
                lease=self._slot(prompt, user, displayed),
                project=self.project,
                prompt=prompt,
                rater=user,
                bands=bands,
                displayed=displayed,
                criteria=criteria,
                flags={uids[place]: list(names) for place, names in rating.flags.items()},
                comment=rating.comment,
                duration_seconds=rating.duration_seconds,
            )
        )

    def _slot(self, prompt: Prompt, user: User, displayed: list[str]) -> Lease:
        """The first free slot; when all are taken the prompt gets one more."""
        leases = self.leases[prompt.pk]
        lease = next((lease for lease in leases if lease.state == Lease.State.FREE), None)
        if lease is None:
            lease = Lease(project=self.project, prompt=prompt, slot=1 + max((lease.slot for lease in leases), default=-1))
            leases.append(lease)
            if lease.slot >= prompt.overlap:
                prompt.overlap = lease.slot + 1
                self.raised[prompt.pk] = prompt
        elif lease.pk is not None:
            self.changed.append(lease)
        lease.state, lease.rater, lease.displayed, lease.granted_at = Lease.State.DONE, user, displayed, self.now
        return lease

    def save(self) -> None:
        fresh = [lease for leases in self.leases.values() for lease in leases if lease.pk is None]
        Prompt.objects.bulk_update(self.raised.values(), ["overlap"], batch_size=BATCH)
        Lease.objects.bulk_update(self.changed, ["state", "rater", "displayed", "granted_at"], batch_size=BATCH)
        Lease.objects.bulk_create(fresh, batch_size=BATCH)
        Ranking.objects.bulk_create(self.rankings, batch_size=BATCH)
        self.counts["slots"] += sum(lease.state == Lease.State.FREE for lease in fresh)
        self.counts["rankings"] += len(self.rankings)


def _by_name(bands: Sequence[Sequence[int]], uids: Sequence[str]) -> list[list[str]]:
    """Bands of uids, each in the order of the screen; equal texts that were merged stand once."""
    return [list(dict.fromkeys(uids[place] for place in sorted(band))) for band in bands]


def _same(one: list[list[str]], other: list[list[str]]) -> bool:
    return [set(band) for band in one] == [set(band) for band in other]
