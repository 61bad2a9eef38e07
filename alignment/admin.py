"""The console's view of jobs, rounds and models: everything can be found and read, and nothing of the past can be edited."""

from collections.abc import Callable
from typing import Any

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.template.loader import render_to_string
from django.urls import URLPattern, path, reverse
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import action, display

from alignment.follow import alarms_of, noted, rollbacks_of
from alignment.models import Job, ModelParent, Round, TrainedModel
from alignment.progress import duration
from alignment.samples import read_samples
from alignment.selectors import events_of
from alignment.services.jobs import job_cancel, job_resume, job_retry
from annotation.errors import Refused

STATE_COLOURS = {
    "running": "info",
    "succeeded": "success",
    "failed": "danger",
    "cancelling": "warning",
    "stopped": "warning",
    "cancelled": "warning",
}
CHANGES: dict[str, tuple[Callable[..., Job], str]] = {
    "cancel": (job_cancel, "Running jobs stop at their next checkpoint; the others, and all that wait for them, leave the queue."),
    "resume": (job_resume, "They are queued again and go on from their newest checkpoints."),
    "retry": (
        job_retry,
        "They are queued again from their first step, in fresh folders. What they had done stays on disk and is not used.",
    ),
}


class ReadOnly(ModelAdmin):
    """Rows of the past: to be read, never edited by hand. Deleting one would break the lineage of what came after."""

    def has_add_permission(self, request: HttpRequest, *_: Any) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Job)
class JobAdmin(ReadOnly):
    readonly_fields = ("created_at",)
    list_display = ("name", "method", "state_shown", "progress", "left", "last_loss", "project", "attempt", "created_at")
    list_filter = ("state", "method", "project")
    search_fields = ("name", "error", "worker", "project__slug")
    list_select_related = ("project",)
    date_hierarchy = "created_at"
    actions = ("cancel_jobs", "resume_jobs", "retry_jobs")
    actions_detail = ("cancel_job", "resume_job", "retry_job")
    fieldsets = (
        (None, {"fields": ("name", "method", "state", "error", "remedy", "blocked_by", "project", "round", "snapshot", "needs")}),
        ("What it works with", {"fields": ("inputs", "options", "seed", "processes", "gpu_slots", "run_directory")}),
        ("How far it is", {"fields": ("step", "steps", "metrics", "tokens_per_second", "warnings", "exit_code")}),
        ("Who does it", {"fields": ("worker", "attempt", "max_attempts", "fence", "lease_expires_at", "heartbeat_at", "process_group")}),
        ("When", {"fields": ("created_by", "created_at", "started_at", "finished_at")}),
    )
    list_before_template = "alignment/admin_refresh.html"
    change_form_outer_before_template = "alignment/admin_job.html"

    def get_urls(self) -> list[URLPattern]:
        live = path("<int:object_id>/live/", self.admin_site.admin_view(self.live), name="alignment_job_live")
        change = path("change/<str:verb>/", self.admin_site.admin_view(self.change_jobs), name="alignment_job_changes")
        return [live, change, *super().get_urls()]

    def has_steer_permission(self, request: HttpRequest, object_id: Any = None) -> bool:
        return request.user.has_perm("alignment.change_job")

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        job = self.get_object(request, object_id)
        shown = _seen(job) | {"written": read_samples(job.folder, limit=8, rollbacks=rollbacks_of(events_of(job=job)))} if job else {}
        return super().change_view(request, object_id, form_url, {**(extra_context or {}), "job": job, **shown})

    def live(self, request: HttpRequest, object_id: int) -> HttpResponse:
        if not self.has_view_permission(request):
            return HttpResponse(status=403)
        job = get_object_or_404(Job, pk=object_id)
        return render(request, "alignment/_admin_progress.html", {"job": job, **_seen(job)})

    # -- columns

    @display(description="state", label=STATE_COLOURS, ordering="state")
    def state_shown(self, job: Job) -> tuple[str, str]:
        return job.state, job.get_state_display()

    @display(description="progress")
    def progress(self, job: Job) -> SafeString:
        return SafeString(render_to_string("alignment/_admin_bar.html", {"job": job}))

    @display(description="time left")
    def left(self, job: Job) -> str:
        return duration(job.eta_seconds) if job.state == Job.State.RUNNING else ""

    @display(description="last loss")
    def last_loss(self, job: Job) -> str:
        return "" if job.loss is None else f"{job.loss:.4g}"

    # -- changes, each with a page that asks first

    @admin.action(description="Cancel the chosen jobs", permissions=["steer"])
    def cancel_jobs(self, request: HttpRequest, chosen: QuerySet[Job]) -> HttpResponse:
        return self._ask(request, "cancel", chosen)

    @admin.action(description="Resume the chosen jobs", permissions=["steer"])
    def resume_jobs(self, request: HttpRequest, chosen: QuerySet[Job]) -> HttpResponse:
        return self._ask(request, "resume", chosen)

    @admin.action(description="Retry the chosen jobs", permissions=["steer"])
    def retry_jobs(self, request: HttpRequest, chosen: QuerySet[Job]) -> HttpResponse:
        return self._ask(request, "retry", chosen)

    @action(description="Cancel", url_path="cancel", permissions=["steer"])
    def cancel_job(self, request: HttpRequest, object_id: int) -> HttpResponse:
        return self._ask(request, "cancel", Job.objects.filter(pk=object_id))

    @action(description="Resume", url_path="resume", permissions=["steer"])
    def resume_job(self, request: HttpRequest, object_id: int) -> HttpResponse:
        return self._ask(request, "resume", Job.objects.filter(pk=object_id))

    @action(description="Retry", url_path="retry", permissions=["steer"])
    def retry_job(self, request: HttpRequest, object_id: int) -> HttpResponse:
        return self._ask(request, "retry", Job.objects.filter(pk=object_id))

    def _ask(self, request: HttpRequest, verb: str, chosen: QuerySet[Job]) -> HttpResponse:
        title = f"{verb.capitalize()} {chosen.count()} job{'s' if chosen.count() != 1 else ''}?"
        context = {**self.admin_site.each_context(request), "title": title, "verb": verb, "jobs": chosen, "what": CHANGES[verb][1]}
        return render(request, "alignment/admin_confirm.html", context)

    def change_jobs(self, request: HttpRequest, verb: str) -> HttpResponse:
        if request.method != "POST" or verb not in CHANGES or not self.has_steer_permission(request):
            return HttpResponse(status=403)
        for job in Job.objects.filter(pk__in=[int(key) for key in request.POST.getlist("job") if key.isdigit()]).order_by("id"):
            try:
                done = CHANGES[verb][0](job=job)
                messages.success(request, f"{done.name} is {done.state}.")
            except Refused as refused:
                messages.warning(request, refused.message)
        return redirect(reverse("admin:alignment_job_changelist"))


