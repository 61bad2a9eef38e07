"""What the database itself refuses, and identities that are the same everywhere."""

import uuid
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction

from annotation.content import ContentRefused, canonical, prompt_digest, split_of
from annotation.errors import Refused
from annotation.models import Completion, Lease, Membership, Project, Prompt, Ranking, Skip
from annotation.services.leases import lease_next
from annotation.services.projects import criteria_checked, membership_add, membership_remove, project_create, user_create
from annotation.services.prompts import prompts_add, slots_free, slots_open
from annotation.services.rankings import ranking_submit
from tests.annotation import desk
from tests.annotation.files import refused, run

pytestmark = pytest.mark.django_db


def insert(row: Any) -> None:
    """One INSERT past every service."""
    with transaction.atomic():
        row.save(force_insert=True)


def test_no_insert_puts_a_second_lease_into_a_slot_or_a_rater_twice_on_a_prompt() -> None:
    project = desk.project()
    anna = desk.member(project, "anna")
    prompt = desk.prompts(project, number=1)[0]
    Lease.objects.filter(prompt=prompt, slot=0).update(state="done", rater=anna)
    with pytest.raises(IntegrityError):
        insert(Lease(project=project, prompt=prompt, slot=1))
    with pytest.raises(IntegrityError):
        insert(Lease(project=project, prompt=prompt, slot=9, state="done", rater=anna))


@pytest.mark.parametrize(
    "fields", [{"state": "held"}, {"state": "done"}, {"state": "free", "with_rater": True}, {"state": "held", "with_rater": True}]
)
def test_no_insert_makes_a_lease_whose_state_and_rater_contradict(fields: dict[str, Any]) -> None:
    project = desk.project()
    prompt = desk.prompts(project, number=1)[0]
    rater = desk.member(project, "anna") if fields.pop("with_rater", False) else None
    with pytest.raises(IntegrityError):
        insert(Lease(project=project, prompt=prompt, slot=7, rater=rater, **fields))


def ranked_lease() -> tuple[Lease, Ranking]:
    project = desk.project(overlap=1)
    anna = desk.member(project, "anna")
    desk.prompts(project, number=1)
    lease = lease_next(project=project, rater=anna)
    ranking, _ = ranking_submit(rater=anna, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))
    return lease, ranking


def test_no_insert_puts_a_second_current_ranking_into_a_slot() -> None:
    lease, ranking = ranked_lease()
    other = desk.member(lease.project, "berta")
    for revision, rater in ((2, lease.rater), (3, other)):
        row = Ranking(lease=lease, project=lease.project, prompt=lease.prompt, rater=rater, client_id=uuid.uuid4(), revision=revision)
        row.bands, row.displayed = ranking.bands, ranking.displayed
        with pytest.raises(IntegrityError):
            insert(row)
    same_client = Ranking(
        lease=lease, project=lease.project, prompt=lease.prompt, rater=lease.rater, client_id=ranking.client_id, revision=2
    )
    same_client.bands, same_client.displayed, same_client.is_current = ranking.bands, ranking.displayed, False
    with pytest.raises(IntegrityError):
        insert(same_client)


def test_a_ranking_without_a_slot_cannot_be_inserted() -> None:
    _, ranking = ranked_lease()
    ranking.pk, ranking.uid, ranking.client_id, ranking.lease_id = None, uuid.uuid4(), uuid.uuid4(), 999_999
    with pytest.raises(IntegrityError), transaction.atomic():
        ranking.save(force_insert=True)
        connection.check_constraints()


def test_no_insert_repeats_a_key_a_membership_or_a_skip() -> None:
    project = desk.project()
    anna = desk.member(project, "anna")
    prompt = desk.prompts(project, number=1)[0]
    Skip.objects.create(prompt=prompt, rater=anna, reason="unclear")
    twin = Prompt(project=project, key=prompt.key, messages=[], digest="0" * 64, split="train", overlap=1)
    for row in (twin, Membership(project=project, user=anna), Skip(prompt=prompt, rater=anna, reason="other")):
        with pytest.raises(IntegrityError):
            insert(row)
    with pytest.raises(IntegrityError):
        insert(Project(slug="none", name="none", overlap=0))


TURNS = [{"role": "user", "content": "Was ist süß?"}]


def test_the_digest_of_a_prompt_is_written_down() -> None:
    """SHA-256 of [{"content":"Was ist süß?","role":"user"}] in UTF-8: a change would move prompts between the splits of old snapshots."""
    digest = "d59ff323"
    assert prompt_digest(TURNS).startswith(digest)
    assert prompt_digest([{"content": "Was ist süß?", "role": "user"}]) == prompt_digest(TURNS)


def test_the_split_follows_from_the_digest_alone() -> None:
    """The first 16 hex digits are a fraction: 0x1999... is a hair below 10 %, 0x199a... a hair above."""
    assert split_of("1999" + "9" * 60, 10) == "held_out"
    assert split_of("199a" + "0" * 60, 10) == "train"
    assert {split_of(f"{n:02x}" * 32, 0) for n in range(256)} == {"train"}
    digests = [prompt_digest([{"role": "user", "content": str(n)}]) for n in range(2000)]
    held = {percent: {one for one in digests if split_of(one, percent) == "held_out"} for percent in (10, 20)}
    assert held[10] < held[20]
    assert 150 < len(held[10]) < 250


