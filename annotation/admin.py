"""The admin console of the people's side. What is history can be read and not rewritten; what changes many rows asks first."""

from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.db.models import Count, Exists, OuterRef, Q, QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.admin import TabularInline

from annotation.console import ConsoleAdmin, LookOnlyAdmin, asking, count_of, selected_ids, shown_bands, shown_json, shown_messages
from annotation.console_people import MembershipInline
from annotation.content import ContentRefused, messages_checked, prompt_digest, split_of, text_checked
from annotation.errors import Refused
from annotation.models import Completion, Lease, Membership, Project, Prompt, Ranking, Skip, Snapshot, User
from annotation.services.projects import criteria_checked, project_open
from annotation.services.prompts import slots_free, slots_open
from annotation.services.snapshots import snapshot_create, snapshot_folder
from annotation.snapshot_files import snapshot_verify


class ProjectForm(forms.ModelForm):
    def clean_criteria(self) -> list[str]:
        try:
            return criteria_checked(self.cleaned_data["criteria"] or [])
        except Refused as error:
            raise forms.ValidationError(error.message) from error

    def clean_overlap(self) -> int:
        overlap = self.cleaned_data["overlap"]
        if self.instance.pk and overlap < self.initial["overlap"] and self.instance.prompts.exists():
            raise forms.ValidationError("Raters per prompt can only be raised once prompts are in: raters may hold the slots.")
        return overlap


@admin.register(Project)
class ProjectAdmin(ConsoleAdmin):
    form = ProjectForm
    list_display = ("name", "slug", "is_open", "overlap", "prompt_count", "slots_done", "created_at")
    list_filter = ("is_open", "ties_allowed", "created_at")
    search_fields = ("name", "slug", "guidelines")
    fieldsets = (
        (None, {"fields": ("name", "slug", "is_open", "guidelines")}),
        ("Ranking", {"fields": ("criteria", "ties_allowed", "overlap", "lease_seconds")}),
        ("Learning", {"fields": ("held_out_percent",)}),
    )
    inlines = (MembershipInline,)
    actions = ("open_projects", "close_projects", "make_snapshots")

    def get_readonly_fields(self, request: HttpRequest, obj: Project | None = None) -> tuple[str, ...]:
        # The slug is part of every imported ranking's uid, and the share held out decides the split of prompts that are in.
        return ("slug", "held_out_percent") if obj is not None and obj.prompts.exists() else ()

    def has_delete_permission(self, request: HttpRequest, obj: Project | None = None) -> bool:
        kept = obj is not None and (obj.rankings.exists() or obj.snapshots.exists())
        return super().has_delete_permission(request, obj) and not kept

    def save_model(self, request: HttpRequest, obj: Project, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if change and "overlap" in form.changed_data:
            added = slots_open(project=obj, overlap=obj.overlap)
            self.message_user(request, f"{count_of(added, 'slot', 'slots')} added to prompts that are in.", messages.SUCCESS)

    @admin.display(description="prompts")
    def prompt_count(self, project: Project) -> int:
        return project.prompts.count()

    @admin.display(description="slots done")
    def slots_done(self, project: Project) -> str:
        counts = project.leases.aggregate(done=Count("pk", filter=Q(state=Lease.State.DONE)), all=Count("pk"))
        return f"{counts['done']:,} of {counts['all']:,}"

    @asking(name="Open to raters", question="Open the selected projects ({count})? Their raters are handed prompts from now on.")
    def open_projects(self, request: HttpRequest, queryset: QuerySet[Project]) -> str:
        for project in queryset:
            project_open(project=project, is_open=True)
        return f"{count_of(queryset.count(), 'project is', 'projects are')} open."

    @asking(
        name="Close to raters",
        question="Close the selected projects ({count})? They hand out no prompts; what raters hold now may still be submitted.",
    )
    def close_projects(self, request: HttpRequest, queryset: QuerySet[Project]) -> str:
        for project in queryset:
            project_open(project=project, is_open=False)
        return f"{count_of(queryset.count(), 'project is', 'projects are')} closed."

    @asking(
        name="Make a snapshot",
        question="Write the current rankings of the selected projects ({count}) to snapshots? Large ones take a while.",
    )
    def make_snapshots(self, request: HttpRequest, queryset: QuerySet[Project]) -> str:
        made = [snapshot_create(project=project, created_by=cast(User, request.user)) for project in queryset]
        return "Snapshots: " + ", ".join(f"{one.project.slug} {one.digest[:12]} ({one.counts['rankings']:,} rankings)" for one in made)


@admin.register(Membership)
class MembershipAdmin(ConsoleAdmin):
    list_display = ("user", "project", "role", "created_at")
    list_filter = ("role", "project", "user__kind")
    search_fields = ("user__username", "project__slug", "project__name")
    autocomplete_fields = ("project", "user")
    list_select_related = ("project", "user")


class SettledFilter(admin.SimpleListFilter):
    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("unranked", "not ranked yet"), ("partly", "some slots done"), ("done", "all slots done"), ("closed", "not for raters")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Prompt]) -> QuerySet[Prompt]:
        slots = Lease.objects.filter(prompt=OuterRef("pk"))
        done, left = Exists(slots.filter(state=Lease.State.DONE)), Exists(slots.exclude(state=Lease.State.DONE))
        wanted = {"unranked": left & ~done, "partly": left & done, "done": done & ~left, "closed": ~Exists(slots)}
        return queryset.filter(wanted[self.value() or ""]) if self.value() in wanted else queryset


