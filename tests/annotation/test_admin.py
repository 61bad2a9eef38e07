"""The admin console: every page answers, history cannot be rewritten, and actions ask first."""

from typing import Any

import pytest
from django.contrib import admin
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse
from rest_framework.authtoken.models import TokenProxy

from annotation.models import Completion, Lease, Membership, Project, Prompt, Ranking, Skip, Snapshot, User
from annotation.services.leases import lease_next, lease_skip
from annotation.services.rankings import ranking_submit
from annotation.services.snapshots import snapshot_create
from tests.annotation import desk

pytestmark = pytest.mark.django_db
MODELS = (User, Project, Membership, Prompt, Completion, Lease, Skip, Ranking, Snapshot, TokenProxy)
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def console(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("chief"))
    return client


@pytest.fixture
def story() -> dict[str, Any]:
    """A project with a ranked, a held, a skipped and an untouched prompt."""
    project = desk.project(overlap=1, criteria=["honest"])
    anna = desk.member(project, "anna")
    prompts = desk.prompts(project, number=4)
    Completion.objects.filter(prompt=prompts[0]).update(text=EVIL)
    lease = lease_next(project=project, rater=anna)
    flags = {lease.displayed[0]: []}
    ranking, _ = ranking_submit(rater=anna, token=lease.token, client_id=lease.token, bands=desk.in_order(lease), flags=flags, comment=EVIL)
    snapshot = snapshot_create(project=project)
    second = lease_next(project=project, rater=anna)
    lease_skip(rater=anna, token=second.token, reason="unclear")
    held = lease_next(project=project, rater=anna)
    TokenProxy.objects.create(user=anna)
    return {"project": project, "anna": anna, "prompts": prompts, "ranking": ranking, "held": held, "snapshot": snapshot}


