"""Everything that pages, the API and the socket read. Who may see what is decided here, at the first line of each view.

A stranger is told that there is no such project, whether it exists or not. A superuser sees every project as its manager does; to rank,
he must be a member like everybody else.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from django.core.exceptions import PermissionDenied
from django.db.models import Avg, Count, F, Max, Q, QuerySet
from django.http import Http404
from django.utils import timezone

from annotation.models import Completion, Lease, Membership, Project, Ranking, Skip, Snapshot, User
from annotation.services.leases import claimable

MANAGER, REVIEWER, RATER = Membership.Role.MANAGER, Membership.Role.REVIEWER, Membership.Role.RATER
SEES_EVERYTHING = frozenset({MANAGER.value, REVIEWER.value})
STREAM_CHUNK = 500


def role_in(user: Any, project: Project) -> str | None:
    role = Membership.objects.role_of(user, project)
    return MANAGER.value if user.is_superuser else role


def project_for(*, user: Any, slug: str, everything: bool = False) -> tuple[Project, str]:
    """The project and the user's role in it.

    `everything`: only for managers and reviewers, who see all rankings. Raises: Http404 for strangers, PermissionDenied for raters there.
    """
    project = Project.objects.filter(slug=slug).first()
    role = role_in(user, project) if project else None
    if project is None or role is None:
        raise Http404("There is no such project, or you are not a member of it.")
    if everything and role not in SEES_EVERYTHING:
        raise PermissionDenied("Only managers and reviewers of this project see this.")
    return project, role


def is_member(*, user: Any, project: Project) -> bool:
    return Membership.objects.filter(user=user, project=project).exists()


def start_of_today() -> datetime:
    return timezone.localtime().replace(hour=0, minute=0, second=0, microsecond=0)


def left_for(*, projects: Iterable[Project], rater: User) -> dict[int, int]:
    """Prompts that the rater could be given now, by project: his unfinished one, and what is open to him where the project is open."""
    projects = list(projects)
    held = Lease.objects.filter(project__in=projects, rater=rater, state=Lease.State.HELD)
    left = Counter({row["project"]: row["number"] for row in held.values("project").annotate(number=Count("pk"))})
    still_open = [project for project in projects if project.is_open]
    free = claimable(projects=still_open, rater=rater, now=timezone.now())
    left.update({row["project"]: row["number"] for row in free.values("project").annotate(number=Count("prompt", distinct=True))})
    return left


def done_by(*, projects: Iterable[Project], rater: User) -> dict[int, dict[str, int]]:
    """Rankings of the rater by project, in all and today. An amendment is no new ranking."""
    mine = Ranking.objects.filter(project__in=list(projects), rater=rater, revision=1).values("project")
    rows = mine.annotate(all=Count("pk"), today=Count("pk", filter=Q(created_at__gte=start_of_today())))
    return {row["project"]: {"all": row["all"], "today": row["today"]} for row in rows}


def progress_of(projects: Iterable[Project]) -> dict[int, dict[str, Any]]:
    """Totals that every member may see, by project: two queries, however many projects."""
    projects = list(projects)
    now, today = timezone.now(), start_of_today()
    rows = Lease.objects.filter(project__in=projects).values("project")
    slots = rows.annotate(
        slots=Count("pk"),
        done=Count("pk", filter=Q(state=Lease.State.DONE)),
        held=Count("pk", filter=Q(state=Lease.State.HELD, expires_at__gt=now)),
        prompts=Count("prompt", distinct=True),
        open_prompts=Count("prompt", filter=~Q(state=Lease.State.DONE), distinct=True),
    )
    by_project: dict[int, dict[str, Any]] = {row["project"]: dict(row) for row in slots}
    ranked = Ranking.objects.filter(project__in=projects, revision=1, created_at__gte=today).values("project")
    rankings_today = {row["project"]: row["number"] for row in ranked.annotate(number=Count("pk"))}
    empty = {"slots": 0, "done": 0, "held": 0, "prompts": 0, "open_prompts": 0}
    return {project.pk: _progress(project, by_project.get(project.pk, empty), rankings_today.get(project.pk, 0)) for project in projects}


def _progress(project: Project, slots: dict[str, Any], rankings_today: int) -> dict[str, Any]:
    return {
        "project": project.slug,
        "is_open": project.is_open,
        "slots": slots["slots"],
        "done": slots["done"],
        "held": slots["held"],
        "left": slots["slots"] - slots["done"],
        "percent": round(100 * slots["done"] / slots["slots"], 1) if slots["slots"] else 0.0,
        "prompts": slots["prompts"],
        "prompts_done": slots["prompts"] - slots["open_prompts"],
        "rankings_today": rankings_today,
    }


def raters_of(project: Project) -> list[dict[str, Any]]:
    """What each person did, as evidence and not as a verdict: counts, seconds for a ranking, skips, the last ranking."""
    today = start_of_today()
    rows = (
        Ranking.objects.filter(project=project, revision=1)
        .values(name=F("rater__username"), kind=F("rater__kind"))
        .annotate(
            rankings=Count("pk"),
            today=Count("pk", filter=Q(created_at__gte=today)),
            mean_seconds=Avg("duration_seconds"),
            last_at=Max("created_at"),
        )
    )
    people = {row["name"]: {**row, "skips": 0, "role": ""} for row in rows}
    blank = {"rankings": 0, "today": 0, "mean_seconds": None, "last_at": None, "skips": 0, "role": ""}
    skips = Skip.objects.filter(prompt__project=project).values_list("rater__username").annotate(number=Count("pk"))
    for member in Membership.objects.filter(project=project).select_related("user"):
        name = member.user.username
        people.setdefault(name, {"name": name, "kind": member.user.kind, **blank})["role"] = member.role
    for name, number in skips:
        people.setdefault(name, {"name": name, "kind": "human", **blank})["skips"] = number
    return sorted(people.values(), key=lambda row: (-row["rankings"], row["name"]))


def projects_of(user: User) -> list[dict[str, Any]]:
    """The user's projects with his role, his own work, what is left for him, and the totals. Six queries, however many projects."""
    roles = dict(Membership.objects.filter(user=user).values_list("project", "role"))
    projects = list(Project.objects.all() if user.is_superuser else Project.objects.filter(pk__in=roles))
    joined = [project for project in projects if project.pk in roles]
    left, mine, progress = left_for(projects=joined, rater=user), done_by(projects=joined, rater=user), progress_of(projects)
    return [
        {
            "project": project,
            "role": MANAGER.value if user.is_superuser else roles[project.pk],
            "member": project.pk in roles,
            "left": left.get(project.pk, 0),
            "mine": mine.get(project.pk, {"all": 0, "today": 0}),
            "progress": progress[project.pk],
        }
        for project in projects
    ]


