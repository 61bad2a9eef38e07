"""The API: strangers learn nothing, garbage is answered with 4xx, raters stay blind, and the verbs do what they say."""

import asyncio
import json
import uuid

import pytest
from django.test import AsyncClient, Client
from rest_framework.authtoken.models import Token
from rest_framework.test import APIClient

from annotation.models import Lease, Membership, Ranking
from annotation.services.leases import lease_next
from tests.annotation import desk

pytestmark = pytest.mark.django_db
SECRETS = (desk.POLICY, "secret-run", "secret-key", "sampling", "policy")


@pytest.fixture
def project():
    project = desk.project(criteria=["helpful"])
    desk.prompts(project)
    return project


def signed_in(user) -> APIClient:
    client = APIClient(raise_request_exception=True)
    client.credentials(HTTP_AUTHORIZATION=f"Token {Token.objects.get_or_create(user=user)[0].key}")
    return client


@pytest.fixture
def ana(project):
    return signed_in(desk.member(project, "ana"))


@pytest.fixture
def boss(project):
    return signed_in(desk.member(project, "boss", "manager"))


def take(client):
    return client.post("/api/v1/projects/desk/next/").json()


def body_of(task, **changes):
    bands = [[one["id"]] for one in task["completions"]]
    return {"lease": task["lease"], "client_id": str(uuid.uuid4()), "bands": bands, **changes}


def submit(client, task, **changes):
    return client.post("/api/v1/rankings/", body_of(task, **changes), format="json")


def addresses(lease=uuid.UUID(int=7)):
    return [
        ("get", "/api/v1/projects/"),
        ("post", "/api/v1/projects/desk/next/"),
        ("get", "/api/v1/projects/desk/rankings/"),
        ("get", "/api/v1/projects/desk/progress/"),
        ("post", "/api/v1/rankings/"),
        ("post", f"/api/v1/rankings/{lease}/amend/"),
        ("post", f"/api/v1/leases/{lease}/skip/"),
        ("post", f"/api/v1/leases/{lease}/extend/"),
    ]


@pytest.mark.parametrize(("method", "address"), addresses())
def test_without_a_token_nothing_is_answered(project, method, address):
    for client in (APIClient(), APIClient(HTTP_AUTHORIZATION="Token wrong")):
        answer = getattr(client, method)(address, {}, format="json")
        assert answer.status_code == 401 and set(answer.json()) == {"error"}


def test_a_stranger_learns_nothing(project, ana):
    task = take(ana)
    stored = submit(ana, task).json()
    held = take(ana)
    stranger = signed_in(desk.person("stranger"))
    here = [
        stranger.post("/api/v1/projects/desk/next/"),
        stranger.get("/api/v1/projects/desk/rankings/"),
        stranger.get("/api/v1/projects/desk/progress/"),
    ]
    nowhere = stranger.post("/api/v1/projects/no-such/next/")
    assert {answer.status_code for answer in here} == {404} and {answer.content for answer in here} == {nowhere.content}
    assert stranger.get("/api/v1/projects/").json() == []
    assert submit(stranger, held).status_code == 404
    said = {key: value for key, value in body_of(task).items() if key != "lease"}
    assert stranger.post(f"/api/v1/rankings/{stored['ranking']}/amend/", said, format="json").status_code == 404
    assert stranger.post(f"/api/v1/leases/{held['lease']}/skip/", {"reason": "other"}, format="json").status_code == 404
    assert stranger.post(f"/api/v1/leases/{held['lease']}/extend/").status_code == 404


def test_a_session_without_a_csrf_token_writes_nothing(project):
    user = desk.member(project, "ben")
    client = APIClient(enforce_csrf_checks=True)
    client.force_login(user)
    assert client.post("/api/v1/projects/desk/next/").status_code == 403
    assert not Lease.objects.filter(rater=user).exists()


GARBAGE = [
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"7",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"bands":' + b"[" * 100_000,
    b'{"lease": NaN}',
    b'{"lease": {}, "client_id": [], "bands": {}}',
    b'{"lease": true, "client_id": 1, "bands": "abc"}',
    b'{"lease": "' + b"x" * 10_000 + b'", "client_id": null, "bands": [[[[]]]]}',
    b'{"lease": "\\u0000", "client_id": "\\ud800", "bands": [["\\ud800"]]}',
    b'{"lease": 1e999, "client_id": -1, "bands": [[99999999999999999999999999]]}',
]


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: repr(body[:30]))
def test_garbage_is_refused_and_never_breaks(ana, body):
    for address in (f"/api/v1/leases/{uuid.uuid4()}/skip/", "/api/v1/rankings/", f"/api/v1/rankings/{uuid.uuid4()}/amend/"):
        answer = ana.post(address, body, content_type="application/json")
        assert 400 <= answer.status_code < 500 and set(answer.json()["error"]) >= {"code", "message"}


