"""What a run wrote and what its guards said: on its page, in the console and in a terminal. A policy's text is never trusted."""

import io
import json
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from alignment import selectors
from alignment.follow import alarms_of
from alignment.models import Job
from alignment.progress import Display
from alignment.samples import printable, read_samples
from alignment.services.claims import job_claim, job_fail
from alignment.services.jobs import JobRequest, job_create
from alignment.services.settling import Ending
from alignment.worker import Worker, WorkerSettings
from annotation.models import User
from training.rundir import RunDirectory

HOSTILE = "<script>alert(1)</script> \x1b[2J\x9b31m\r\u202egood\x07"
ALARM = {"name": "kl_limit", "seen": "The policy is 41 nats away.", "remedy": f"Raise kl_coefficient. {HOSTILE}", "action": "warn"}


def sample(step: int, number: int, text: str) -> dict:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"question {number}"}]
    figures = {"score": 0.0, "kl_k1_nats": 1.25, "kl_k3_nats": 1.5, "tokens": 3, "finished": number == 0}
    return {"step": step, "key": f"p{number}", "messages": messages, "text": text, **figures}


def write_samples(folder: Path, rows: list[dict]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def job(db, settings, tmp_path: Path) -> Job:
    """A PPO that runs, with three evaluations of twelve texts and an alarm."""
    settings.RUNS_DIR = tmp_path
    data = {"path": "/data/prompts.jsonl", "digest": "0" * 64}
    inputs = {"model": "/models/start", "reward_model": "/models/reward", "data": data}
    job_create(request=JobRequest(method="ppo", name="ppo", inputs=inputs))
    found = job_claim(worker="w", lease_seconds=60, slots=1, free=1)
    run = RunDirectory.create(found.folder, method="ppo", seed=0, inputs={}, options={})
    run.event("alarm", step=10, **ALARM)
    run.event("warning", text="a warning")
    write_samples(found.folder, [sample(step, n, f"answer {n} at {step} {HOSTILE}") for step in (0, 10, 20) for n in range(12)])
    return found


@pytest.fixture
def staff(db) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("staff", password="x"))
    return client


def shown(*words: str, capsys) -> str:
    call_command("jobs", "show", *words)
    return capsys.readouterr().out


# -- refusals


def test_a_job_without_samples_says_so(job: Job):
    (job.folder / "samples.jsonl").unlink()
    with pytest.raises(CommandError, match="is running and has no samples"):
        call_command("jobs", "show", "ppo", "--samples")


def test_a_step_without_an_evaluation_is_refused_with_those_there_are(job: Job):
    with pytest.raises(CommandError, match="no samples at step 15; it did at steps 0, 10, 20"):
        call_command("jobs", "show", "ppo", "--samples", "--step", "15")
    write_samples(job.folder, [{name: value for name, value in sample(0, 0, "x").items() if name != "step"}])
    with pytest.raises(CommandError, match="leave --step out"):
        call_command("jobs", "show", "ppo", "--samples", "--step", "0")


# -- in a terminal


def test_samples_are_told_with_prompt_output_score_and_kl_the_newest_evaluation_first(job: Job, capsys):
    told = shown("ppo", "--samples", capsys=capsys)
    assert "12 samples at step 20 (--step N for steps 0, 10)" in told
    for part in (
        "answer 11 at 20",
        "question 11",
        "Be brief.",
        "score 0",
        "KL 1.25 nats (k1)",
        "KL 1.5 nats (k3)",
        "cut at the length limit",
    ):
        assert part in told
    assert "at 10" not in told
    older = shown("ppo", "--samples", "--step", "10", capsys=capsys)
    assert "answer 0 at 10" in older
    assert "at 20" not in older


def test_a_policys_text_cannot_command_a_terminal(job: Job, capsys):
    for words in (("--samples",), ("--samples", "--json"), ()):
        told = shown("ppo", *words, capsys=capsys)
        assert "alert(1)" in told
        assert not {"\x1b", "\x9b", "\r", "\x07", "\u202e"} & set(told)
    assert "\\x1b[2J\\x9b31m\\x0d\\u202egood\\x07" in shown("ppo", "--samples", capsys=capsys)
    assert printable("ä\t日本\n👩‍🚀") == "ä\t日本\n👩‍🚀"