def touched(prompt: Prompt) -> bool:
    """Whether a rater has seen the prompt: then its words stay as they were."""
    return prompt.leases.exclude(state=Lease.State.FREE).exists() or prompt.rankings.exists() or prompt.skips.exists()


class CompletionInline(TabularInline):
    model = Completion
    extra = 0
    fields = readonly_fields = ("text", "policy", "run")
    show_change_link = True
    hide_title = True
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class LeaseInline(TabularInline):
    model = Lease
    extra = 0
    fields = readonly_fields = ("slot", "state", "rater", "granted_at", "expires_at")
    can_delete = False
    hide_title = True
    tab = True

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class PromptForm(forms.ModelForm):
    def clean_messages(self) -> list[dict[str, str]]:
        if touched(self.instance):
            raise forms.ValidationError("A rater has seen this prompt in the meantime; its words stay as they are.")
        try:
            return messages_checked(self.cleaned_data["messages"])
        except ContentRefused as error:
            raise forms.ValidationError(f"{error}.") from error


@admin.register(Prompt)
class PromptAdmin(ConsoleAdmin):
    """Prompts come in by `manage.py load` and by rounds. The words can be mended until the first rater has seen them."""

    form = PromptForm
    list_display = ("key", "project", "beginning", "split", "round", "overlap", "created_at")
    list_filter = (SettledFilter, "split", "round", "project", "created_at")
    search_fields = ("key", "messages", "digest")
    list_select_related = ("project",)
    inlines = (CompletionInline, LeaseInline)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Prompt | None = None) -> bool:
        return super().has_change_permission(request, obj) and not (obj is not None and touched(obj))

    def has_delete_permission(self, request: HttpRequest, obj: Prompt | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj is not None and touched(obj))

    def get_fields(self, request: HttpRequest, obj: Prompt | None = None) -> tuple[str, ...]:
        words = "conversation" if obj is not None and touched(obj) else "messages"
        return ("project", "key", words, "digest", "split", "round", "overlap", "created_at")

    def get_readonly_fields(self, request: HttpRequest, obj: Prompt | None = None) -> tuple[str, ...]:
        return ("conversation", "project", "key", "digest", "split", "round", "overlap", "created_at")

    def save_model(self, request: HttpRequest, obj: Prompt, form: Any, change: bool) -> None:
        obj.digest = prompt_digest(obj.messages)
        obj.split = split_of(obj.digest, obj.project.held_out_percent)
        super().save_model(request, obj, form, change)

    @admin.display(description="prompt")
    def beginning(self, prompt: Prompt) -> str:
        last = prompt.messages[-1]["content"] if prompt.messages else ""
        return last if len(last) <= 80 else last[:77] + "..."

    @admin.display(description="messages")
    def conversation(self, prompt: Prompt) -> SafeString:
        return shown_messages(prompt.messages)