def _seen(job: Job) -> dict[str, Any]:
    events = events_of(job=job)
    alarms = alarms_of(events)
    return {"alarms": alarms[:5], "more_alarms": len(alarms[5:]), "noted": noted(events)}


class JobInline(TabularInline):
    model = Job
    fields = ("name", "method", "state", "step", "steps", "finished_at")
    readonly_fields = fields
    ordering = ("id",)
    extra = 0
    can_delete = False
    show_change_link = True
    tab = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(Round)
class RoundAdmin(ReadOnly):
    list_display = ("__str__", "project", "number", "state_shown", "methods_shown", "done", "home_at", "created_at")
    list_filter = ("state", "project")
    search_fields = ("project__slug", "project__name")
    list_select_related = ("project",)
    inlines = (JobInline,)

    @display(description="state", label=STATE_COLOURS, ordering="state")
    def state_shown(self, made: Round) -> tuple[str, str]:
        return made.state, made.get_state_display()

    @display(description="methods")
    def methods_shown(self, made: Round) -> str:
        return ", ".join(made.methods)

    @display(description="jobs done")
    def done(self, made: Round) -> str:
        jobs = list(made.jobs.values_list("state", flat=True))
        return f"{jobs.count(Job.State.SUCCEEDED)} of {len(jobs)}"


class ParentInline(TabularInline):
    model = ModelParent
    fk_name = "child"
    fields = readonly_fields = ("role", "parent")
    verbose_name_plural = "came from"
    extra = 0
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class ChildInline(ParentInline):
    fk_name = "parent"
    fields = readonly_fields = ("role", "child")
    verbose_name_plural = "came of it"


@admin.register(TrainedModel)
class TrainedModelAdmin(ReadOnly):
    list_display = ("name", "kind", "project", "short_digest", "job", "created_at")
    list_filter = ("kind", "project")
    search_fields = ("name", "digest", "job__name", "snapshot__digest")
    list_select_related = ("project", "job")
    inlines = (ParentInline, ChildInline)

    @display(description="SHA-256")
    def short_digest(self, model: TrainedModel) -> str:
        return model.digest[:12]
