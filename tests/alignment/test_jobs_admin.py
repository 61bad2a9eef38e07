"""Who sees runs and models, in the site and in the console, and what can be done there."""

from pathlib import Path

import pytest
from django.test import Client
from django.urls import reverse

from alignment.curves import charts_of, figures_of, series_of, thinned, tick_labels, ticks
from alignment.models import Job, ModelParent, TrainedModel
from alignment.services.claims import job_claim, job_fail, job_finish
from alignment.services.jobs import JobRequest, job_create
from alignment.services.settling import Ending
from annotation.models import Membership, Project, User
from training.rundir import RunDirectory

DATA = {"path": "/data/rankings.jsonl", "digest": "0" * 64}
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def project(db) -> Project:
    return Project.objects.create(slug="facts", name="Facts")


@pytest.fixture
def jobs(project: Project, settings, tmp_path: Path) -> dict[str, Job]:
    """An SFT that ended well, a DPO that runs from it, and an evaluation that waits."""
    settings.RUNS_DIR = tmp_path
    job_create(request=JobRequest(method="sft", name="sft", project=project, inputs={"model": "/models/start", "data": DATA}))
    sft = job_claim(worker="w", lease_seconds=60, slots=1, free=1)
    (sft.folder / "model").mkdir(parents=True)
    job_finish(job=sft, fence=sft.fence, ending=Ending(exit_code=0, metrics={"loss": 0.5}))
    job_create(request=JobRequest(method="dpo", name="dpo", project=project, inputs={"model": {"name": "sft"}, "data": DATA}))
    dpo = job_claim(worker="w", lease_seconds=60, slots=1, free=1)
    run = RunDirectory.create(dpo.folder, method="dpo", seed=0, inputs={}, options={})
    for step in range(1, 6):
        run.event("step", step=step, steps=50, metrics={"loss": 1.0 / step, "margin": step * 0.1}, tokens=10, seconds=step, eta_seconds=9)
    run.event("warning", text=f"3 rows were too long {HOSTILE}")
    inputs = {"model": {"name": "dpo"}, "baseline": {"name": "sft"}, "data": DATA}
    job_create(request=JobRequest(method="evaluate", name="judged", project=project, inputs=inputs))
    return {job.name: job for job in Job.objects.all()}


def client_of(username: str, *, project: Project | None = None, role: str = "", **given) -> Client:
    user = User.objects.create_user(username, password="x", **given)
    if project is not None:
        Membership.objects.create(user=user, project=project, role=role)
    client = Client()
    client.force_login(user)
    return client


ADDRESSES = ("/runs/", "/runs/dpo/", "/runs/dpo/live/", "/models/sft/")


def test_strangers_and_raters_are_told_that_nothing_is_there(jobs, project):
    for client in (
        client_of("stranger"),
        client_of("rater", project=project, role="rater"),
        client_of("other", project=Project.objects.create(slug="o", name="O"), role="manager"),
    ):
        for address in ADDRESSES[1:]:
            assert client.get(address).status_code == 404, address
        assert client.post("/runs/dpo/cancel/").status_code == 404
    assert client_of("nobody").get("/runs/").status_code == 404
    assert Client().get("/runs/dpo/").status_code == 302, "who has not signed in is asked to"
    assert Job.objects.get(name="dpo").state == "running"


def test_a_manager_sees_the_runs_of_his_project_only(jobs, project):
    client = client_of("manager", project=project, role="manager")
    for address in ADDRESSES:
        assert client.get(address).status_code == 200, address
    other = client_of("other", project=Project.objects.create(slug="other", name="Other"), role="manager")
    listed = other.get("/runs/")
    assert listed.status_code == 200
    assert b"dpo" not in listed.content


def test_the_page_of_a_run_shows_curves_warnings_lineage_and_the_command_and_no_markup_of_strangers(jobs):
    page = client_of("staff", is_staff=True).get("/runs/dpo/").content.decode()
    assert "Does the loss fall" in page
    assert "<polyline" in page
    assert "3 rows were too long" in page
    assert HOSTILE not in page
    assert "&lt;script&gt;" in page
    assert 'href="/models/sft/"' in page
    assert "python -m alignment" in page
    assert 'hx-get="/runs/dpo/live/"' in page, "a running job renews itself"
    assert 'style="' not in page, "the content-security policy would refuse it"


def test_the_page_of_a_run_without_its_folder_still_opens(jobs):
    assert client_of("staff", is_staff=True).get("/runs/judged/").status_code == 200


def test_lineage_is_walked_both_ways(jobs):
    dpo = jobs["dpo"]
    (dpo.folder / "model").mkdir()
    job_finish(job=dpo, fence=dpo.fence, ending=Ending(exit_code=0))
    client = client_of("staff", is_staff=True)
    assert 'href="/models/dpo/"' in client.get("/models/sft/").content.decode()
    assert 'href="/models/sft/"' in client.get("/models/dpo/").content.decode()
    assert 'href="/models/dpo/"' in client.get("/runs/dpo/").content.decode()
    assert ModelParent.objects.count() == 1


