"""The whole demo in miniature, as a person runs it: stopped in the middle, gone on with, run again."""

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.display import Display, spoken
from demo.sizes import DEMO_OPTIONS, MINIATURE, DemoSizes

HOUSE = Path(__file__).resolve().parent.parent.parent


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """`manage.py demo` with a state folder of its own, whatever database the tests themselves run on."""
    told = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "REDIS_URL", "MODEL", "PORT")}
    told |= {"RANKLOOP_VAR": str(folder), "SERVE": "0", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "manage.py", "demo", *arguments]
    return subprocess.Popen(command, cwd=HOUSE, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def query(folder: Path, sql: str) -> list[tuple]:
    with sqlite3.connect(folder / "rankloop.sqlite3") as connection:
        return connection.execute(sql).fetchall()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"MODEL": "gpt"}, "MODEL='gpt' is unknown"),
        ({"PORT": "eight"}, "PORT='eight' is no number"),
        ({"SERVE": "1", "PORT": "70000"}, "choose another port"),
        ({"RANKLOOP_ENV": "production", "RANKLOOP_SECRET_KEY": "x" * 50, "RANKLOOP_ALLOWED_HOSTS": "a.example"}, "in development"),
    ],
)
def test_a_demo_that_cannot_be_is_refused_at_once_with_the_remedy(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    child = start(tmp_path, **environment)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 1
    assert words in errors
    assert "Traceback" not in errors


@pytest.mark.training
def test_a_demo_that_was_stopped_goes_on_and_a_second_one_is_quick(tmp_path: Path) -> None:
    child = start(tmp_path, "--miniature")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("[5/6]"):
            child.send_signal(signal.SIGTERM)
            break
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 130, errors
    assert "goes on from here" in errors
    assert not (tmp_path / "demo" / "report.json").exists()

    child = start(tmp_path, "--miniature")
    told, errors = child.communicate(timeout=600)
    assert child.returncode == 0, errors
    report = check_report(tmp_path, told)
    check_people(tmp_path)

    began = time.monotonic()
    again, errors = start(tmp_path, "--miniature").communicate(timeout=60)
    assert "is done already" in again, errors
    assert time.monotonic() - began < 30
    assert report == json.loads((tmp_path / "demo" / "report.json").read_text())
    assert query(tmp_path, "SELECT COUNT(*) FROM annotation_project") == [(2,)]


def check_report(folder: Path, told: str) -> dict:
    report = json.loads((folder / "demo" / "report.json").read_text())
    assert list(report["policies"]) == ["sft", "dpo", "ppo"]
    for figures in report["policies"].values():
        low, high = figures["facts_said_interval"]
        assert 0 <= low <= figures["facts_said"] <= high <= 1
        assert {"win_rate", "win_rate_interval", "kl_nats", "words", "words_per_fact", "invented", "fluency"} <= set(figures)
        assert figures["samples"] == figures["prompts"] * MINIATURE.samples
    assert report["policies"]["sft"]["win_rate"] == 0.5
    low, high = report["reward_model"]["interval"]
    assert 0 <= low <= report["reward_model"]["accuracy"] <= high <= 1
    assert 0 <= report["reward_model"]["baseline_longer"] <= 1
    assert report["seconds"] > 0
    for words in ("SFT", "DPO", "PPO", "longer wins", "demo-rater", "demo-manager", "held-out prompts"):
        assert words in told
    return report


def check_people(folder: Path) -> None:
    """The rankings are simulated and complete; the round's outputs wait for people, who can sign in."""
    rankings = "SELECT COUNT(*), COUNT(DISTINCT u.kind), MIN(u.kind) FROM annotation_ranking r JOIN annotation_user u ON u.id = r.rater_id"
    assert query(folder, rankings) == [(MINIATURE.prompts * MINIATURE.overlap, 1, "simulated")]
    waiting = (
        "SELECT p.round, COUNT(*) FROM annotation_lease l JOIN annotation_prompt p ON p.id = l.prompt_id WHERE l.state = 'free' GROUP BY 1"
    )
    free = dict(query(folder, waiting))
    assert free[0] >= 90, "the chat project waits for people"
    assert free.get(2, 0) > 0, "the round's outputs wait for people"
    file = folder / "demo" / "sign-ins.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert {name: len(word) >= 12 for name, word in json.loads(file.read_text()).items()} == {"demo-rater": True, "demo-manager": True}
    roles = "SELECT u.username, m.role, COUNT(*) FROM annotation_membership m JOIN annotation_user u ON u.id = m.user_id GROUP BY 1, 2"
    assert {("demo-rater", "rater", 2), ("demo-manager", "manager", 2)} <= set(query(folder, roles))


def test_sizes_are_named_by_what_they_make_and_not_by_how_long_it_takes() -> None:
    assert DemoSizes().digest == DemoSizes(expected_seconds={}).digest
    assert (
        len({DemoSizes().digest, MINIATURE.digest, DemoSizes(prompts=10).digest, DemoSizes(options={**DEMO_OPTIONS, "sft": {}}).digest})
        == 4
    )


def test_the_time_left_counts_later_stages_at_the_pace_of_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage a took 20 s instead of 10: the pace is 2. Half of b has taken 10 s, so 10 s are left of it, and 2 x 30 s for c."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display({"a": "A", "b": "B", "c": "C"}, {"a": 10.0, "b": 20.0, "c": 30.0})
    display.begin("a")
    assert display.left_seconds(0.0) == pytest.approx(60.0)
    now[0] += 20
    display.end()
    display.begin("b")
    now[0] += 10
    assert display.left_seconds(0.5) == pytest.approx(70.0)
    assert display.left_seconds(0.5, eta_seconds=4.0) == pytest.approx(64.0)
    assert [spoken(3.2), spoken(44), spoken(201)] == ["3 s", "45 s", "3 min 20 s"]