class CompletionForm(forms.ModelForm):
    def clean_text(self) -> str:
        try:
            text = text_checked(self.cleaned_data["text"], "the text")
        except ContentRefused as error:
            raise forms.ValidationError(f"{error}.") from error
        if not text.strip():
            raise forms.ValidationError("The text is blank; raters cannot judge it.")
        twin = Completion.objects.filter(prompt=self.instance.prompt_id, text=text, policy=self.instance.policy).exclude(
            pk=self.instance.pk
        )
        if twin.exists():
            raise forms.ValidationError("This policy has the same text for this prompt already.")
        return text


@admin.register(Completion)
class CompletionAdmin(ConsoleAdmin):
    form = CompletionForm
    list_display = ("beginning", "policy", "run", "prompt", "created_at")
    list_filter = ("prompt__project", "prompt__round", "prompt__split", "created_at")
    search_fields = ("text", "policy", "run", "uid", "prompt__key")
    list_select_related = ("prompt",)
    fields = ("prompt", "uid", "text", "policy", "run", "sampling_shown", "created_at")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Completion | None = None) -> bool:
        return super().has_change_permission(request, obj) and not (obj is not None and touched(obj.prompt))

    def has_delete_permission(self, request: HttpRequest, obj: Completion | None = None) -> bool:
        # A completion goes with its prompt, and then only if no rater has seen it.
        return super().has_delete_permission(request, obj) and not (obj is not None and touched(obj.prompt))

    def get_actions(self, request: HttpRequest) -> dict[str, Any]:
        return {name: action for name, action in super().get_actions(request).items() if name != "delete_selected"}

    def get_readonly_fields(self, request: HttpRequest, obj: Completion | None = None) -> tuple[str, ...]:
        fixed = ("prompt", "uid", "policy", "run", "sampling_shown", "created_at")
        return (*fixed, "text") if obj is not None and touched(obj.prompt) else fixed

    @admin.display(description="text")
    def beginning(self, completion: Completion) -> str:
        text = completion.text or "(no text)"
        return text if len(text) <= 80 else text[:77] + "..."

    @admin.display(description="sampling")
    def sampling_shown(self, completion: Completion) -> SafeString:
        return shown_json(completion.sampling)


@admin.register(Lease)
class LeaseAdmin(LookOnlyAdmin):
    list_display = ("prompt", "project", "slot", "state", "rater", "granted_at", "expires_at")
    list_filter = ("state", "project", "expires_at")
    search_fields = ("prompt__key", "rater__username", "project__slug")
    list_select_related = ("prompt", "project", "rater")
    exclude = ("token",)
    actions = ("take_back",)

    def has_delete_permission(self, request: HttpRequest, obj: Lease | None = None) -> bool:
        # A free slot may go together with its prompt; one that a rater has or had is history.
        return obj is not None and obj.state == Lease.State.FREE and request.user.has_perm("annotation.delete_lease")

    @asking(
        name="Take held slots back",
        permission="view",
        question="Take the selected slots ({count}) back? Raters who hold them cannot submit.",
    )
    def take_back(self, request: HttpRequest, queryset: QuerySet[Lease]) -> str:
        if not request.user.has_perm("annotation.change_lease"):
            raise Refused("forbidden", "You may look at slots, but not take them back.", 403)
        freed = slots_free(lease_ids=selected_ids(queryset))
        return f"{count_of(freed, 'held slot is', 'held slots are')} free again; free and done ones are as they were."


@admin.register(Skip)
class SkipAdmin(LookOnlyAdmin):
    list_display = ("prompt", "rater", "reason", "created_at")
    list_filter = ("reason", "prompt__project", "created_at")
    search_fields = ("prompt__key", "rater__username", "comment")
    list_select_related = ("prompt", "rater")

    def has_delete_permission(self, request: HttpRequest, obj: Skip | None = None) -> bool:
        # Deleting a skip lets the rater be asked again.
        return request.user.has_perm("annotation.delete_skip")


class FlaggedFilter(admin.SimpleListFilter):
    title = "remarks"
    parameter_name = "remarks"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("flags", "with flags"), ("comment", "with a comment"), ("amended", "amended")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Ranking]) -> QuerySet[Ranking]:
        wanted = {"flags": ~Q(flags={}), "comment": ~Q(comment=""), "amended": Q(revision__gt=1)}
        return queryset.filter(wanted[self.value() or ""]) if self.value() in wanted else queryset


