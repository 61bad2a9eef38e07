"""Simulated raters: marked as such, unable to sign in, of different reliability, and bound by leases like anybody."""

import random
import uuid

import pytest

from annotation.errors import Refused
from annotation.models import Lease, Project, Ranking, User
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add
from annotation.services.rankings import ranking_submit
from demo.facts import corpus, prompts
from demo.measure import judge
from demo.raters import CHARACTERS, Character, bands_of, perceived, rank_open_prompts, raters_make

UTILITY = lambda prompt, text: judge(prompt, text).utility  # noqa: E731


def make_project(count: int = 8, overlap: int = 2) -> Project:
    project = Project.objects.create(slug="slips", name="Slips", overlap=overlap)
    items = []
    for number, prompt in enumerate(prompts(count, seed=1)):
        texts = [f"A kite was found. {number}-{place}" for place in range(2)]
        texts += [row["completion"] + " " for row in corpus(2, seed=number)]
        messages = [{"role": "user", "content": prompt}]
        items.append({"key": str(number), "messages": messages, "completions": [{"text": text, "policy": "p"} for text in texts]})
    prompts_add(project=project, items=items)
    return project


@pytest.mark.django_db
def test_a_person_s_account_is_never_taken_for_a_simulated_rater() -> None:
    User.objects.create_user(username=CHARACTERS[0].name, password="a person's own")
    with pytest.raises(Refused, match="belongs to a person"):
        raters_make(project=make_project())


@pytest.mark.django_db
def test_simulated_raters_are_marked_and_cannot_sign_in() -> None:
    for user, _ in raters_make(project=make_project()):
        assert user.kind == "simulated"
        assert not user.has_usable_password()
        assert not (user.is_staff or user.is_superuser)


@pytest.mark.django_db
def test_raters_fill_every_slot_through_leases_and_place_every_card() -> None:
    project = make_project(count=8, overlap=2)
    heard: list[int] = []
    made = rank_open_prompts(project=project, raters=raters_make(project=project), utility=UTILITY, report=heard.append)
    assert made == Ranking.objects.count() == 16 == heard[-1]
    assert not Lease.objects.exclude(state="done").exists()
    for ranking in Ranking.objects.select_related("rater", "lease"):
        assert ranking.rater.kind == "simulated"
        assert sorted(uid for band in ranking.bands for uid in band) == sorted(ranking.displayed)
        assert ranking.displayed == ranking.lease.displayed
        assert ranking.duration_seconds > 0


@pytest.mark.django_db
def test_raters_that_were_stopped_go_on_where_they_were() -> None:
    project = make_project(count=6, overlap=2)
    raters = raters_make(project=project)
    held = lease_next(project=project, rater=raters[0][0])  # killed between taking a prompt and ranking it
    assert held is not None

    def stop(made: int) -> None:
        if made == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank_open_prompts(project=project, raters=raters, utility=UTILITY, report=stop)
    assert rank_open_prompts(project=project, raters=raters, utility=UTILITY) == 12 - 5
    assert not Lease.objects.exclude(state="done").exists()


@pytest.mark.django_db
def test_simulated_raters_leave_a_place_that_a_person_holds() -> None:
    project = make_project(count=3, overlap=1)
    person = User.objects.create_user(username="person", password="x" * 20)
    project.memberships.create(user=person)
    lease = lease_next(project=project, rater=person)
    rank_open_prompts(project=project, raters=raters_make(project=project), utility=UTILITY)
    ranking_submit(rater=person, token=lease.token, client_id=uuid.uuid4(), bands=[[uid] for uid in lease.displayed])
    assert Ranking.objects.filter(prompt=lease.prompt).count() == 1


def test_values_within_the_tie_width_of_a_band_s_best_are_tied() -> None:
    """3.0 and 2.9 tie; 2.7 is 0.3 below 3.0 and opens the next band, which 2.6 joins, though 2.7 is only 0.2 below 2.9."""
    assert bands_of([2.6, 3.0, 2.7, 2.9], tie_width=0.2) == [[1, 3], [2, 0]]
    assert bands_of([1.0, 1.0], tie_width=0.0) == [[0, 1]]
    assert bands_of([1.0, 2.0], tie_width=0.0) == [[1], [0]]


def test_a_sharper_rater_agrees_with_the_truth_more_often() -> None:
    utilities, words = [1.0, 1.6], [10, 10]

    def share(character: Character) -> float:
        draws = [perceived(character, random.Random(seed), utilities, words) for seed in range(3000)]
        return sum(second > first for first, second in draws) / len(draws)

    sharp, dull = Character("a", noise=0.2, tie_width=0.0), Character("b", noise=1.0, tie_width=0.0)
    careless = Character("c", noise=0.2, tie_width=0.0, careless=1.0)
    assert share(sharp) > 0.95
    assert 0.6 < share(dull) < 0.75
    assert share(careless) == pytest.approx(0.5, abs=0.03)


def test_one_rater_has_a_taste_for_short_texts() -> None:
    terse = Character("d", noise=0.0, tie_width=0.0, dislike_per_word=0.1)
    assert perceived(terse, random.Random(0), [2.0, 2.0], [5, 20]) == pytest.approx([1.5, 0.0])