@pytest.mark.parametrize(
    "change",
    [
        {"bands": None},
        {"bands": [[]]},
        {"bands": [["x"]]},
        {"bands": [[str(uuid.UUID(int=1))]]},
        {"bands": [[str(uuid.UUID(int=1))] * 17]},
        {"bands": [["a"]] * 10_000},
        {"criteria": []},
        {"criteria": {"tasty": []}},
        {"criteria": {"helpful": [[1]]}},
        {"criteria": {"": {}}},
        {"flags": {"x": ["unsafe"]}},
        {"flags": {"x": "unsafe"}},
        {"flags": [["unsafe"]]},
        {"comment": 5},
        {"comment": "x" * 4001},
        {"comment": "a\x00b"},
        {"comment": "\ud800"},
        {"duration_seconds": "soon"},
        {"duration_seconds": -1},
        {"duration_seconds": 1e300},
        {"client_id": "7"},
        {"client_id": True},
        {"lease": 5},
        {"displayed": []},
        {"rater": "boss"},
        {"flagz": {}},
    ],
    ids=lambda change: json.dumps(change)[:50],
)
def test_a_wrong_field_is_refused_and_nothing_is_stored(ana, change):
    answer = ana.post("/api/v1/rankings/", json.dumps(body_of(take(ana), **change)), content_type="application/json")
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert not Ranking.objects.exists()


def test_a_body_of_10_megabytes_is_refused(ana):
    big = json.dumps(body_of(take(ana), comment="x" * 10_000_000))
    assert ana.post("/api/v1/rankings/", big, content_type="application/json").status_code == 413
    form = ana.post("/api/v1/rankings/", {"comment": "x"}, format="multipart")
    assert form.status_code == 415


def test_a_rater_reads_neither_others_rankings_nor_policies(project, ana, boss):
    submit(boss, take(boss), comment="from the boss")
    submit(ana, take(ana), comment="from ana")
    lines = b"".join(ana.get("/api/v1/projects/desk/rankings/").streaming_content).decode()
    assert "from ana" in lines and "from the boss" not in lines and len(lines.splitlines()) == 1
    assert not any(secret in lines for secret in SECRETS)
    assert ana.get("/api/v1/projects/desk/rankings/?policies=1").status_code == 403
    assert ana.get("/api/v1/projects/desk/rankings/?policies=yes").status_code == 400


def test_nothing_that_a_rater_is_sent_names_where_a_text_comes_from(project, ana):
    answers = [ana.post("/api/v1/projects/desk/next/"), ana.get("/api/v1/projects/"), ana.get("/api/v1/projects/desk/progress/")]
    answers.append(submit(ana, answers[0].json()))
    text = " ".join(answer.content.decode() for answer in answers)
    assert not any(secret in text for secret in SECRETS)
    assert set(answers[0].json()) == {
        *("lease", "expires_at", "lease_seconds", "project", "prompt", "completions", "criteria", "ties_allowed", "flags"),
    }
    assert all(set(one) == {"id", "text"} for one in answers[0].json()["completions"])


def test_next_gives_the_prompt_and_the_same_one_until_it_is_ranked(ana):
    task = take(ana)
    assert task["prompt"] == [{"role": "user", "content": "Question 0?"}] and len(task["completions"]) == 4
    assert take(ana) == task
    assert submit(ana, task).status_code == 201
    assert take(ana)["lease"] != task["lease"]


def test_next_answers_204_when_nothing_is_left(ana):
    for _ in range(3):
        assert submit(ana, take(ana)).status_code == 201
    answer = ana.post("/api/v1/projects/desk/next/")
    assert answer.status_code == 204 and not answer.content


def test_a_closed_project_answers_409(project, ana):
    project.is_open = False
    project.save()
    answer = ana.post("/api/v1/projects/desk/next/")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "project_closed")


def test_a_submit_sent_twice_is_201_and_then_200(ana):
    task = take(ana)
    body = body_of(task, criteria={"helpful": [[one["id"] for one in task["completions"]]]}, comment="ok", duration_seconds=3.5)
    first, second = (ana.post("/api/v1/rankings/", body, format="json") for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() | {"created": False} == second.json() and Ranking.objects.count() == 1
    other = ana.post("/api/v1/rankings/", {**body, "comment": "changed"}, format="json")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "client_id_reused")