@admin.register(Ranking)
class RankingAdmin(LookOnlyAdmin):
    list_display = ("uid", "project", "prompt", "rater", "revision", "is_current", "bands_count", "duration_seconds", "created_at")
    list_filter = ("is_current", "project", "rater__kind", FlaggedFilter, "created_at")
    search_fields = ("uid", "prompt__key", "rater__username", "comment")
    list_select_related = ("project", "prompt", "rater")
    fieldsets = (
        (None, {"fields": ("uid", "project", "prompt", "rater", "revision", "is_current", "created_at", "duration_seconds")}),
        ("What was said", {"fields": ("order", "by_criterion", "flags_shown", "comment")}),
        ("On screen", {"fields": ("displayed_shown", "client_id", "lease")}),
    )
    readonly_fields = ("order", "by_criterion", "flags_shown", "displayed_shown")

    @admin.display(description="bands")
    def bands_count(self, ranking: Ranking) -> str:
        return f"{len(ranking.bands)} of {len(ranking.displayed)}"

    @admin.display(description="best first")
    def order(self, ranking: Ranking) -> SafeString:
        return shown_bands(ranking.bands, _texts(ranking))

    @admin.display(description="by criterion")
    def by_criterion(self, ranking: Ranking) -> SafeString | str:
        texts = _texts(ranking)
        parts = [format_html("<p><strong>{}</strong></p>{}", name, shown_bands(bands, texts)) for name, bands in ranking.criteria.items()]
        return format_html("{}" * len(parts), *parts) if parts else "-"

    @admin.display(description="flags")
    def flags_shown(self, ranking: Ranking) -> SafeString | str:
        texts = _texts(ranking)
        return shown_json({texts.get(uid, (uid, ""))[0][:80]: flags for uid, flags in ranking.flags.items()}) if ranking.flags else "-"

    @admin.display(description="order on screen")
    def displayed_shown(self, ranking: Ranking) -> SafeString:
        return shown_bands([[uid] for uid in ranking.displayed], _texts(ranking))


def _texts(ranking: Ranking) -> dict[str, tuple[str, str]]:
    rows = Completion.objects.filter(prompt=ranking.prompt_id).values_list("uid", "text", "policy")
    return {str(uid): (text, policy) for uid, text, policy in rows}


@admin.register(Snapshot)
class SnapshotAdmin(LookOnlyAdmin):
    list_display = ("short_digest", "project", "rankings", "pairs", "created_by", "created_at")
    list_filter = ("project", "created_at")
    search_fields = ("digest", "project__slug", "project__name")
    list_select_related = ("project", "created_by")
    fields = ("project", "digest", "folder", "filters_shown", "counts_shown", "created_by", "created_at")
    readonly_fields = ("folder", "filters_shown", "counts_shown")
    actions = ("verify",)

    @admin.display(description="digest")
    def short_digest(self, snapshot: Snapshot) -> str:
        return snapshot.digest[:16]

    @admin.display
    def rankings(self, snapshot: Snapshot) -> int:
        return snapshot.counts.get("rankings", 0)

    @admin.display
    def pairs(self, snapshot: Snapshot) -> int:
        return snapshot.counts.get("pairs", 0)

    @admin.display
    def folder(self, snapshot: Snapshot) -> str:
        return str(snapshot_folder(snapshot.digest))

    @admin.display(description="filters")
    def filters_shown(self, snapshot: Snapshot) -> SafeString:
        return shown_json(snapshot.filters)

    @admin.display(description="counts")
    def counts_shown(self, snapshot: Snapshot) -> SafeString:
        return shown_json(snapshot.counts)

    @admin.action(description="Verify the files", permissions=["view"])
    def verify(self, request: HttpRequest, queryset: QuerySet[Snapshot]) -> None:
        for one in queryset:
            broken = snapshot_verify(snapshot_folder(one.digest))
            text = f"{one.digest[:16]}: " + ("; ".join(broken[:5]) if broken else "whole")
            self.message_user(request, text, messages.ERROR if broken else messages.SUCCESS)
