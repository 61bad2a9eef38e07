"""The engineers' pages: runs, one run, one model. Whoever may not see a thing is told that it does not exist."""

from typing import Any

from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST

from alignment import selectors
from alignment.models import Job, TrainedModel
from alignment.services.jobs import job_cancel, job_resume, job_retry
from annotation.errors import Refused
from annotation.models import Membership

CHANGES = {"cancel": job_cancel, "resume": job_resume, "retry": job_retry}
DONE = {
    "cancel": "It stops at its next checkpoint.",
    "resume": "It is queued, and goes on from its checkpoint.",
    "retry": "It is queued, from its first step.",
}


def _engineer_or_404(request: HttpRequest) -> None:
    """Staff, and managers of a project."""
    if not (request.user.is_staff or Membership.objects.filter(user_id=request.user.pk or 0, role=Membership.Role.MANAGER).exists()):
        raise Http404


def _job_or_404(request: HttpRequest, name: str) -> Job:
    jobs = Job.objects.visible_to(request.user).select_related("project", "round", "snapshot", "blocked_by", "created_by")
    return get_object_or_404(jobs, name=name)


def _samples_wanted(request: HttpRequest) -> dict[str, Any]:
    """`?step=N` chooses an evaluation, `all=1` all of its samples."""
    step = request.GET.get("step", "")
    known = step.isascii() and step.isdigit() and len(step) <= 9  # Python refuses to read a number of thousands of digits
    return {"step": int(step) if known else None, "all_samples": request.GET.get("all") == "1"}


@require_GET
@login_required
@never_cache
def runs(request: HttpRequest) -> HttpResponse:
    _engineer_or_404(request)
    jobs = Job.objects.visible_to(request.user).select_related("project", "round").order_by("-id")[:100]
    models = TrainedModel.objects.visible_to(request.user).select_related("project").order_by("-id")[:50]
    context = {"jobs": jobs, "models": models, "active": any(job.is_active for job in jobs)}
    return render(request, "alignment/_runs.html" if request.headers.get("HX-Request") else "alignment/runs.html", context)


@require_GET
@login_required
@never_cache
def run(request: HttpRequest, name: str) -> HttpResponse:
    return render(request, "alignment/run.html", selectors.run_page(job=_job_or_404(request, name), **_samples_wanted(request)))


@require_GET
@login_required
@never_cache
def run_live(request: HttpRequest, name: str) -> HttpResponse:
    """What moves on the page of a run; it asks for itself again as long as the run is active."""
    return render(request, "alignment/_run_live.html", selectors.run_page(job=_job_or_404(request, name), **_samples_wanted(request)))


@require_POST
@login_required
def run_change(request: HttpRequest, name: str, verb: str) -> HttpResponse:
    job = _job_or_404(request, name)
    if verb not in CHANGES:
        raise Http404
    try:
        CHANGES[verb](job=job)
        messages.success(request, DONE[verb])
    except Refused as refused:
        messages.error(request, refused.message)
    return redirect("run", name=name)


@require_GET
@login_required
def model(request: HttpRequest, name: str) -> HttpResponse:
    found = get_object_or_404(TrainedModel.objects.visible_to(request.user).select_related("project", "snapshot", "job"), name=name)
    return render(request, "alignment/model.html", selectors.model_page(model=found))
