"""A round: what it queues, and how its outputs come home to the raters, mixed, blind and once."""

import json
import uuid
from pathlib import Path

import pytest
import torch

from alignment.models import Job, Round
from alignment.selectors import round_summary
from alignment.services.claims import job_claim, job_finish
from alignment.services.home import dispute, next_key, round_bring_home
from alignment.services.jobs import job_cancel
from alignment.services.rounds import RoundRequest, round_create
from alignment.services.settling import Ending
from alignment.tables import round_table
from annotation.errors import Refused
from annotation.models import Completion, Lease, Membership, Project, Prompt, User
from annotation.selectors import task_of
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add
from annotation.services.rankings import ranking_submit
from rewardmodel.ensemble import disagreement, mean_disagreement

pytestmark = pytest.mark.django_db


@pytest.fixture
def place(settings, tmp_path: Path) -> Path:
    settings.VAR, settings.RUNS_DIR, settings.SNAPSHOTS_DIR = tmp_path, tmp_path / "runs", tmp_path / "snapshots"
    (tmp_path / "start").mkdir()
    return tmp_path


@pytest.fixture
def rater(db) -> User:
    return User.objects.create_user("rater")


@pytest.fixture
def project(place: Path, rater: User) -> Project:
    """Twenty prompts with two texts each, ranked once."""
    project = Project.objects.create(slug="facts", name="Facts", overlap=1, held_out_percent=30)
    Membership.objects.create(project=project, user=rater)
    items = [
        {"key": f"p{n}", "messages": [{"role": "user", "content": f"Say {n}"}], "completions": [{"text": f"{n}!"}, {"text": f"{n}?"}]}
        for n in range(20)
    ]
    prompts_add(project=project, items=items)
    rank_all(project, rater)
    return project


def rank_all(project: Project, rater: User) -> int:

    done = 0
    while (lease := lease_next(project=project, rater=rater)) is not None:
        ids = [one["id"] for one in task_of(lease)["completions"]]
        ranking_submit(rater=rater, token=lease.token, client_id=uuid.uuid4(), bands=[[one] for one in ids])
        done += 1
    return done


def begin(project: Project, place: Path, **given) -> Round:
    return round_create(request=RoundRequest(**{"project": project, "model": str(place / "start"), "methods": ("dpo", "ppo"), **given}))


def do_all(texts: dict[str, list[str]] | None = None) -> None:
    """Be the workers: end each job with the files that its method leaves. `texts`: what each generate job writes for every prompt."""
    while (job := job_claim(worker="w", lease_seconds=60, slots=1, free=1)) is not None:
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.method in ("reward", "dpo", "ppo"):
            (job.folder / "model").mkdir()
        if job.method == "generate":
            write_completions(job, (texts or {}).get(job.name.rpartition("-")[2]))
        job_finish(job=job, fence=job.fence, ending=Ending(exit_code=0, metrics={"win_rate": 0.6} if job.method == "evaluate" else {}))


