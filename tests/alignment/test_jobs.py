"""Job rows: what is refused, who may write, and what follows when a job ends."""

from datetime import timedelta
from pathlib import Path

import pytest
from django.db import IntegrityError, transaction
from django.utils import timezone

from alignment.models import Job, ModelParent, TrainedModel
from alignment.services.claims import job_claim, job_fail, job_finish, job_heartbeat, job_return, job_stop
from alignment.services.jobs import JobRequest, job_cancel, job_create, job_resume, job_retry
from alignment.services.settling import Ending
from annotation.errors import Refused

pytestmark = pytest.mark.django_db
DATA = {"path": "/data/rankings.jsonl", "digest": "0" * 64}


@pytest.fixture(autouse=True)
def runs(settings, tmp_path: Path) -> Path:
    settings.RUNS_DIR = tmp_path
    return tmp_path


def make(method: str = "sft", **given) -> Job:
    inputs = given.pop("inputs", {"model": "/models/start", "data": DATA})
    return job_create(request=JobRequest(method=method, inputs=inputs, **given))


def claim(worker: str = "w1", **given) -> Job | None:
    return job_claim(**{"worker": worker, "lease_seconds": 30, "slots": 1, "free": 1, **given})


def write_model(job: Job) -> None:
    (job.folder / "model").mkdir(parents=True)
    (job.folder / "model" / "config.json").write_text("{}")


def succeed(job: Job) -> None:
    write_model(job)
    assert job_finish(job=job, fence=job.fence, ending=Ending(exit_code=0, metrics={"loss": 1.0}))


def expire(job: Job) -> None:
    Job.objects.filter(pk=job.pk).update(lease_expires_at=timezone.now() - timedelta(seconds=1))


# -- refusals