def test_a_manager_cancels_resumes_and_retries_from_the_page(jobs, project):
    client = client_of("manager", project=project, role="manager")
    assert client.get("/runs/dpo/cancel/").status_code == 405
    client.post("/runs/dpo/cancel/")
    assert Job.objects.get(name="dpo").state == "cancelling"
    refused = client.post("/runs/dpo/resume/", follow=True)
    assert b"only stopped, cancelled and failed jobs resume" in refused.content
    job = Job.objects.get(name="dpo")
    job_fail(job=job, fence=job.fence, ending=Ending(error="crash", remedy="buy memory"))
    assert b"buy memory" in client.get("/runs/dpo/").content
    client.post("/runs/dpo/retry/")
    assert Job.objects.get(name="dpo").run_directory == "dpo.2"
    assert Job.objects.get(name="judged").state == "waiting"


def test_the_console_lists_and_shows_everything_and_changes_nothing(jobs):
    client = client_of("boss", is_staff=True, is_superuser=True)
    for name in ("job", "round", "trainedmodel"):
        assert client.get(reverse(f"admin:alignment_{name}_changelist")).status_code == 200
        assert client.get(reverse(f"admin:alignment_{name}_add")).status_code == 403
    listed = client.get(reverse("admin:alignment_job_changelist"), {"q": "dpo"}).content.decode()
    assert "<progress" in listed
    job = jobs["dpo"]
    shown = client.get(reverse("admin:alignment_job_change", args=[job.pk])).content.decode()
    assert reverse("admin:alignment_job_live", args=[job.pk]) in shown
    assert client.get(reverse("admin:alignment_job_live", args=[10**6])).status_code == 404
    assert client.post(reverse("admin:alignment_job_change", args=[job.pk]), {"name": "renamed"}).status_code == 403
    assert client.post(reverse("admin:alignment_job_delete", args=[job.pk]), {"post": "yes"}).status_code == 403
    model = TrainedModel.objects.get(name="sft")
    assert client.get(reverse("admin:alignment_trainedmodel_change", args=[model.pk])).status_code == 200


def test_the_console_asks_before_it_cancels(jobs):
    client = client_of("boss", is_staff=True, is_superuser=True)
    address = reverse("admin:alignment_job_changelist")
    asked = client.post(address, {"action": "cancel_jobs", "_selected_action": [jobs["judged"].pk]})
    assert b"Cancel 1 job?" in asked.content
    assert Job.objects.get(name="judged").state == "waiting", "nothing has happened yet"
    client.post(reverse("admin:alignment_job_changes", args=["cancel"]), {"job": [jobs["judged"].pk]})
    assert Job.objects.get(name="judged").state == "cancelled"
    assert client.get(reverse("admin:alignment_job_cancel_job", args=[jobs["dpo"].pk])).status_code == 200


def test_staff_without_the_permission_cannot_change_jobs_in_the_console(jobs):
    client = client_of("clerk", is_staff=True)
    assert client.post(reverse("admin:alignment_job_changes", args=["cancel"]), {"job": [jobs["dpo"].pk]}).status_code == 403
    assert Job.objects.get(name="dpo").state == "running"


# -- curves, by hand


def test_a_resumed_run_forgets_what_it_said_of_later_steps():
    events = [{"kind": "step", "step": step, "metrics": {"loss": step}} for step in (10, 20, 30)]
    events += [{"kind": "resume", "step": 20}, {"kind": "step", "step": 30, "metrics": {"loss": 99, "text": "x", "nan": None}}]
    assert series_of(events) == {"loss": {10: 10.0, 20: 20.0, 30: 99.0}}


def test_ticks_are_round_and_span_the_values():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3, 42)[0] <= -3
    assert ticks(5, 5)[0] < 5 < ticks(5, 5)[-1]


def test_a_long_line_is_thinned_and_keeps_its_ends():
    kept = thinned([(step, 1.0) for step in range(10_000)])
    assert (kept[0][0], kept[-1][0], len(kept)) == (0, 9999, 240)


def test_a_metric_with_one_value_is_no_curve():
    assert charts_of([{"kind": "step", "step": 1, "metrics": {"loss": 1.0}}]) == []


def test_labels_of_ticks_tell_neighbours_apart():
    assert tick_labels([5.6960, 5.6965, 5.6970]) == ["5.6960", "5.6965", "5.6970"]
    assert tick_labels([0.0, 500.0, 1000.0]) == ["0", "500", "1,000"]
    assert tick_labels([0.0, 2e-6, 4e-6]) == ["0.0e+00", "2.0e-06", "4.0e-06"]


def test_an_interval_stands_behind_its_figure():
    told = figures_of({"accuracy": 0.71, "accuracy_low": 0.68, "accuracy_high": 0.74, "start_reward": 1.0, "text": "x"})
    assert told == [("accuracy", "0.71", "(0.68 to 0.74)"), ("start reward", "1", "")]