def test_canonical_json_refuses_what_has_no_one_form() -> None:
    assert canonical({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'.encode()
    for value in (float("nan"), "\ud800", object()):
        with pytest.raises(ContentRefused):
            canonical(value)


def item(key: str, *texts: str, question: str = "Q?") -> dict[str, Any]:
    return {"key": key, "messages": [{"role": "user", "content": question}], "completions": [{"text": text} for text in texts]}


def test_prompts_add_is_whole_or_nothing_for_a_bad_batch() -> None:
    project = desk.project()
    for bad in (item("b", "x", "x\x00"), {"messages": []}, "text", item("a", "other", "y")):
        with pytest.raises(Refused):
            prompts_add(project=project, items=[item("a", "x", "y"), bad])
        assert Prompt.objects.count() == 0


def test_prompts_add_twice_adds_nothing() -> None:
    project = desk.project()
    items = [item("a", "x", "y"), {**item("b", "x", "y"), "key": None}]
    assert prompts_add(project=project, items=items, round=2) == {"prompts": 2, "completions": 4, "slots": 4, "present": 0, "repeated": 0}
    assert prompts_add(project=project, items=reversed(items), round=2)["present"] == 2
    assert set(Prompt.objects.values_list("round", flat=True)) == {2}


@pytest.mark.parametrize(
    ("texts", "slots"), [((), 0), (("a",), 0), (("a", "b"), 2), (tuple("abcdefghijklmnop"), 2), (tuple("abcdefghijklmnopq"), 0)]
)
def test_only_two_to_sixteen_texts_open_to_raters(texts: tuple[str, ...], slots: int) -> None:
    assert prompts_add(project=desk.project(), items=[item("a", *texts)])["slots"] == slots


def test_the_same_messages_in_two_rounds_share_digest_and_split() -> None:
    project = desk.project()
    prompts_add(project=project, items=[item("a", "x", "y")])
    prompts_add(project=project, items=[item("a~r1", "z", "w")], round=1)
    assert Prompt.objects.values("digest", "split").distinct().count() == 1


def test_slots_are_raised_and_never_lowered() -> None:
    project = desk.project(overlap=2)
    prompts_add(project=project, items=[item("a", "x", "y"), item("b", "x")])
    with pytest.raises(Refused, match="can be raised"):
        slots_open(project=project, overlap=1)
    assert slots_open(project=project, overlap=4) == 2
    assert sorted(Lease.objects.values_list("slot", flat=True)) == [0, 1, 2, 3]
    assert slots_open(project=project, overlap=4) == 0


def test_a_freed_slot_has_a_new_token() -> None:
    project = desk.project()
    anna = desk.member(project, "anna")
    desk.prompts(project, number=1)
    lease = lease_next(project=project, rater=anna)
    assert slots_free(lease_ids=list(Lease.objects.values_list("pk", flat=True))) == 1
    freed = Lease.objects.get(pk=lease.pk)
    assert (freed.state, freed.rater) == ("free", None)
    assert freed.token != lease.token


@pytest.mark.parametrize("criteria", ["text", ["a", "a"], [""], [1], ["x" * 81], [str(n) for n in range(13)], ["a\x00"]])
def test_criteria_that_are_no_names_are_refused(criteria: Any) -> None:
    with pytest.raises(Refused):
        criteria_checked(criteria)


@pytest.mark.parametrize(
    "fields", [{"slug": "a b"}, {"slug": ""}, {"slug": "taken"}, {"slug": "x", "overlap": 0}, {"slug": "x", "held_out_percent": 95}]
)
def test_a_project_with_bad_values_is_refused(fields: dict[str, Any]) -> None:
    project_create(slug="taken")
    with pytest.raises(Refused):
        project_create(**fields)
    assert Project.objects.count() == 1


def test_members_change_role_and_leave() -> None:
    project = project_create(slug="p")
    user, password = user_create(username="anna")
    assert user.check_password(password)
    membership_add(project=project, user=user)
    membership_add(project=project, user=user, role="manager")
    assert Membership.objects.get().role == "manager"
    with pytest.raises(Refused):
        membership_add(project=project, user=user, role="king")
    with pytest.raises(Refused, match="already exists"):
        user_create(username="anna")
    assert membership_remove(project=project, user=user)


def test_project_and_token_commands_say_what_they_refuse() -> None:
    assert "no user 'anna'" in refused("token", "anna")
    assert "no project 'p'" in refused("token", "anna", "--create-rater", "p")
    assert "no project 'p'" in refused("project", "add-member", "p", "anna")
    run("project", "create", "p", "--name", "P", "--overlap", 2, "--criteria", "helpful", "honest")
    assert "already exists" in refused("project", "create", "p")
    assert "Add --new" in refused("project", "add-member", "p", "anna")
    assert "can be raised" in refused("project", "overlap", "p", 1)
    user_create(username="w@p", kind="imported", is_active=False)
    assert "cannot sign in" in refused("token", "w@p")


def test_the_commands_make_a_project_a_member_and_a_token() -> None:
    run("project", "create", "p", "--criteria", "helpful", "honest")
    assert Project.objects.get().criteria == ["helpful", "honest"]
    said = run("project", "add-member", "p", "anna", "--role", "manager", "--new")[0]
    assert "password: " in said
    assert "anna is manager of p" in said
    token = run("token", "anna")[0]
    assert run("token", "anna")[0] == token
    assert run("token", "anna", "--renew")[0] != token
    assert run("token", "berta", "--create-rater", "p")[0]
    assert run("token", "anna", "--create-rater", "p")[0]
    assert dict(Membership.objects.values_list("user__username", "role")) == {"anna": "manager", "berta": "rater"}
    run("project", "close", "p")
    assert "closed" in run("project", "list")[0]


def test_completions_never_start_with_one_uid() -> None:
    prompts_add(project=desk.project("a"), items=[item("a", "x", "y")])
    prompts_add(project=desk.project("b"), items=[item("a", "x", "y")])
    assert len(set(Completion.objects.values_list("uid", flat=True))) == 4