def test_a_submit_with_ids_in_capitals_is_the_same_submit(ana):
    task = take(ana)
    body = body_of(task, bands=[[one["id"].upper()] for one in task["completions"]])
    assert ana.post("/api/v1/rankings/", body, format="json").status_code == 201


def test_an_expired_lease_answers_409_and_next_gives_the_same_prompt(project, ana):
    task = take(ana)
    desk.run_out(Lease.objects.get(token=task["lease"]))
    answer = submit(ana, task)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "lease_expired")
    again = take(ana)
    assert again["lease"] != task["lease"] and again["completions"] == task["completions"]


def test_skip_and_extend(ana):
    task = take(ana)
    assert ana.post(f"/api/v1/leases/{task['lease']}/extend/").json()["expires_at"] > task["expires_at"]
    assert ana.post(f"/api/v1/leases/{task['lease']}/skip/", {"reason": "boring"}, format="json").status_code == 400
    assert ana.post(f"/api/v1/leases/{task['lease']}/skip/", {"reason": "unclear", "comment": "?"}, format="json").status_code == 204
    assert take(ana)["prompt"] != task["prompt"]


def test_an_amendment_is_a_new_revision(ana):
    task = take(ana)
    stored = submit(ana, task).json()
    said = {key: value for key, value in body_of(task).items() if key != "lease"} | {"comment": "second thoughts"}
    answer = ana.post(f"/api/v1/rankings/{stored['ranking']}/amend/", said, format="json")
    assert answer.status_code == 201 and answer.json()["revision"] == 2


def test_a_manager_streams_all_rankings_as_json_lines(project, ana, boss):
    for client in (ana, boss):
        submit(client, take(client), comment="two\nlines")
    answer = boss.get("/api/v1/projects/desk/rankings/")
    lines = [json.loads(line) for line in b"".join(answer.streaming_content).splitlines()]
    assert answer["content-type"] == "application/x-ndjson" and [line["rater"] for line in lines] == ["ana", "boss"]
    assert all("policies" not in line for line in lines) and lines[0]["completions"][0]["text"].startswith("Answer")
    named = b"".join(boss.get("/api/v1/projects/desk/rankings/?policies=1").streaming_content).splitlines()
    assert set(json.loads(named[0])["policies"].values()) == {f"{desk.POLICY}-{letter}" for letter in "abcd"}


@pytest.mark.django_db(transaction=True)
def test_the_stream_comes_in_chunks_over_asgi(monkeypatch):
    from annotation import selectors

    monkeypatch.setattr(selectors, "STREAM_CHUNK", 2)
    project = desk.project()
    desk.prompts(project, number=5)
    user = desk.member(project, "boss", "manager")
    client = signed_in(user)
    while (answer := client.post("/api/v1/projects/desk/next/")).status_code == 200:
        submit(client, answer.json())
    key = Token.objects.get(user=user).key

    async def chunks():
        answer = await AsyncClient().get("/api/v1/projects/desk/rankings/", headers={"authorization": f"Token {key}"})
        return [chunk async for chunk in answer.streaming_content]

    assert [chunk.count(b"\n") for chunk in asyncio.run(chunks())] == [2, 2, 1]


def test_progress_is_the_same_for_every_member(project, ana, boss):
    submit(ana, take(ana))
    take(ana)
    progress = ana.get("/api/v1/projects/desk/progress/").json()
    assert progress == boss.get("/api/v1/projects/desk/progress/").json()
    assert (progress["slots"], progress["done"], progress["held"], progress["prompts"], progress["rankings_today"]) == (6, 1, 1, 3, 1)


def test_projects_say_what_is_left(ana):
    take(ana)
    row = ana.get("/api/v1/projects/").json()[0]
    assert (row["slug"], row["role"], row["left_for_me"]) == ("desk", "rater", 3)


def test_a_rater_taken_out_of_the_project_is_a_stranger(project, ana):
    task = take(ana)
    Membership.objects.filter(user__username="ana").delete()
    assert ana.post("/api/v1/projects/desk/next/").status_code == 404
    assert submit(ana, task).status_code == 403


def test_the_schema_names_every_address_and_its_docs_page_runs_only_our_scripts():
    schema = Client().get("/api/v1/schema/?format=json").json()
    assert len(schema["paths"]) == len(addresses())
    page = Client().get("/api/v1/docs/")
    assert page.status_code == 200 and "nonce-" in page["content-security-policy"] and "unsafe" not in page["content-security-policy"]


def test_an_api_fault_of_the_rater_leaves_his_lease(project, ana):
    task = take(ana)
    submit(ana, task, bands=[])
    assert lease_next(project=project, rater=Lease.objects.get(token=task["lease"]).rater).token == uuid.UUID(task["lease"])
