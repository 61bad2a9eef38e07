"""Pages by role: what each sees, what none may see, and the policy under which scripts run."""

import re

import pytest
from django.db import connection
from django.template.loader import render_to_string
from django.test import Client
from django.test.utils import CaptureQueriesContext

from annotation.models import Completion, Project
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add
from tests.annotation import desk
from tests.annotation.hostile import HOSTILE, Reader

pytestmark = pytest.mark.django_db
SAFE = ("/", "#", "http://", "https://", "mailto:")
SECRETS = (desk.POLICY, "secret-run", "secret-key")


@pytest.fixture
def project():
    project = desk.project(guidelines="Be **fair**.")
    desk.prompts(project)
    return project


def at(user) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.mark.parametrize("address", ["/", "/projects/desk/", "/projects/desk/raters/", "/projects/desk/rank/"])
def test_without_signing_in_every_page_asks_to_sign_in(project, address):
    answer = Client().get(address)
    assert answer.status_code == 302 and answer.url.startswith("/accounts/login/?next=")


def test_a_stranger_finds_no_project(project):
    stranger = at(desk.person("stranger"))
    for address in ("/projects/desk/", "/projects/desk/raters/", "/projects/desk/rank/"):
        assert stranger.get(address).status_code == stranger.get(address.replace("desk", "nowhere")).status_code == 404
    assert stranger.post("/projects/desk/rank/task/").status_code == 404
    assert b"Desk" not in stranger.get("/").content


def test_a_rater_sees_neither_other_raters_nor_snapshots(project):
    lease_next(project=project, rater=desk.member(project, "ben"))
    ana = at(desk.member(project, "ana"))
    page = ana.get("/projects/desk/").content.decode()
    assert "Raters" not in page and "Snapshots" not in page and "ben" not in page and "Be <strong>fair</strong>" in page
    assert ana.get("/projects/desk/raters/").status_code == 403


def test_taking_a_prompt_is_a_post_with_a_csrf_token(project):
    user = desk.member(project, "ana")
    assert at(user).get("/projects/desk/rank/task/").status_code == 405
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(user)
    assert strict.post("/projects/desk/rank/task/").status_code == 403


def test_nothing_on_a_raters_pages_says_where_a_text_comes_from(project):
    ana = at(desk.member(project, "ana"))
    pages = [ana.get("/"), ana.get("/projects/desk/"), ana.get("/projects/desk/rank/"), ana.post("/projects/desk/rank/task/")]
    text = "".join(page.content.decode() for page in pages)
    assert "Answer a to question 0." in text
    assert not any(secret in text for secret in SECRETS)
    numbers = {str(pk) for pk in Completion.objects.values_list("pk", flat=True)}
    assert not numbers & set(re.findall(r'data-id="(\d+)"', text))


def test_the_desk_shows_the_cards_in_the_order_of_the_lease(project):
    user = desk.member(project, "ana")
    html = at(user).post("/projects/desk/rank/task/").content.decode()
    lease = lease_next(project=project, rater=user)
    assert re.findall(r'data-id="([^"]+)"', html) == lease.displayed
    assert re.findall(r'data-letter="(.)"', html) == list("ABCD")


def test_the_desk_says_when_nothing_is_left_and_when_the_project_is_closed(project):
    ana, empty = at(desk.member(project, "ana")), desk.project("empty")
    desk.member(empty, "ana")
    assert b"Nothing left" in ana.post("/projects/empty/rank/task/").content
    Project.objects.filter(slug="desk").update(is_open=False)
    closed = ana.post("/projects/desk/rank/task/")
    assert closed.status_code == 409 and b"This project is closed" in closed.content


def test_a_rater_who_is_no_member_any_more_is_told_so(project):
    root = at(desk.person("root", is_superuser=True, is_staff=True))
    assert root.get("/projects/desk/").status_code == 200
    assert root.post("/projects/desk/rank/task/").status_code == 403


def test_home_is_made_for_the_role(project):
    rater, manager = desk.member(project, "ana"), desk.member(project, "boss", "manager")
    root = desk.person("root", is_superuser=True, is_staff=True)
    at_home = {user.username: at(user).get("/").content.decode() for user in (rater, manager, root, desk.person("new"))}
    assert "3 prompts left for you" in at_home["ana"] and "Slots done" not in at_home["ana"] and "Console" not in at_home["ana"]
    assert "0 of 6" in at_home["boss"] and "Console" not in at_home["boss"]
    assert "Console" in at_home["root"] and "Slots done" in at_home["root"]
    assert "No project yet" in at_home["new"]