def test_an_error_cannot_command_the_terminal_of_a_worker_or_of_who_waits():
    said, stream = [], io.StringIO()
    Worker(WorkerSettings(), announce=said.append).announce(f"ppo: failed: {HOSTILE}")
    Display(stream).say(f"ppo: {HOSTILE}")
    for told in (*said, stream.getvalue()):
        assert "\\x1b[2J\\x9b31m" in told
        assert not {"\x1b", "\x9b", "\r", "\x07", "\u202e"} & set(told)


def test_a_text_that_looks_like_the_next_sample_stays_inside_its_own(job: Job, capsys):
    write_samples(job.folder, [sample(0, 0, "fine\np9  score 99\n  output:\n    forged")])
    told = shown("ppo", "--samples", capsys=capsys).splitlines()
    assert [line for line in told if "score 99" in line] == ["    p9  score 99"]


def test_samples_as_json_are_those_of_the_step(job: Job, capsys):
    found = json.loads(shown("ppo", "--samples", "--step", "0", "--json", capsys=capsys))
    assert (found["steps"], found["step"], len(found["samples"])) == ([20, 10, 0], 0, 12)
    assert found["samples"][3] == sample(0, 3, f"answer 3 at 0 {HOSTILE}")


def test_jobs_show_names_alarms_with_what_was_seen_and_the_remedy(job: Job, capsys):
    told = shown("ppo", capsys=capsys)
    assert "alarm at step 10, kl limit (warn): The policy is 41 nats away. Raise kl_coefficient." in told
    assert "warning: a warning" in told


# -- on the pages


def test_the_page_shows_an_evaluation_by_its_step_and_escapes_what_a_policy_wrote(job: Job, staff: Client):
    for address, there, not_there in (
        ("/runs/ppo/", "answer 0 at 20", "at 10 "),
        ("/runs/ppo/?step=10", "answer 0 at 10", "at 20 "),
        ("/runs/ppo/live/?step=10", "answer 0 at 10", "at 20 "),
        ("/runs/ppo/?step=15", "There is no evaluation at step 15", "at 10 "),
        ("/runs/ppo/?step=-1%3Cscript%3E", "answer 0 at 20", "at 10 "),
        ("/runs/ppo/?step=" + "9" * 5000, "answer 0 at 20", "at 10 "),
    ):
        page = staff.get(address).content.decode()
        assert there in page
        assert not_there not in page
        assert "<script>alert" not in page
    page = staff.get("/runs/ppo/?step=10").content.decode()
    assert 'hx-get="/runs/ppo/live/?step=10"' in page, "the part that renews itself stays at the chosen step"
    assert page.index("step=20#samples") < page.index("step=10#samples") < page.index("step=0#samples"), "the newest comes first"
    assert "answer 11" not in page
    assert "answer 11 at 10" in staff.get("/runs/ppo/?step=10&all=1").content.decode()
    assert "score 0" in page, "a score of zero is a score"


def test_the_pages_show_alarms_apart_from_warnings(job: Job, staff: Client):
    for address in ("/runs/ppo/", f"/admin/alignment/job/{job.pk}/change/", f"/admin/alignment/job/{job.pk}/live/"):
        page = staff.get(address).content.decode()
        for part in ("kl limit", "The policy is 41 nats away.", "Raise kl_coefficient.", "step 10"):
            assert part in page, (address, part)
        assert "<script>alert" not in page
    assert "1 warning, the newest first" in staff.get("/runs/ppo/").content.decode()


def test_alarms_are_counted_apart_from_warnings_and_what_is_cut_is_counted(job: Job, staff: Client, capsys):
    run = RunDirectory.open(job.folder)
    console = f"/admin/alignment/job/{job.pk}/live/"
    for address in ("/runs/ppo/", console):
        assert "1 alarm, 1 warning" in staff.get(address).content.decode()
    assert "1 alarm, 1 warning" in shown("ppo", capsys=capsys)
    assert "the run goes on" in staff.get("/runs/ppo/").content.decode()
    for step in range(11, 33):
        run.event("alarm", step=step, **ALARM)
        run.event("warning", text=f"warning {step}")
    page = staff.get("/runs/ppo/").content.decode()
    assert "23 alarms, 23 warnings" in page
    assert "and 3 more alarms" in page
    assert "<li>and 3 more</li>" in page
    assert "and 18 more alarms" in staff.get(console).content.decode()
    told = shown("ppo", capsys=capsys)
    assert "18 more alarms before these" in told
    assert "18 more warnings before these" in told
    job_fail(job=job, fence=job.fence, ending=Ending(error="no memory"))
    page = staff.get("/runs/ppo/").content.decode()
    assert "the run went on" in page
    assert "the run goes on" not in page


