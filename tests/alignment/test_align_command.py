"""`manage.py align` and `manage.py jobs`: what they refuse, what they answer, and with which exit status."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from alignment.methods import METHODS, options_check
from alignment.models import Job, Round
from alignment.services.claims import job_claim, job_fail
from alignment.services.settling import Ending
from annotation.models import Project, Prompt
from training.rundir import RunDirectory

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def place(settings, tmp_path: Path) -> Path:
    settings.VAR, settings.RUNS_DIR, settings.SNAPSHOTS_DIR = tmp_path, tmp_path / "runs", tmp_path / "snapshots"
    (tmp_path / "start").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


@pytest.fixture
def project() -> Project:
    return Project.objects.create(slug="facts", name="Facts")


def told(*words: str) -> str:
    out = io.StringIO()
    call_command(*words, stdout=out)
    return out.getvalue()


def refused(*words: str) -> tuple[int, str]:
    with pytest.raises(CommandError) as caught:
        told(*words)
    return caught.value.returncode, str(caught.value)


def answered(*words: str, code: int = 0) -> dict[str, Any]:
    """What was printed is one JSON object, whatever the exit status."""
    out = io.StringIO()
    status = 0
    try:
        call_command(*words, "--json", stdout=out)
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == code, out.getvalue()
    return json.loads(out.getvalue())


def sft(place: Path) -> list[str]:
    return ["align", "sft", "--model", str(place / "start"), "--data", str(place / "rows.jsonl")]


# -- refusals


def test_an_unknown_option_exits_with_2_and_suggests_the_near_one(place):
    code, text = refused(*sft(place), "--set", "learning_rat=0.1")
    assert code == 2
    assert "Did you mean 'learning_rate'?" in text
    assert not Job.objects.exists()


def test_values_of_the_wrong_kind_or_out_of_range_exit_with_2(place):
    for assignment in ("epochs=many", "learning_rate=-1", "batch_rows=0", "epochs", "schedule=triangle"):
        code, text = refused(*sft(place), "--set", assignment)
        assert code == 2, text


def test_what_is_named_and_missing_exits_with_3(place, project):
    data = str(place / "rows.jsonl")
    for words in (
        ["align", "sft", "--model", "nobody", "--data", data],
        ["align", "sft", "--model", "./nowhere", "--data", data],
        ["align", "sft", "--model", str(place / "start"), "--data", "/nowhere.jsonl"],
        ["align", "sft", "fatcs", "--model", str(place / "start"), "--data", data],
        ["align", "dpo", "facts", "--model", str(place / "start"), "--snapshot", "abc"],
        ["align", "sft", "--model", str(place / "start"), "--data", data, "--config", "/nowhere.toml"],
        ["jobs", "show", "nobody"],
        ["jobs", "cancel", "nobody"],
    ):
        code, text = refused(*words)
        assert code == 3, (words, text)
    assert "Did you mean 'facts'?" in refused("align", "sft", "fatcs", "--model", str(place / "start"), "--data", data)[1]


def test_a_missing_input_is_asked_for_by_the_name_of_its_flag(place):
    code, text = refused("align", "ppo", "--model", str(place / "start"), "--data", str(place / "rows.jsonl"))
    assert code == 2
    assert "--reward-model" in text
    generate = ["align", "generate", "--model", str(place / "start"), "--data", str(place / "rows.jsonl"), "--set", "candidates=8"]
    for keep in ("best", "rejection", "uncertain"):
        code, text = refused(*generate, "--set", f"keep={keep}")
        assert (code, "give --reward-model" in text) == (2, True)
    assert not Job.objects.exists()


def test_a_round_needs_rankings_and_names_its_steps(place, project):
    start = str(place / "start")
    Prompt.objects.create(project=project, key="1", messages=[{"role": "user", "content": "x"}], digest="d", split="train", overlap=1)
    assert refused("align", "round", "facts", "--model", start)[0] == 2
    assert refused("align", "round", "facts", "--model", start, "--methods", "dpo,dop")[0] == 2
    assert "dpo.beta=..." in refused("align", "round", "facts", "--model", start, "--set", "beta=0.1")[1]
    assert "no step 'dop'" in refused("align", "round", "facts", "--model", start, "--set", "dop.beta=0.1")[1]
    assert not Round.objects.exists()
    assert not Job.objects.exists()


def test_with_json_a_refusal_is_one_json_object_too(place):
    answer = answered(*sft(place), "--set", "learning_rat=0.1", code=2)
    assert answer["error"]["code"] == "option_invalid"
    assert answered("jobs", "show", "nobody", code=3)["error"]["code"] == "job_not_found"


# -- answers


def test_a_job_is_queued_with_the_digest_of_its_data_and_can_be_asked_for_again(place):
    answer = answered(*sft(place), "--name", "first", "--set", "epochs=2", "--seed", "7")
    assert (answer["name"], answer["state"], answer["seed"], answer["options"]) == ("first", "queued", 7, {"epochs": 2})
    assert len(answer["inputs"]["data"]["digest"]) == 64
    shown = told("jobs", "show", "first")
    assert "python -m alignment" in shown
    again = next(line for line in shown.splitlines() if line.startswith("ask for it again")).split("manage.py ")[1]
    assert answered(*again.split())["options"] == {"epochs": 2}


def test_set_goes_over_the_config_file(place):
    (place / "options.toml").write_text("epochs = 3.0\nlearning_rate = 0.01\n")
    answer = answered(*sft(place), "--config", str(place / "options.toml"), "--set", "epochs=1")
    assert answer["options"] == {"epochs": 1, "learning_rate": 0.01}


def test_a_dry_run_spells_out_every_option_and_queues_nothing(place, project):
    plan = json.loads(told(*sft(place), "--dry-run", "--set", "epochs=2"))
    assert plan["options"]["epochs"] == 2
    by_hand = RunDirectory.create(place / "by-hand", **{key: plan[key] for key in ("method", "seed", "inputs", "options")})
    assert by_hand.data_file().read_text() == (place / "rows.jsonl").read_text()  # as docs/data-flow.md, section 2, has it
    assert set(plan["options"]) == set(options_check("sft", {}))
    uncertain = ("--set", "reward.ensemble_size=4", "--set", "generate.candidates=4", "--set", "generate.keep=uncertain")
    chosen = json.loads(told("align", "round", "facts", "--model", str(place / "start"), "--dry-run", *uncertain))
    assert (chosen["options"]["generate"]["samples"], chosen["options"]["generate"]["candidates"]) == (2, 4)
    round_plan = json.loads(told("align", "round", "facts", "--model", str(place / "start"), "--dry-run", "--set", "dpo.beta=0.3"))
    assert round_plan["options"]["dpo"]["beta"] == 0.3
    assert not Job.objects.exists()
    assert not Round.objects.exists()


def test_a_generate_job_of_a_project_has_a_round_to_come_home_to(place, project):
    for number in range(3):
        content = [{"role": "user", "content": f"question {number}"}]
        Prompt.objects.create(project=project, key=f"k{number}~r1", messages=content, digest=f"{number}", split="train", overlap=1, round=1)
    answer = answered("align", "generate", "facts", "--model", str(place / "start"), "--limit", "2")
    assert answer["round"] == 2
    rows = [json.loads(line) for line in Path(answer["inputs"]["data"]["path"]).read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["key"] in {"k0", "k1", "k2"} for row in rows), "a prompt keeps its name through the rounds"


def test_jobs_are_listed_changed_and_logged(place):
    told(*sft(place), "--name", "one")
    assert "one" in told("jobs", "list")
    assert answered("jobs", "list", "--state", "queued")["jobs"][0]["name"] == "one"
    assert refused("jobs", "logs", "one")[0] == 3
    assert "cancelled" in told("jobs", "cancel", "one")
    assert refused("jobs", "cancel", "one")[0] == 2
    assert answered("jobs", "resume", "one")["state"] == "queued"
    job = job_claim(worker="w", lease_seconds=60, slots=1, free=1)
    job.folder.mkdir(parents=True)
    (job.folder / "log.txt").write_text("first\nsecond\nthird\x1b[2J\n")
    job_fail(job=job, fence=job.fence, ending=Ending(error="[/] no \x1b[2Jmemory", remedy="buy some"))
    assert told("jobs", "logs", "one", "-n", "2") == "second\nthird\\x1b[2J\n"
    with pytest.raises(SystemExit) as ended:
        told("jobs", "logs", "one", "-f")
    assert ended.value.code == 1, "following a job that failed ends as it did"
    assert "buy some" in told("jobs", "show", "one")
    assert "[/] no \\x1b[2Jmemory" in told("jobs", "list")
    assert "\x1b" not in told("jobs", "list") + told("jobs", "show", "one") + told("jobs", "list", "--json")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_explains_its_options_in_its_help(method, capsys):
    with pytest.raises(SystemExit) as ended:
        call_command("align", method, "--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "exit status:" in text
    for name in options_check(method, {}):
        assert f"  {name} = " in text