def test_a_manager_sees_the_raters_with_counts(project):
    desk.member(project, "ana")
    page = at(desk.member(project, "boss", "manager")).get("/projects/desk/").content.decode()
    assert "ana" in page and "not a verdict" in page and "snapshot create desk" in page


def test_home_takes_as_many_queries_for_many_projects_as_for_one(project):
    boss = desk.member(project, "boss", "manager")
    counts = []
    for number in (0, 5):
        for index in range(number):
            more = desk.project(f"more{index}")
            desk.prompts(more)
            desk.member(more, "boss", "manager")
        with CaptureQueriesContext(connection) as queries:
            at(boss).get("/")
        counts.append(len([one for one in queries if "session" not in one["sql"] and "SAVEPOINT" not in one["sql"]]))
    assert counts[0] == counts[1]


def test_hostile_names_and_texts_are_escaped_on_every_page():
    everything = "\n\n".join(HOSTILE)
    project = desk.project(guidelines=everything, criteria=['"><script>alert(2)</script>'])
    Project.objects.filter(pk=project.pk).update(name="<script>alert(3)</script>")
    texts = [everything, *HOSTILE[:3]]
    message = {"role": "user", "content": everything}
    prompts_add(project=project, items=[{"messages": [message], "completions": [{"text": text} for text in texts]}])
    client = at(desk.member(project, 'x"onload=1', "manager"))
    pages = [client.get(address) for address in ("/", "/projects/desk/", "/projects/desk/rank/")]
    pages.append(client.post("/projects/desk/rank/task/"))
    for page in pages:
        read = Reader(page.content.decode())
        assert not set(read.tags) & {"svg", "iframe", "object", "embed", "base", "math", "style", "xss", "animate"}
        assert not [value for _, name, value in read.attributes if name in {"href", "src", "action"} and not value.startswith(SAFE)]
        assert not [name for _, name, _ in read.attributes if name.startswith("on") or name == "srcdoc"]
        assert read.tags.count("script") == len([tag for tag, name, _ in read.attributes if (tag, name) == ("script", "src")])


def test_scripts_run_only_from_here_and_eval_only_in_the_console(project):
    root = at(desk.person("root", is_superuser=True, is_staff=True))
    for address in ("/", "/projects/desk/", "/accounts/password/change/"):
        policy = root.get(address)["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    # The header lists its directives, and their sources, in any order.
    console = {words[0]: set(words[1:]) for words in map(str.split, root.get("/admin/")["content-security-policy"].split(";"))}
    assert console["script-src"] == {"'self'", "'unsafe-eval'"} and console["default-src"] == {"'none'"}
    assert "unsafe" not in Client().get("/admin-not/")["content-security-policy"]


def test_pages_carry_no_inline_script_style_or_handler(project):
    boss = at(desk.member(project, "boss", "manager"))
    pages = [Client().get("/accounts/login/")]
    pages += [boss.get(address) for address in ("/", "/projects/desk/", "/projects/desk/rank/", "/accounts/logout/", "/nowhere/")]
    pages.append(boss.post("/projects/desk/rank/task/"))
    for page in pages:
        html = page.content.decode()
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", html)


def test_accounts_are_made_by_invitation_only():
    page = Client().get("/accounts/signup/").content.decode()
    assert "By invitation only" in page and "<form" not in page.replace("sign-out", "")


def test_a_wrong_password_says_so_and_keeps_the_name():
    page = Client().post("/accounts/login/", {"login": "ana", "password": "wrong"}).content.decode()
    assert "Not signed in." in page and 'value="ana"' in page


def test_sign_in_does_not_lead_to_other_sites():
    desk.person("ana").set_password("x")
    user = desk.person("dora")
    user.set_password("correct horse")
    user.save()
    for evil in ("https://evil.example/", "//evil.example/", "javascript:alert(1)"):
        answer = Client().post(f"/accounts/login/?next={evil}", {"login": "dora", "password": "correct horse", "next": evil})
        assert answer.status_code == 302 and answer.url == "/"


def test_error_pages_say_what_to_do():
    missing = Client().get("/nowhere/")
    assert missing.status_code == 404 and b"Check the address" in missing.content
    assert "draft is kept" in render_to_string("500.html")
    refused = Client(enforce_csrf_checks=True).post("/accounts/login/", {})
    assert refused.status_code == 403 and b"out of date" in refused.content


def test_the_two_style_sheets_are_small(settings):
    sizes = [(settings.BASE_DIR / "static" / name).stat().st_size for name in ("tokens.css", "components.css")]
    assert sum(sizes) <= 20_480