def snapshots_of(project: Project) -> QuerySet[Snapshot]:
    return Snapshot.objects.filter(project=project).select_related("created_by")


def task_of(lease: Lease) -> dict[str, Any]:
    """What a rater gets to see of a lease, and nothing more: no policy, no run, no key, no round, no row number."""
    texts = {str(uid): text for uid, text in Completion.objects.filter(prompt=lease.prompt_id).values_list("uid", "text")}
    return {
        "prompt": [{"role": message.get("role", "user"), "content": message.get("content", "")} for message in lease.prompt.messages],
        "completions": [{"id": uid, "text": texts[uid]} for uid in lease.displayed],
    }


def ranking_lines(*, project: Project, user: User, role: str, policies: bool = False, revisions: bool = False) -> Iterator[bytes]:
    """The project's rankings as JSON lines, one chunk of rows at a time, in memory that does not grow with the project.

    A rater gets his own and nothing that says where a text comes from. Managers and reviewers get everybody's, with names of people and
    prompts; names of policies only with `policies`, so that a file passed on to raters by mistake stays blind.
    """
    everything = role in SEES_EVERYTHING
    rankings = Ranking.objects.filter(project=project).select_related("rater", "prompt")
    if not revisions:
        rankings = rankings.current()
    if not everything:
        rankings = rankings.filter(rater=user)
    last = 0
    while chunk := list(rankings.filter(pk__gt=last).order_by("pk")[:STREAM_CHUNK]):
        last = chunk[-1].pk
        shown = Completion.objects.filter(prompt__in={ranking.prompt_id for ranking in chunk})
        completions = {str(row.uid): row for row in shown.only("uid", "text", "policy")}
        lines = (_line(ranking, completions, everything=everything, policies=policies and everything) for ranking in chunk)
        yield "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode(errors="replace")


def _line(ranking: Ranking, completions: dict[str, Completion], *, everything: bool, policies: bool) -> dict[str, Any]:
    line: dict[str, Any] = {
        "ranking": str(ranking.uid),
        "revision": ranking.revision,
        "client_id": str(ranking.client_id),
        "prompt": ranking.prompt.messages,
        "completions": [{"id": uid, "text": completions[uid].text if uid in completions else None} for uid in ranking.displayed],
        "bands": ranking.bands,
        "criteria": ranking.criteria,
        "flags": ranking.flags,
        "comment": ranking.comment,
        "duration_seconds": ranking.duration_seconds,
        "created_at": ranking.created_at.isoformat(),
    }
    if everything:
        line |= {
            "key": ranking.prompt.key,
            "round": ranking.prompt.round,
            "split": ranking.prompt.split,
            "rater": ranking.rater.username,
            "rater_kind": ranking.rater.kind,
        }
    if policies:
        line["policies"] = {uid: completions[uid].policy for uid in ranking.displayed if uid in completions}
    return line