def test_what_rejection_did_is_told_in_words_and_an_empty_text_as_such(job: Job, staff: Client, capsys):
    rows = [{**sample(0, n, text), "rejection": {"accepted": n == 0, "acceptance": 0.123456}} for n, text in enumerate(("yes", " "))]
    write_samples(job.folder, rows)
    page, told = staff.get("/runs/ppo/").content.decode(), shown("ppo", "--samples", capsys=capsys)
    for text in (page, told):
        assert "accepted (acceptance 0.12)" in text
        assert "filled up (acceptance 0.12)" in text
        assert "(empty)" in text
    assert "0.123456" not in page


def test_the_console_shows_the_samples_of_the_newest_evaluation(job: Job, staff: Client):
    page = staff.get(f"/admin/alignment/job/{job.pk}/change/").content.decode()
    for part in ("answer 0 at 20", "question 0", "score 0.000", "KL 1.250 nats", "/runs/ppo/?step=10#samples"):
        assert part in page
    assert "<script>alert" not in page


def test_resume_is_not_what_the_page_offers_first_after_the_guards_stopped_a_run(job: Job, staff: Client):
    resume = '<button class="primary">Resume</button>'
    job_fail(job=job, fence=job.fence, ending=Ending(error="no memory", remedy="buy some"))
    assert resume in staff.get("/runs/ppo/").content.decode()
    RunDirectory.open(job.folder).event("alarm", step=20, **{**ALARM, "action": "stop"})
    page = staff.get("/runs/ppo/").content.decode()
    assert resume not in page
    assert "<button>Resume</button>" in page


# -- what is read


def test_alarms_after_the_checkpoint_of_a_resume_wait_until_they_are_said_again():
    events = [{"kind": "alarm", "step": step, "name": "kl_limit"} for step in (4, 9)]
    events += [{"kind": "resume", "step": 6}, {"kind": "alarm", "step": 8, "name": "length_drift"}]
    assert [(alarm["step"], alarm["name"]) for alarm in alarms_of(events)] == [(8, "length drift"), (4, "kl limit")]


def test_an_evaluation_that_was_rolled_back_says_so_and_is_not_the_one_shown_at_first(job: Job, staff: Client, capsys):
    run = RunDirectory.open(job.folder)
    run.event("rollback", step=20, to_step=10, kl_coefficient=0.1, rollbacks=1)
    told = shown("ppo", "--samples", capsys=capsys)
    assert "12 samples at step 10 (--step N for steps 0, 20 (rolled back))" in told
    assert "at step 20, which was rolled back to step 10" in shown("ppo", "--samples", "--step", "20", capsys=capsys)
    page = staff.get("/runs/ppo/").content.decode()
    assert "answer 0 at 10" in page
    assert "20 (rolled back)" in page
    assert "given up" not in page
    assert "rolled back to step 10" in staff.get("/runs/ppo/?step=20").content.decode()
    page = staff.get(f"/admin/alignment/job/{job.pk}/change/").content.decode()
    assert "answer 0 at 10" in page
    assert "20 (rolled back)" in page
    run.event("resume", step=15)  # a checkpoint from before it: step 20 comes again
    assert "answer 0 at 20" in staff.get("/runs/ppo/").content.decode()


def test_all_samples_of_a_step_are_read_without_keeping_the_file(job: Job, staff: Client, monkeypatch):
    rows = [sample(step, n, f"answer {n}") for n in range(3) for step in (2, 0, 1)]  # in any order
    write_samples(job.folder, rows)
    for step, expected in ((None, 2), (1, 1), (7, 2)):
        found = read_samples(job.folder, limit=2, step=step)
        assert (found.step, [row["step"] for row in found.rows], found.total, found.steps) == (expected, [expected] * 2, 3, [2, 1, 0])
    monkeypatch.setattr(selectors, "ALL_SAMPLES", 2)
    page = staff.get("/runs/ppo/?all=1").content.decode()
    assert "2 of 3. Read them all in a terminal" in page
    assert "all=1#samples" not in page


def test_a_line_cut_short_or_damaged_is_passed_over(tmp_path: Path):
    whole = json.dumps(sample(0, 0, "a\u2028b"), ensure_ascii=False)
    (tmp_path / "samples.jsonl").write_text(f'{whole}\n{{"step": 0, nonsense\n{whole[:30]}', encoding="utf-8")
    assert [row["text"] for row in read_samples(tmp_path, limit=9).rows] == ["a\u2028b"]
    assert read_samples(tmp_path / "absent", limit=9).rows == []
