"""Rankings: nothing counts until each card is placed, and what is sent twice is stored once."""

import math
import uuid

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from annotation.errors import Refused
from annotation.models import Lease, Membership, Ranking
from annotation.services.leases import lease_next
from annotation.services.rankings import ranking_amend, ranking_submit
from tests.annotation import desk

pytestmark = pytest.mark.django_db


def refused(code: str, status: int = 400):
    return pytest.raises(Refused, check=lambda error: (error.code, error.status) == (code, status))


@pytest.fixture
def project():
    project = desk.project(criteria=["helpful", "honest"])
    desk.prompts(project)
    return project


@pytest.fixture
def ana(project):
    return desk.member(project, "ana")


@pytest.fixture
def lease(project, ana):
    return lease_next(project=project, rater=ana)


def submit(rater, lease, bands, client_id=None, **said):
    return ranking_submit(rater=rater, token=lease.token, client_id=client_id or uuid.uuid4(), bands=bands, **said)


A_LIST_OF_GARBAGE = [None, 7, "text", {}, [None], ["text"], [[None]], [[{}]], [[[]]], [[1, 2, 3, 4]], [[True]], {"bands": []}]


@pytest.mark.parametrize("bands", A_LIST_OF_GARBAGE, ids=repr)
def test_bands_of_a_wrong_shape_are_refused(ana, lease, bands):
    with pytest.raises(Refused, check=lambda error: error.status == 400):
        submit(ana, lease, bands)
    assert not Ranking.objects.exists()


def test_an_untouched_page_is_refused(ana, lease):
    with refused("not_placed"):
        submit(ana, lease, [])


def test_a_card_that_is_not_placed_is_refused(ana, lease):
    with refused("not_placed"):
        submit(ana, lease, desk.in_order(lease)[:-1])


def test_a_card_placed_twice_is_refused(ana, lease):
    with refused("placed_twice"):
        submit(ana, lease, [*desk.in_order(lease), [lease.displayed[0]]])
    with refused("placed_twice"):
        submit(ana, lease, [[lease.displayed[0]] * 2, *desk.in_order(lease)[1:]])


def test_an_empty_band_is_refused(ana, lease):
    with refused("empty_band"):
        submit(ana, lease, [*desk.in_order(lease), []])


def test_a_completion_of_another_prompt_is_refused(project, ana, lease):
    other = next(iter(desk.uids(project.prompts.exclude(pk=lease.prompt_id).first())))
    for uid in (other, str(uuid.uuid4()), "../../etc/passwd", "x" * 100_000):
        with refused("unknown_completion"):
            submit(ana, lease, [[uid], *desk.in_order(lease)[1:]])


def test_a_tie_is_refused_where_the_project_allows_none(project, ana, lease):
    project.ties_allowed = False
    project.save()
    with refused("ties_not_allowed"):
        submit(ana, lease, [lease.displayed])


@pytest.mark.parametrize("criteria", [[], "helpful", 3, {"tasty": []}, {"helpful": []}, {"helpful": [["x"]]}, {"helpful": None}], ids=repr)
def test_criteria_that_are_unknown_or_incomplete_are_refused(ana, lease, criteria):
    with pytest.raises(Refused, check=lambda error: error.status == 400):
        submit(ana, lease, desk.in_order(lease), criteria=criteria)


def test_flags_that_are_unknown_are_refused(ana, lease):
    uid = lease.displayed[0]
    for flags in ([], "unsafe", {uid: "unsafe"}, {uid: ["boring"]}, {uid: [["unsafe"]]}, {"nobody": ["unsafe"]}, {uid: None}):
        with pytest.raises(Refused, check=lambda error: error.status == 400):
            submit(ana, lease, desk.in_order(lease), flags=flags)


@pytest.mark.parametrize("comment", [None, 3, ["x"], "x" * 4001, "nul \x00", "half \ud800"], ids=lambda value: repr(value)[:20])
def test_comments_that_are_no_text_are_refused(ana, lease, comment):
    with pytest.raises(Refused, check=lambda error: error.status == 400):
        submit(ana, lease, desk.in_order(lease), comment=comment)


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf, "7", True, 1e12, [1]], ids=repr)
def test_durations_that_cannot_be_are_refused(ana, lease, seconds):
    with refused("invalid"):
        submit(ana, lease, desk.in_order(lease), duration_seconds=seconds)


def test_an_expired_lease_is_refused_and_the_same_slot_can_be_taken_again(project, ana, lease):
    desk.run_out(lease)
    with refused("lease_expired", 409):
        submit(ana, lease, desk.in_order(lease))
    again = lease_next(project=project, rater=ana)
    assert again.pk == lease.pk and submit(ana, again, desk.in_order(again))[1]


def test_a_lease_that_went_to_somebody_else_is_refused(project, ana, lease):
    Lease.objects.exclude(pk=lease.pk).delete()
    desk.run_out(lease)
    ben = desk.member(project, "ben")
    taken = lease_next(project=project, rater=ben)
    assert taken.pk == lease.pk
    with refused("lease_lost", 409):
        submit(ana, lease, desk.in_order(lease))
    with refused("lease_unknown", 404):
        submit(ana, taken, desk.in_order(lease))
    assert submit(ben, taken, desk.in_order(taken))[1]


