"""Leases: never two raters in one slot, never one rater twice on a prompt."""

import uuid
from datetime import timedelta

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from annotation.errors import Refused
from annotation.models import Lease, Membership, Skip
from annotation.services.leases import lease_extend, lease_next, lease_skip
from annotation.services.rankings import ranking_submit
from tests.annotation import desk

pytestmark = pytest.mark.django_db


def refused(code: str, status: int):
    return pytest.raises(Refused, check=lambda error: (error.code, error.status) == (code, status))


@pytest.fixture
def project():
    project = desk.project()
    desk.prompts(project)
    return project


@pytest.fixture
def ana(project):
    return desk.member(project, "ana")


@pytest.fixture
def ben(project):
    return desk.member(project, "ben")


def rank(rater, lease):
    return ranking_submit(rater=rater, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))


def test_a_stranger_is_handed_nothing(project):
    with refused("not_a_member", 403):
        lease_next(project=project, rater=desk.person("stranger"))
    assert not Lease.objects.exclude(state="free").exists()


def test_a_closed_project_hands_out_nothing(project, ana):
    project.is_open = False
    project.save()
    with refused("project_closed", 409):
        lease_next(project=project, rater=ana)


def test_a_closed_project_lets_the_rater_finish_what_he_holds(project, ana):
    lease = lease_next(project=project, rater=ana)
    project.is_open = False
    project.save()
    assert lease_next(project=project, rater=ana) == lease
    rank(ana, lease)
    with refused("project_closed", 409):
        lease_next(project=project, rater=ana)


def test_a_rater_cannot_use_the_lease_of_another(project, ana, ben):
    lease = lease_next(project=project, rater=ana)
    for act in (lambda: lease_extend(rater=ben, token=lease.token), lambda: lease_skip(rater=ben, token=lease.token, reason="other")):
        with refused("lease_unknown", 404):
            act()


def test_a_grant_that_never_was_cannot_be_extended_or_skipped(ana):
    for act in (lambda: lease_extend(rater=ana, token=uuid.uuid4()), lambda: lease_skip(rater=ana, token=uuid.uuid4(), reason="other")):
        with refused("lease_lost", 409):
            act()


def test_an_expired_lease_cannot_be_extended(project, ana):
    lease = lease_next(project=project, rater=ana)
    desk.run_out(lease)
    with refused("lease_expired", 409):
        lease_extend(rater=ana, token=lease.token)


def test_a_ranked_prompt_cannot_be_skipped(project, ana):
    lease = lease_next(project=project, rater=ana)
    rank(ana, lease)
    with refused("already_ranked", 409):
        lease_skip(rater=ana, token=lease.token, reason="other")


def test_a_skip_needs_a_known_reason_and_a_short_comment(project, ana):
    lease = lease_next(project=project, rater=ana)
    with refused("unknown_reason", 400):
        lease_skip(rater=ana, token=lease.token, reason="boring")
    with refused("too_long", 400):
        lease_skip(rater=ana, token=lease.token, reason="other", comment="x" * 4001)
    with refused("invalid", 400):
        lease_skip(rater=ana, token=lease.token, reason="other", comment="\x00")
    assert lease_next(project=project, rater=ana) == lease


def test_asking_again_gives_the_same_lease_in_the_same_order(project, ana):
    first, second = lease_next(project=project, rater=ana), lease_next(project=project, rater=ana)
    assert (first.pk, first.token, first.displayed) == (second.pk, second.token, second.displayed)


def test_the_order_on_screen_holds_each_completion_once_and_differs_between_raters(project):
    orders = set()
    for index in range(2):
        lease = lease_next(project=project, rater=desk.member(project, f"rater{index}"))
        assert set(lease.displayed) == desk.uids(lease.prompt) and len(lease.displayed) == 4
    for index in range(8):
        wide = desk.project(f"wide{index}", overlap=1)
        desk.prompts(wide, number=1, texts=8)
        lease = lease_next(project=wide, rater=desk.member(wide, "ana"))
        texts = {str(row.uid): row.text for row in lease.prompt.completions.all()}
        orders.add(tuple(texts[uid] for uid in lease.displayed))
    assert len(orders) > 1