def write_completions(job: Job, texts: list[str] | None) -> None:
    rows = []
    for line in Path(job.inputs["data"]["path"]).read_text().splitlines():
        prompt = json.loads(line)
        for sample, text in enumerate(texts or [f"{job.name} {n}" for n in range(job.options["samples"])]):
            sampling = {"temperature": 1.0, "seed": 0, "tokens": 3, "finished": True}
            rows.append(
                {**prompt, "text": text, "policy": "as the child sees it", "sample": sample, "sampling": sampling, "logprob_nats": -1.5}
            )
    (job.folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_bad_step_leaves_nothing_behind(project, place):
    for given in ({"options": {"dpo": {"betta": 1}}}, {"methods": ("dpo", "dpo")}, {"shown": 1}, {"shown": 17}, {"prompt_split": "test"}):
        with pytest.raises(Refused):
            begin(project, place, **given)
    assert not Round.objects.exists()
    assert not Job.objects.exists()


def test_a_round_queues_the_whole_chain(project, place):
    made = begin(project, place, options={"dpo": {"beta": 0.3}}, prompts=5)
    jobs = {job.name: job for job in made.jobs.all()}
    assert set(jobs) == {
        "facts-r1-reward", "facts-r1-dpo", "facts-r1-ppo",
        "facts-r1-generate-dpo", "facts-r1-generate-ppo", "facts-r1-generate-start",
        "facts-r1-evaluate-dpo", "facts-r1-evaluate-ppo",
    }  # fmt: skip
    needs = {name: {need.name for need in job.needs.all()} for name, job in jobs.items()}
    assert needs["facts-r1-ppo"] == {"facts-r1-reward"}
    assert needs["facts-r1-dpo"] == needs["facts-r1-generate-start"] == set()
    assert needs["facts-r1-evaluate-ppo"] == {"facts-r1-ppo", "facts-r1-reward"}
    assert jobs["facts-r1-dpo"].options == {"beta": 0.3}
    assert jobs["facts-r1-dpo"].inputs["data"]["digest"] == made.snapshot.digest
    assert len(Path(jobs["facts-r1-generate-dpo"].inputs["data"]["path"]).read_text().splitlines()) == 5
    assert {job.state for job in jobs.values()} == {"queued", "waiting"}


def test_outputs_come_home_mixed_blind_and_once_and_raters_can_lease_them(project, place, rater):
    made = begin(project, place, shown=4, prompts=0)
    do_all()
    made.refresh_from_db()
    assert made.state == "succeeded"
    assert made.home_at is not None
    prompts = Prompt.objects.filter(project=project, round=1)
    assert prompts.count() == 20
    assert all(prompt.completions.count() == 4 for prompt in prompts)
    shares = {
        policy: Completion.objects.filter(prompt__round=1, policy=policy).count()
        for policy in ("facts-r1-dpo", "facts-r1-ppo", str(place / "start"))
    }
    assert sum(shares.values()) == 80
    assert min(shares.values()) >= 20, "each policy speaks at least once to each prompt"
    one = Completion.objects.filter(policy="facts-r1-dpo").first()
    assert one.run == "facts-r1-generate-dpo"
    assert one.sampling["temperature"] == 1.0
    assert not round_bring_home(round=made), "coming home twice adds nothing"
    assert Completion.objects.filter(prompt__round=1).count() == 80
    lease = lease_next(project=project, rater=rater)
    assert lease.prompt.round == 1
    assert "facts-r1" not in json.dumps({key: value for key, value in task_of(lease).items() if key != "completions"})
    splits = set(Prompt.objects.filter(project=project).values_list("digest", "split"))
    assert len(splits) == 20, "the same question stays on its side of the split"
    table = round_table(round_summary(made))
    assert "wins against start" in table
    assert "20 prompts with 80 completions" in table


def test_equal_and_blank_texts_are_shown_once_or_never_and_counted(project, place):
    made = begin(project, place, methods=("dpo",), prompts=3, shown=4)
    do_all({"dpo": ["same", "  ", "only dpo"], "start": ["same", "nul \x00 and \ud800 half"]})
    made.refresh_from_db()
    texts = set(Completion.objects.filter(prompt__round=1).values_list("text", flat=True))
    assert texts == {"same", "only dpo", "nul \ufffd and ? half"}
    assert (made.counts["equal"], made.counts["blank"], made.counts["mended"]) == (3, 3, 3)
    shared = Completion.objects.filter(prompt__round=1, text="same").first()
    assert len(shared.sampling["also_from"]) == 1, "that both policies wrote it is not forgotten"


def test_a_prompt_with_one_distinct_text_is_not_asked(project, place):
    made = begin(project, place, methods=("dpo",), prompts=3)
    do_all({"dpo": ["same"], "start": ["same"]})
    made.refresh_from_db()
    assert made.counts["too_few"] == 3
    assert not Prompt.objects.filter(round=1).exists()


def test_the_next_round_goes_on_from_the_outputs_of_the_last(project, place, rater):
    begin(project, place, methods=("dpo",), prompts=4)
    do_all()
    assert rank_all(project, rater) == 4
    second = begin(project, place, methods=("dpo",), model="facts-r1-dpo", prompts=0)
    do_all()
    assert second.number == 2
    assert second.snapshot.counts["rankings"] == 24
    assert Prompt.objects.filter(round=2).count() == 20, "a question that was asked twice is one question"
    assert set(Prompt.objects.filter(round=2, key="p3~r2").values_list("key", flat=True)) == {"p3~r2"}
    assert Lease.objects.filter(prompt__round=2, state="free").count() == 20


def test_a_cancelled_policy_cancels_what_needs_it_and_nothing_comes_home(project, place):
    made = begin(project, place)
    job_cancel(job=Job.objects.get(name="facts-r1-reward"))
    do_all()
    made.refresh_from_db()
    assert made.state == "cancelled"
    assert Job.objects.get(name="facts-r1-ppo").state == "cancelled"
    assert Job.objects.get(name="facts-r1-dpo").state == "succeeded"
    assert made.home_at is None
    assert not Prompt.objects.filter(round=1).exists()


def test_keys_stay_within_their_field():
    assert next_key("p17", 2) == next_key("p17~r1", 2) == "p17~r2"
    long = next_key("x" * 200, 12)
    assert len(long) <= 200
    assert long.endswith("~r12")
    assert long != next_key("x" * 199 + "y", 12)


def test_a_dispute_is_the_variance_of_the_members_verdicts():
    """Two members are sure of opposite orders: P is 1 and 0, the variance 1/4. They agree on the third: its pairs add nothing."""
    assert dispute([[50.0, -50.0], [0.0, 0.0]]) == pytest.approx(0.25)
    assert dispute([[50.0, -50.0], [0.0, 0.0], [99.0, 99.0]]) == pytest.approx(0.25 / 3, abs=1e-9)
    assert dispute([[1.0, 2.0]]) == dispute([]) == dispute([[], []]) == 0.0
    scores = torch.randn(5, 3)
    assert dispute(scores.tolist()) == pytest.approx(mean_disagreement(disagreement(scores), range(5)), abs=1e-6)


def test_a_reward_model_of_one_member_that_is_given_is_seen_to_be_one(project, place, tmp_path):
    folder = tmp_path / "reward"
    folder.mkdir()
    for mean, refused in ((0.5, True), ([0.5, 0.1], False)):
        (folder / "rankloop_reward.json").write_text(json.dumps({"mean": mean}))
        asked = {"options": {"ppo": {"reward_view": "worst"}}, "reward_model": str(folder), "methods": ("ppo",)}
        if refused:
            with pytest.raises(Refused, match="several members"):
                begin(project, place, **asked)
        else:
            begin(project, place, **asked)


UNCERTAIN = {"reward": {"ensemble_size": 3}, "generate": {"keep": "uncertain", "candidates": 8, "most_uncertain_prompts": 3}}


def test_a_dispute_is_refused_where_the_round_learns_a_reward_model_of_one_member(project, place):
    for asked in ({"keep": "uncertain", "candidates": 8}, {"most_uncertain_prompts": 3}):
        with pytest.raises(Refused, match="ensemble_size"):
            begin(project, place, options={"generate": asked})
    for options in (
        {"ppo": {"reward_view": "worst"}},
        {"generate": {"keep": "best", "candidates": 8, "reward_view": "mean_minus_spread"}},
    ):
        with pytest.raises(Refused, match=r"reward_view = .* needs a reward model of several members"):
            begin(project, place, options=options)
    with pytest.raises(Refused, match="both, or neither"):  # each of three policies writes two of the four
        begin(project, place, options={**UNCERTAIN, "generate": {"keep": "uncertain", "candidates": 2}})
    assert not Job.objects.exists()


def test_a_round_that_asks_what_is_disputed_gives_its_reward_model_to_those_who_generate(project, place):
    made = begin(project, place, options=UNCERTAIN, prompts=5)
    generating = list(made.jobs.filter(method="generate"))
    assert len(generating) == 3
    for job in generating:
        assert job.inputs["reward_model"] == {"name": "facts-r1-reward"}
        assert "facts-r1-reward" in {need.name for need in job.needs.all()}
        assert job.options == {"samples": 2, "keep": "uncertain", "candidates": 8, "most_uncertain_prompts": 5}
    assert made.settings["most_uncertain_prompts"] == 3


def test_only_the_most_disputed_prompts_come_home_and_the_others_are_counted(project, place):
    """What counts is between the policies: each writes texts that its own members find alike, and the smaller the key, the more they differ
    about which policy's are better."""
    made = begin(project, place, methods=("dpo",), options=UNCERTAIN, prompts=0)
    while (job := job_claim(worker="w", lease_seconds=60, slots=1, free=1)) is not None:
        job.folder.mkdir(parents=True, exist_ok=True)
        if job.method in ("reward", "dpo"):
            (job.folder / "model").mkdir()
        if job.method == "generate":
            write_completions(job, None)
            rows = [json.loads(line) for line in (job.folder / "completions.jsonl").read_text().splitlines()]
            for row in rows:
                number = int(row["key"].removeprefix("p"))
                row["disagreement"] = 0.0
                row["member_scores"] = [(20 - number) / 10, (number - 20) / 10] if job.name.endswith("dpo") else [0.0, 0.0]
                row["score"] = {"mean": 0.5, "spread": 0.1, "worst": 0.3}
            (job.folder / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job_finish(job=job, fence=job.fence, ending=Ending(exit_code=0))
    made.refresh_from_db()
    home = Prompt.objects.filter(project=project, round=made.number)
    assert {prompt.key for prompt in home} == {"p0~r1", "p1~r1", "p2~r1"}
    assert made.counts["less_disputed"] == 17
    one = Completion.objects.filter(prompt__in=home).first()
    assert one.sampling["score"] == {"mean": 0.5, "spread": 0.1, "worst": 0.3}