def test_a_prompt_is_ranked_once_by_one_rater(ana, lease):
    submit(ana, lease, desk.in_order(lease))
    with refused("already_ranked", 409):
        submit(ana, lease, desk.in_order(lease))


def test_a_rater_taken_out_of_the_project_stores_nothing(ana, lease):
    Membership.objects.filter(user=ana).delete()
    with refused("not_a_member", 403):
        submit(ana, lease, desk.in_order(lease))


def test_the_same_client_id_with_other_content_is_refused(project, ana, lease):
    client_id = uuid.uuid4()
    submit(ana, lease, desk.in_order(lease), client_id)
    with refused("client_id_reused", 409):
        submit(ana, lease, desk.in_order(lease)[::-1], client_id)
    with refused("client_id_reused", 409):
        submit(ana, lease, [], client_id)
    other = lease_next(project=project, rater=ana)
    with refused("client_id_reused", 409):
        submit(ana, other, desk.in_order(other), client_id)
    assert Ranking.objects.count() == 1


def test_what_was_said_is_stored_as_it_was_said(ana, lease):
    a, b, c, d = lease.displayed
    said = {
        "criteria": {"helpful": [[a, b, c, d]]},
        "flags": {b: ["wrong", "unsafe"], c: []},
        "comment": " b lies \r\n",
        "duration_seconds": 12,
    }
    ranking, created = submit(ana, lease, [[c], [d, a], [b]], **said)
    ranking.refresh_from_db()
    assert created and ranking.bands == [[c], [a, d], [b]]
    assert ranking.displayed == lease.displayed and ranking.criteria == {"helpful": [[a, b, c, d]]}
    assert ranking.flags == {b: ["unsafe", "wrong"]} and ranking.comment == "b lies" and ranking.duration_seconds == 12.0
    lease.refresh_from_db()
    assert lease.state == "done" and lease.rater == ana


def test_sending_twice_stores_once_even_when_the_lease_is_long_over(project, ana, lease):
    client_id = uuid.uuid4()
    first, created = submit(ana, lease, desk.in_order(lease), client_id, duration_seconds=5)
    second, again = submit(ana, lease, desk.in_order(lease), client_id, duration_seconds=9)
    assert (created, again) == (True, False) and first == second and second.duration_seconds == 5
    Lease.objects.filter(pk=lease.pk).update(token=uuid.uuid4())
    assert submit(ana, lease, desk.in_order(lease), client_id) == (first, False)


def test_two_raters_may_use_the_same_client_id(project, ana, lease):
    client_id, ben = uuid.uuid4(), desk.member(project, "ben")
    submit(ana, lease, desk.in_order(lease), client_id)
    his = lease_next(project=project, rater=ben)
    assert submit(ben, his, desk.in_order(his), client_id)[1]


def test_everything_tied_is_an_answer_where_ties_are_allowed(ana, lease):
    assert submit(ana, lease, [lease.displayed])[0].bands == [lease.displayed]


def test_a_stranger_cannot_amend_a_ranking(project, ana, lease):
    ranking, _ = submit(ana, lease, desk.in_order(lease))
    for rater in (desk.person("stranger"), desk.member(project, "ben"), desk.member(project, "boss", "manager")):
        with refused("ranking_unknown", 404):
            ranking_amend(rater=rater, ranking_uid=ranking.uid, client_id=uuid.uuid4(), bands=desk.in_order(lease))


def test_an_amendment_is_checked_like_a_ranking(ana, lease):
    ranking, _ = submit(ana, lease, desk.in_order(lease))
    with refused("not_placed"):
        ranking_amend(rater=ana, ranking_uid=ranking.uid, client_id=uuid.uuid4(), bands=[])
    assert Ranking.objects.current().get() == ranking


def test_an_amendment_is_a_new_revision_and_the_old_one_stays(ana, lease):
    ranking, _ = submit(ana, lease, desk.in_order(lease))
    client_id, turned = uuid.uuid4(), desk.in_order(lease)[::-1]
    amended, created = ranking_amend(rater=ana, ranking_uid=ranking.uid, client_id=client_id, bands=turned)
    assert created and (amended.revision, amended.bands) == (2, turned)
    assert ranking_amend(rater=ana, ranking_uid=ranking.uid, client_id=client_id, bands=turned) == (amended, False)
    assert list(Ranking.objects.order_by("revision").values_list("revision", "is_current")) == [(1, False), (2, True)]


def test_submit_takes_a_constant_number_of_queries(project, ana):
    counts = []
    while lease := lease_next(project=project, rater=ana):
        with CaptureQueriesContext(connection) as queries:
            submit(ana, lease, desk.in_order(lease))
        counts.append(len([one for one in queries if "SAVEPOINT" not in one["sql"]]))
    assert counts == [5, 5, 5]