def test_lowest_prompt_comes_first_and_overlap_is_filled(project, ana, ben):
    first, second = lease_next(project=project, rater=ana), lease_next(project=project, rater=ben)
    third = lease_next(project=project, rater=desk.member(project, "cleo"))
    assert first.prompt_id == second.prompt_id < third.prompt_id
    assert {first.slot, second.slot} == set(Lease.objects.filter(prompt=first.prompt).values_list("slot", flat=True))


def test_a_rater_gets_each_prompt_once_and_then_nothing(project, ana):
    seen = []
    while lease := lease_next(project=project, rater=ana):
        seen.append(lease.prompt_id)
        rank(ana, lease)
    assert len(seen) == len(set(seen)) == 3


def test_a_skipped_prompt_goes_to_somebody_else_and_never_comes_back(project, ana, ben):
    lease = lease_next(project=project, rater=ana)
    skip = lease_skip(rater=ana, token=lease.token, reason="expertise", comment=" not my field ")
    assert (skip.reason, skip.comment) == ("expertise", "not my field")
    assert lease_next(project=project, rater=ana).prompt_id != lease.prompt_id
    assert lease_next(project=project, rater=ben).pk == lease.pk


def test_a_skip_sent_twice_is_one_skip(project, ana):
    lease = lease_next(project=project, rater=ana)
    assert lease_skip(rater=ana, token=lease.token, reason="other") == lease_skip(rater=ana, token=lease.token, reason="other")
    assert Skip.objects.count() == 1


def test_an_expired_lease_that_nobody_took_comes_back_in_the_same_order_under_a_new_token(project, ana):
    lease = lease_next(project=project, rater=ana)
    desk.run_out(lease)
    again = lease_next(project=project, rater=ana)
    assert (again.pk, again.displayed) == (lease.pk, lease.displayed)
    assert again.token != lease.token and again.expires_at > timezone.now()


def test_an_expired_lease_goes_to_somebody_else_and_the_first_rater_gets_another_slot(project, ana, ben):
    Lease.objects.filter(slot__gt=Lease.objects.earliest("slot").slot).delete()
    lease = lease_next(project=project, rater=ana)
    desk.run_out(lease)
    taken = lease_next(project=project, rater=ben)
    assert taken.pk == lease.pk and taken.token != lease.token
    with refused("lease_lost", 409):
        lease_extend(rater=ana, token=lease.token)
    assert lease_next(project=project, rater=ana).prompt_id != lease.prompt_id


def test_extending_starts_the_time_anew(project, ana):
    lease = lease_next(project=project, rater=ana)
    Lease.objects.filter(pk=lease.pk).update(expires_at=timezone.now() + timedelta(seconds=5))
    left = (lease_extend(rater=ana, token=lease.token).expires_at - timezone.now()).total_seconds()
    assert left > project.lease_seconds - 5


def test_managers_who_are_members_may_rank_their_own_project(project):
    assert lease_next(project=project, rater=desk.member(project, "boss", "manager")) is not None


def test_a_rater_taken_out_of_the_project_gets_nothing_more(project, ana):
    lease_next(project=project, rater=ana)
    Membership.objects.filter(user=ana).delete()
    with refused("not_a_member", 403):
        lease_next(project=project, rater=ana)


def test_next_takes_a_constant_number_of_queries(project, ana):
    counts = []
    while True:
        with CaptureQueriesContext(connection) as queries:
            lease = lease_next(project=project, rater=ana)
        if lease is None:
            break
        counts.append(len([one for one in queries if "SAVEPOINT" not in one["sql"]]))
        rank(ana, lease)
    assert counts == [5, 5, 5]