def page(model: Any, what: str, *args: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{what}", args=args)


def act(console: Client, model: Any, action: str, rows: list[Any], confirmed: bool = False) -> Any:
    data = {"action": action, ACTION_CHECKBOX_NAME: [row.pk for row in rows]}
    return console.post(page(model, "changelist"), data | ({"confirmed": "yes"} if confirmed else {}), follow=True)


def test_a_rater_cannot_open_the_console(client: Client, story: dict[str, Any]) -> None:
    client.force_login(story["anna"])
    for model in MODELS:
        assert client.get(page(model, "changelist")).status_code == 302


@pytest.mark.parametrize("model", [Ranking, Snapshot, Lease, Skip])
def test_history_can_be_neither_added_nor_changed(console: Client, story: dict[str, Any], model: Any) -> None:
    row = model.objects.exclude(**({"state": "free"} if model is Lease else {})).first()
    assert console.get(page(model, "add")).status_code == 403
    assert console.post(page(model, "change", row.pk), {"comment": "other"}).status_code == 403
    if model is not Skip:
        assert console.post(page(model, "delete", row.pk), {"post": "yes"}).status_code == 403


def test_words_that_a_rater_has_seen_cannot_be_changed(console: Client, story: dict[str, Any]) -> None:
    prompt, held = story["prompts"][0], story["held"].prompt
    for seen in (prompt, held):
        console.post(page(Prompt, "change", seen.pk), {"messages": '[{"role": "user", "content": "Other?"}]'})
        assert Prompt.objects.get(pk=seen.pk).messages == seen.messages
        completion = seen.completions.first()
        console.post(page(Completion, "change", completion.pk), {"text": "Other."})
        assert Completion.objects.get(pk=completion.pk).text == completion.text
        assert console.post(page(Prompt, "delete", seen.pk), {"post": "yes"}).status_code == 403
        assert console.post(page(Completion, "delete", completion.pk), {"post": "yes"}).status_code == 403


def test_a_project_with_rankings_cannot_be_deleted_nor_its_split_moved(console: Client, story: dict[str, Any]) -> None:
    project = story["project"]
    assert console.post(page(Project, "delete", project.pk), {"post": "yes"}).status_code == 403
    act(console, Project, "delete_selected", [project])
    console.post(page(Project, "change", project.pk), _form(project) | {"held_out_percent": "50", "slug": "other"})
    stored = Project.objects.get(pk=project.pk)
    assert (stored.held_out_percent, stored.slug) == (10, "desk")


def test_the_author_of_a_ranking_keeps_name_and_kind(console: Client, story: dict[str, Any]) -> None:
    anna = story["anna"]
    console.post(page(User, "change", anna.pk), {"username": "berta", "kind": "simulated", "is_active": "on"})
    anna.refresh_from_db()
    assert (anna.username, anna.kind) == ("anna", "human")


def _form(project: Project) -> dict[str, str]:
    return {
        "name": project.name,
        "is_open": "on",
        "criteria": '["honest"]',
        "ties_allowed": "on",
        "overlap": str(project.overlap),
        "lease_seconds": "1800",
        "memberships-TOTAL_FORMS": "0",
        "memberships-INITIAL_FORMS": "0",
    }


def test_raters_per_prompt_cannot_be_lowered_and_raising_adds_slots(console: Client, story: dict[str, Any]) -> None:
    project = story["project"]
    answer = console.post(page(Project, "change", project.pk), _form(project) | {"overlap": "0"})
    assert answer.status_code == 200
    assert console.post(page(Project, "change", project.pk), _form(project) | {"overlap": "3"}).status_code == 302
    assert Lease.objects.filter(project=project).count() == 4 * 3
    answer = console.post(page(Project, "change", project.pk), _form(project) | {"overlap": "2"})
    assert b"can only be raised" in answer.content


@pytest.mark.parametrize("model", MODELS)
def test_every_list_and_row_opens_and_searches(console: Client, story: dict[str, Any], model: Any) -> None:
    listing = page(model, "changelist")
    assert console.get(listing).status_code == 200
    assert console.get(listing, {"q": "secret"}).status_code == 200
    for row in model.objects.all()[:3]:
        answer = console.get(page(model, "change", row.pk))
        assert answer.status_code == 200
        assert EVIL.encode() not in answer.content
    console_admin = admin.site.get_model_admin(model)
    if console_admin.has_add_permission(answer.wsgi_request):
        assert console.get(page(model, "add")).status_code == 200


def test_every_filter_narrows_the_list(console: Client, story: dict[str, Any]) -> None:
    for state, number in (("unranked", 3), ("done", 1), ("partly", 0), ("closed", 0)):
        found = console.get(page(Prompt, "changelist"), {"state": state}).context["cl"].result_count
        assert found == number, state
    for remark, number in (("comment", 1), ("flags", 0), ("amended", 0)):
        assert console.get(page(Ranking, "changelist"), {"remarks": remark}).context["cl"].result_count == number
    assert console.get(page(Lease, "changelist"), {"state__exact": "held"}).context["cl"].result_count == 1


def test_closing_a_project_asks_first(console: Client, story: dict[str, Any]) -> None:
    project = story["project"]
    answer = act(console, Project, "close_projects", [project])
    assert b"Close the selected projects (1)?" in answer.content
    assert Project.objects.get(pk=project.pk).is_open
    act(console, Project, "close_projects", [project], confirmed=True)
    assert not Project.objects.get(pk=project.pk).is_open
    act(console, Project, "open_projects", [project], confirmed=True)
    assert Project.objects.get(pk=project.pk).is_open


def test_a_held_slot_can_be_taken_back_and_a_done_one_stays(console: Client, story: dict[str, Any]) -> None:
    leases = list(Lease.objects.all())
    act(console, Lease, "take_back", leases, confirmed=True)
    states = sorted(Lease.objects.values_list("state", flat=True))
    assert states == ["done", "free", "free", "free"]
    assert Lease.objects.get(pk=story["held"].pk).token != story["held"].token


def test_a_snapshot_is_made_and_verified_from_the_console(console: Client, story: dict[str, Any]) -> None:
    answer = act(console, Project, "make_snapshots", [story["project"]], confirmed=True)
    assert b"(1 rankings)" in answer.content
    answer = act(console, Snapshot, "verify", [story["snapshot"]])
    assert b": whole" in answer.content


def test_a_prompt_that_nobody_saw_can_be_mended_and_its_digest_follows(console: Client, story: dict[str, Any]) -> None:
    prompt = story["prompts"][3]
    empty = {f"{name}-{part}_FORMS": "0" for name in ("completions", "leases") for part in ("TOTAL", "INITIAL")}
    bad = console.post(page(Prompt, "change", prompt.pk), {"messages": '[{"role": "robot", "content": "x"}]', **empty})
    assert b"role must be one of" in bad.content
    assert (
        console.post(page(Prompt, "change", prompt.pk), {"messages": '[{"role": "user", "content": "Mended?"}]', **empty}).status_code
        == 302
    )
    stored = Prompt.objects.get(pk=prompt.pk)
    assert stored.messages[0]["content"] == "Mended?"
    assert stored.digest != prompt.digest
    assert console.post(page(Prompt, "delete", prompt.pk), {"post": "yes"}).status_code == 302
    assert not Prompt.objects.filter(pk=prompt.pk).exists()


def test_nobody_switches_himself_off(console: Client, story: dict[str, Any]) -> None:
    act(console, User, "sign_in_off", list(User.objects.all()), confirmed=True)
    assert dict(User.objects.values_list("username", "is_active")) == {"chief": True, "anna": False}


def test_a_token_is_shown_once_and_never_in_the_list(console: Client, story: dict[str, Any]) -> None:
    answer = console.post(page(TokenProxy, "add"), {"user": User.objects.get(username="chief").pk}, follow=True)
    key = TokenProxy.objects.get(user__username="chief").key
    assert key.encode() in answer.content
    assert key.encode() not in console.get(page(TokenProxy, "changelist")).content
    chief = User.objects.get(username="chief")
    assert console.post(page(TokenProxy, "delete", chief.pk), {"post": "yes"}).status_code == 302
    assert not TokenProxy.objects.filter(user=chief).exists()
    assert LogEntry.objects.filter(object_repr="token of chief").count() == 2
    assert not LogEntry.objects.filter(object_repr__contains=key).exists()
