"""The pages: home by role, a project, the ranking desk. Permission first, then one selector or service, then the answer."""

import json
from uuid import UUID

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.urls import reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_GET, require_POST

from annotation import selectors
from annotation.errors import Refused
from annotation.models import Lease, Skip, User
from annotation.render import render_messages, render_text
from annotation.services.leases import lease_next
from annotation.services.rankings import FLAGS

LETTERS = "ABCDEFGHIJKLMNOP"
# Stands in the addresses that the page gets; the script puts the lease of the moment there.
NO_LEASE = UUID(int=0)


class SignedIn(HttpRequest):
    """A request behind `login_required`."""

    user: User


@require_GET
@login_required
def home(request: SignedIn) -> HttpResponse:
    rows = selectors.projects_of(request.user)
    mine = [row for row in rows if row["member"]]
    watched = [row for row in rows if row["role"] in selectors.SEES_EVERYTHING]
    next_up = max((row for row in mine if row["left"]), key=lambda row: (row["mine"]["today"], row["left"]), default=None)
    context = {"mine": mine, "watched": watched, "next_up": next_up, "today": sum(row["mine"]["today"] for row in mine)}
    return render(request, "annotation/home.html", context)


@require_GET
@login_required
def project(request: SignedIn, slug: str) -> HttpResponse:
    found, role = selectors.project_for(user=request.user, slug=slug)
    everything = role in selectors.SEES_EVERYTHING
    context = {
        "project": found,
        "role": role,
        "everything": everything,
        "member": selectors.is_member(user=request.user, project=found),
        "progress": selectors.progress_of([found])[found.pk],
        "guidelines": render_text(found.guidelines) if found.guidelines else "",
        "raters": selectors.raters_of(found) if everything else [],
        "snapshots": selectors.snapshots_of(found)[:20] if everything else [],
    }
    return render(request, "annotation/project.html", context)


@require_GET
@login_required
def project_raters(request: SignedIn, slug: str) -> HttpResponse:
    """The table of raters alone: the project page asks for it again when the numbers change."""
    found, _ = selectors.project_for(user=request.user, slug=slug, everything=True)
    return render(request, "annotation/_raters.html", {"project": found, "raters": selectors.raters_of(found)})


@require_GET
@login_required
@ensure_csrf_cookie
@never_cache
def rank(request: SignedIn, slug: str) -> HttpResponse:
    """The desk without a prompt on it: taking one is a POST, which the page makes at once."""
    found, _ = selectors.project_for(user=request.user, slug=slug)
    context = {
        "project": found,
        "guidelines": render_text(found.guidelines) if found.guidelines else "",
        "reasons": Skip.Reason.choices,
        "urls": json.dumps(
            {
                "task": reverse("rank-task", args=[slug]),
                "submit": reverse("api-rankings"),
                "skip": reverse("api-skip", args=[NO_LEASE]),
                "extend": reverse("api-extend", args=[NO_LEASE]),
                "login": f"{reverse('account_login')}?next={request.path}",
            }
        ),
    }
    return render(request, "annotation/rank.html", context)


@require_POST
@login_required
@never_cache
def rank_task(request: SignedIn, slug: str) -> HttpResponse:
    """The next prompt and its cards, as a fragment of the desk."""
    found, _ = selectors.project_for(user=request.user, slug=slug)
    try:
        lease = lease_next(project=found, rater=request.user)
    except Refused as refused:
        return render(request, "annotation/_stopped.html", {"project": found, "refused": refused}, status=refused.status)
    context = {
        "project": found,
        "mine": selectors.done_by(projects=[found], rater=request.user).get(found.pk, {"all": 0, "today": 0}),
        "left": selectors.left_for(projects=[found], rater=request.user)[found.pk],
    }
    if lease is None:
        return render(request, "annotation/_nothing_left.html", context)
    return render(request, "annotation/_task.html", context | shown(lease))


def shown(lease: Lease) -> dict[str, object]:
    task = selectors.task_of(lease)
    cards = [{"letter": LETTERS[index], "id": one["id"], "html": render_text(one["text"])} for index, one in enumerate(task["completions"])]
    # The completions' own names make the draft's name: it fits after a reload, and when the same prompt is granted anew.
    draft = min(one["id"] for one in task["completions"])
    return {"lease": lease, "messages_shown": render_messages(task["prompt"]), "cards": cards, "draft": draft, "flags": FLAGS.items()}
