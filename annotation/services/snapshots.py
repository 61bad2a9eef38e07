"""Make a snapshot of a project's rankings: the current revisions, as an immutable file, and the row that says what and why."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import F, QuerySet
from django.db.models.functions import Collate

from annotation.errors import Refused
from annotation.models import Completion, Project, Ranking, Snapshot, User
from annotation.services.imports import rater_username
from annotation.services.prompts import batched
from annotation.snapshot_files import snapshot_write

CHUNK = 500
FILTERS = ("raters", "exclude_raters", "kinds", "rounds", "since", "criterion")


def snapshot_folder(digest: str) -> Path:
    return Path(settings.SNAPSHOTS_DIR) / digest


def snapshot_create(*, project: Project, created_by: User | None = None, **filters: Any) -> Snapshot:
    """Write the project's current rankings to `var/snapshots/<digest>/`. The same rankings give the same snapshot.

    Filters: raters, exclude_raters (user names), kinds (human, imported, simulated), rounds (numbers), since (datetime),
             criterion (the order by this criterion takes the place of the overall one; rankings without it are left out and counted).
    Returns: a new row, or the row that stands for the same bytes already.
    Raises:  Refused for an unknown filter or value, and when no ranking is left.
    """
    wanted = filters_checked(project=project, filters=filters)
    left_out: Counter[str] = Counter()

    def manifest() -> dict[str, Any]:
        return {
            "project": project.slug,
            "filters": wanted,
            "held_out_percent": project.held_out_percent,
            "left_out": dict(sorted(left_out.items())),
        }

    with transaction.atomic():
        rows = _rows(_selected(project, wanted), wanted.get("criterion", ""), left_out)
        digest, written = snapshot_write(Path(settings.SNAPSHOTS_DIR), rows, manifest)
        made, _ = Snapshot.objects.get_or_create(
            project=project, digest=digest, defaults={"filters": wanted, "counts": written["counts"], "created_by": created_by}
        )
    return made


def filters_checked(*, project: Project, filters: dict[str, Any]) -> dict[str, Any]:
    """The filters as JSON, without the empty ones. Raises: Refused, naming what is not known."""
    if unknown := sorted(set(filters) - set(FILTERS)):
        raise Refused("filter_unknown", f"There is no filter {unknown[0]!r}: use {', '.join(FILTERS)}.")
    wanted = {name: value for name, value in filters.items() if value not in (None, "", [], ())}
    for name in ("raters", "exclude_raters"):
        if name in wanted:
            wanted[name] = _raters_checked(project, set(wanted[name]))
    if "kinds" in wanted:
        wanted["kinds"] = sorted(set(wanted["kinds"]))
        if strange := sorted(set(wanted["kinds"]) - set(User.Kind.values)):
            raise Refused("kind_unknown", f"There is no kind of rater {strange[0]!r}: use {', '.join(User.Kind.values)}.")
    if "rounds" in wanted:
        wanted["rounds"] = sorted({int(number) for number in wanted["rounds"]})
    if isinstance(since := wanted.get("since"), datetime):
        wanted["since"] = (since if since.tzinfo else since.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    return wanted


def _raters_checked(project: Project, names: set[str]) -> list[str]:
    """User names; a rater from a file may be called by his name in the file."""
    imported = {name: rater_username(project=project, rater=name) for name in names}
    known = set(User.objects.filter(username__in=[*names, *imported.values()]).values_list("username", flat=True))
    found = {name: name if name in known else imported[name] for name in names}
    if unknown := sorted(name for name in names if found[name] not in known):
        raise Refused("rater_unknown", f"There is no rater {unknown[0]!r}.")
    return sorted(set(found.values()))


def _selected(project: Project, wanted: dict[str, Any]) -> QuerySet[Ranking]:
    rankings = Ranking.objects.filter(project=project).current().select_related("prompt", "rater")
    if "raters" in wanted:
        rankings = rankings.filter(rater__username__in=wanted["raters"])
    if "exclude_raters" in wanted:
        rankings = rankings.exclude(rater__username__in=wanted["exclude_raters"])
    if "kinds" in wanted:
        rankings = rankings.filter(rater__kind__in=wanted["kinds"])
    if "rounds" in wanted:
        rankings = rankings.filter(prompt__round__in=wanted["rounds"])
    if "since" in wanted:
        rankings = rankings.filter(created_at__gte=datetime.fromisoformat(wanted["since"]))
    # By code point, in both databases: PostgreSQL would sort text by its locale otherwise, and the bytes would depend on the machine.
    collation = "C" if connection.vendor == "postgresql" else "BINARY"
    return rankings.order_by(Collate(F("prompt__key"), collation), Collate(F("rater__username"), collation), "uid")


def _rows(rankings: QuerySet[Ranking], criterion: str, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows of the file, a chunk at a time: neither the rankings nor the texts are ever all in memory."""
    for chunk in batched(rankings.iterator(chunk_size=CHUNK), CHUNK):
        completions = {
            str(uid): (text, policy)
            for uid, text, policy in Completion.objects.filter(prompt__in={one.prompt_id for one in chunk}).values_list(
                "uid", "text", "policy"
            )
        }
        for ranking in chunk:
            if criterion and criterion not in ranking.criteria:
                left_out["no_such_criterion"] += 1
            elif any(not completions.get(uid, ("?", ""))[0].strip() for uid in ranking.displayed):
                left_out["no_texts"] += 1
            else:
                yield _row(ranking, completions, criterion)


def _row(ranking: Ranking, completions: dict[str, tuple[str, str]], criterion: str) -> dict[str, Any]:
    if missing := [uid for band in ranking.bands for uid in band if uid not in completions]:
        raise Refused("completion_missing", f"Ranking {ranking.uid} names completion {missing[0]}, which its prompt does not have.")
    # Equal texts of one policy cannot be told apart but by their place on the screen.
    shown = sorted(range(len(ranking.displayed)), key=lambda place: (completions[ranking.displayed[place]], place))
    number = {ranking.displayed[place]: index for index, place in enumerate(shown)}

    def numbered(bands: list[list[str]]) -> list[list[int]]:
        return [sorted(number[uid] for uid in band) for band in bands]

    criteria = {name: numbered(bands) for name, bands in ranking.criteria.items()}
    return {
        "ranking": str(ranking.uid),
        "revision": ranking.revision,
        "key": ranking.prompt.key,
        "prompt": ranking.prompt.digest,
        "split": ranking.prompt.split,
        "round": ranking.prompt.round,
        "messages": ranking.prompt.messages,
        "completions": [{"text": text, "policy": policy} for text, policy in (completions[ranking.displayed[place]] for place in shown)],
        "bands": criteria[criterion] if criterion else numbered(ranking.bands),
        "displayed": [number[uid] for uid in ranking.displayed],
        "criteria": criteria,
        "flags": {str(number[uid]): sorted(flags) for uid, flags in ranking.flags.items()},
        "rater": ranking.rater.username,
        "rater_kind": ranking.rater.kind,
        "duration_seconds": ranking.duration_seconds,
    }