def test_an_unknown_option_is_refused_with_the_near_name_and_nothing_is_queued():
    with pytest.raises(Refused, match="Did you mean 'beta'"):
        make("dpo", options={"betta": 0.1})
    assert not Job.objects.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "dop"}, "no method 'dop'"),
        ({"inputs": {"data": DATA}}, "sft needs model: give --model"),
        ({"inputs": {"model": "/m", "data": DATA, "reward_model": "/r"}}, "sft takes no reward_model"),
        ({"inputs": {"model": {"name": "nobody"}, "data": DATA}}, "no model 'nobody'"),
        ({"name": "../../etc"}, "is not possible"),
        ({"processes": 0}, "processes must be"),
        ({"options": {"learning_rate": "fast"}}, "learning_rate: expected"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(given, words):
    with pytest.raises(Refused, match=words):
        make(**given)


def test_a_name_is_taken_once():
    make(name="one")
    with pytest.raises(Refused, match="already"):
        make(name="one")


def test_a_reward_model_is_not_taken_for_a_policy():
    job = make("reward", name="rm")
    with pytest.raises(Refused, match="rm is a reward model"):
        make("dpo", inputs={"model": {"name": "rm"}, "data": DATA})
    assert job.state == "queued"


def test_the_database_refuses_a_running_job_without_an_owner():
    job = make()
    with pytest.raises(IntegrityError), transaction.atomic():
        Job.objects.filter(pk=job.pk).update(state="running")


def test_the_database_refuses_unknown_states_and_too_many_attempts():
    job = make()
    for change in ({"state": "asleep"}, {"attempt": 4}, {"state": "failed"}, {"method": "magic"}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Job.objects.filter(pk=job.pk).update(**change)


# -- claims and the fence


def test_a_job_is_claimed_once():
    make()
    assert claim().state == "running"
    assert claim("w2") is None


def test_the_oldest_job_goes_first_and_a_large_one_is_not_overtaken():
    large, small = make(processes=2), make()
    assert claim(slots=2, free=1) is None, "the large job waits for two places, and the small one behind it"
    assert claim(slots=2, free=2).pk == large.pk
    assert claim(slots=1, free=1).pk == small.pk


def test_an_owner_whose_lease_ended_can_write_nothing_after_another_took_over():
    make()
    first = claim()
    expire(first)
    second = claim("w2")
    assert (second.pk, second.fence, second.attempt) == (first.pk, first.fence + 1, 2)
    assert job_heartbeat(job=first, fence=first.fence, lease_seconds=30, progress={"step": 99}) is None
    assert not job_fail(job=first, fence=first.fence, ending=Ending(error="late"))
    assert not job_finish(job=first, fence=first.fence, ending=Ending())
    second.refresh_from_db()
    assert (second.state, second.worker, second.step, second.error) == ("running", "w2", 0, "")
    assert not TrainedModel.objects.exists()


def test_a_job_whose_workers_were_lost_too_often_is_not_claimed_again():
    make(max_attempts=2)
    for worker in ("w1", "w2"):
        expire(claim(worker))
    assert claim("w3") is None


def test_a_heartbeat_keeps_the_job_and_tells_of_a_cancel():
    make()
    job = claim()
    assert job_heartbeat(job=job, fence=job.fence, lease_seconds=30, progress={"step": 3}) == "running"
    assert job_cancel(job=job).state == "cancelling"
    assert job_heartbeat(job=job, fence=job.fence, lease_seconds=30) == "cancelling"
    assert job_stop(job=job, fence=job.fence, ending=Ending(), has_checkpoint=True)
    job.refresh_from_db()
    assert (job.state, job.step, job.worker) == ("stopped", 3, "")


def test_a_worker_that_leaves_gives_the_job_back_without_using_up_an_attempt():
    make()
    job = claim()
    job_return(job=job, fence=job.fence, ending=Ending(), counts=False)
    again = claim("w2")
    assert (again.attempt, again.fence) == (1, 2)


# -- what follows


def chain() -> tuple[Job, Job, Job]:
    sft = make(name="sft")
    dpo = make("dpo", name="dpo", inputs={"model": {"name": "sft"}, "data": DATA})
    told = make("generate", name="told", inputs={"model": {"name": "dpo"}, "data": DATA})
    return sft, dpo, told


def states() -> dict[str, str]:
    return dict(Job.objects.values_list("name", "state"))


def test_a_job_waits_for_the_models_that_it_needs_and_then_goes():
    chain()
    assert states() == {"sft": "queued", "dpo": "waiting", "told": "waiting"}
    succeed(claim())
    assert states() == {"sft": "succeeded", "dpo": "queued", "told": "waiting"}
    succeed(claim())
    assert states() == {"sft": "succeeded", "dpo": "succeeded", "told": "queued"}
    link = ModelParent.objects.get()
    assert (link.parent.name, link.child.name, link.role) == ("sft", "dpo", "model")
    assert TrainedModel.objects.get(name="sft").children.get().name == "dpo"


def test_a_job_needs_all_of_its_models():
    make(name="sft")
    make("reward", name="rm", inputs={"model": {"name": "sft"}, "data": DATA})
    make("ppo", name="ppo", inputs={"model": {"name": "sft"}, "reward_model": {"name": "rm"}, "data": DATA})
    succeed(claim())
    assert states()["ppo"] == "waiting"
    succeed(claim())
    assert states()["ppo"] == "queued"


def test_when_a_job_fails_all_that_need_it_fail_with_the_reason_and_come_back_with_it():
    sft, _, told = chain()
    job = claim()
    job_fail(job=job, fence=job.fence, ending=Ending(error="no memory"))
    assert states() == {"sft": "failed", "dpo": "failed", "told": "failed"}
    told.refresh_from_db()
    assert "needs dpo" in told.error
    assert told.blocked_by == sft
    with pytest.raises(Refused, match="jobs resume sft"):
        job_resume(job=told)
    job_resume(job=sft)
    assert states() == {"sft": "queued", "dpo": "waiting", "told": "waiting"}


def test_cancelling_a_queued_job_cancels_those_that_wait_for_it():
    sft, _, _ = chain()
    job_cancel(job=sft)
    assert set(states().values()) == {"cancelled"}
    assert claim() is None


def test_an_ended_job_is_not_cancelled_and_a_good_one_not_run_again():
    make()
    job = claim()
    succeed(job)
    for change in (job_cancel, job_resume, job_retry):
        with pytest.raises(Refused, match="succeeded"):
            change(job=job)


def test_resume_keeps_the_folder_and_retry_takes_a_fresh_one(runs: Path):
    make(name="one")
    job = claim()
    job_fail(job=job, fence=job.fence, ending=Ending(error="crash"))
    assert job_resume(job=job).folder == runs / "one"
    job = claim()
    assert job.attempt == 1, "a person's resume gives the job its attempts back"
    job_fail(job=job, fence=job.fence, ending=Ending(error="crash"))
    again = job_retry(job=job)
    assert (again.folder, again.step, again.state) == (runs / "one.2", 0, "queued")


def test_a_result_that_is_not_whole_registers_nothing():
    make()
    job = claim()
    with pytest.raises(FileNotFoundError, match="jobs retry"):
        job_finish(job=job, fence=job.fence, ending=Ending(exit_code=0))
    job.refresh_from_db()
    assert job.state == "running", "the whole write was undone"
