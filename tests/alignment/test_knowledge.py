"""What the page of a reward model shows of its report."""

import json
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from alignment.follow import progress_of
from alignment.knowledge import GLUE, knowledge_of, told_elsewhere
from alignment.ledgers import ledger_of
from alignment.models import Job, TrainedModel
from annotation.models import User
from training.rundir import RunDirectory

REPORT = {
    "format": "rankloop.report/1",
    "by_agreement": [
        {"band": "unanimous", "margin_from": 1, "margin_to": 1, "pairs": 1200, "accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.95}
        | {"confidence": 0.88},
        {"band": "split", "margin_from": 0, "margin_to": 0, "pairs": 7, "accuracy": None, "accuracy_low": None, "accuracy_high": None}
        | {"confidence": 0.6},
    ],
    "calibration": {
        "bins": [
            {"predicted": 0.5, "observed": 0.25, "observed_low": 0.2, "observed_high": 0.4, "pairs": 10},
            {"predicted": 1.0, "observed": 1.0, "observed_low": 1.0, "observed_high": 1.0, "pairs": 10},
        ],
        "bins_scaled": None,
        "error": 0.125,
        "error_scaled": None,
        "pair_log_loss": 0.5,
        "pair_log_loss_scaled": None,
        "temperature": 1.5,
        "temperature_low": 1.25,
        "temperature_high": None,
    },
    "correlations": [{"name": "score_length_given_preference", "value": -0.25, "value_low": -0.5, "value_high": 0.0, "pairs": 20}],
    "ceiling": {
        "rater_agreement": {"value": 0.75, "low": 0.7, "high": 0.8, "count": 40},
        "ceiling_upper": {"value": 0.854},
    },
    "learning_curve": [
        {"share": 0.5, "rankings": 100, "accuracy": 0.6, "accuracy_low": 0.5, "accuracy_high": 0.7, "log_loss": 0.7},
        {"share": 1.0, "rankings": 200, "accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.75, "log_loss": None},
    ],
}


def folder_with(path: Path, report) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "rankloop_report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return path


def test_a_folder_without_a_report_says_nothing(tmp_path):
    assert knowledge_of(tmp_path / "nowhere") is None
    assert knowledge_of(folder_with(tmp_path, "{")) is None
    assert knowledge_of(folder_with(tmp_path, {"format": "rankloop.report/2"})) is None
    assert knowledge_of(folder_with(tmp_path, {"format": "rankloop.report/1", "learning_curve": []})) is None


def test_estimates_stand_beside_their_intervals(tmp_path):
    known = knowledge_of(folder_with(tmp_path, REPORT))
    assert known.agreement == [
        ("all alike", "1,200", f"0.900 (0.850{GLUE}to{GLUE}0.950)", "0.880"),
        ("evenly split", "7", "", "0.600"),
    ]
    assert known.ceiling[1] == ("most that any judge can reach", "0.854")
    assert known.correlations == [("score and length", "people's choice", f"−0.250 (−0.500{GLUE}to{GLUE}0.000)")]
    assert known.calibration[0][1] == f"1.500 (1.250{GLUE}to{GLUE}any)"
    assert len(known.calibration) == 3, "what is not known has no row"


def test_points_of_the_reliability_curve_lie_where_they_should(tmp_path):
    """x: 0.5 to 1 over 58 to 468 pixels; y: 0.2 to 1 over 220 to 10: 0.25 is a sixteenth of the way up, 13.1 pixels."""
    plot = knowledge_of(folder_with(tmp_path, REPORT)).plots[0]
    assert (plot.marks[0].x, plot.marks[1].x) == (58.0, 468.0)
    assert (plot.marks[0].y, plot.marks[1].y) == (206.9, 10.0)
    assert (plot.marks[0].low, plot.marks[1].high) == (220.0, 10.0)
    assert plot.diagonal == (58.0, 141.2, 468.0, 10.0)


def test_a_curve_of_one_point_is_not_drawn(tmp_path):
    assert len(knowledge_of(folder_with(tmp_path, REPORT)).plots) == 2
    assert len(knowledge_of(folder_with(tmp_path, {**REPORT, "learning_curve": REPORT["learning_curve"][1:]})).plots) == 1


def test_figures_of_the_section_are_not_listed_twice():
    metrics = {"accuracy": 0.7, "partial_score_length_given_preference": 0.1, "held_out_temperature": 2.0, "ceiling_upper": 0.9}
    assert told_elsewhere(metrics) == {"accuracy": 0.7}


@pytest.fixture
def engineer(db, settings, tmp_path) -> Client:
    settings.RUNS_DIR = tmp_path
    inputs = {"model": "/models/start", "data": {"path": "/data/rankings.jsonl", "digest": "0" * 64}}
    job = Job.objects.create(
        name="judge", method="reward", run_directory="judge", state="succeeded", inputs=inputs, exit_code=0, finished_at=timezone.now()
    )
    TrainedModel.objects.create(name="judge", kind="reward", path="judge/model", digest="1" * 64, job=job)
    client = Client()
    client.force_login(User.objects.create_user("engineer", password="x", is_staff=True, is_superuser=True))
    return client


def test_run_and_model_show_what_the_reward_model_knows(engineer, tmp_path):
    folder_with(tmp_path / "judge" / "model", REPORT)
    for address in ("/runs/judge/", "/runs/judge/live/", "/models/judge/"):
        page = engineer.get(address).content.decode()
        assert "What the reward model knows" in page, address
        assert "0.900 (0.850" in page
        assert page.count('class="number">–<') == 1, "split pairs have no accuracy"


def test_pages_of_a_model_without_a_report_do_without(engineer):
    for address in ("/runs/judge/", "/models/judge/"):
        answer = engineer.get(address)
        assert answer.status_code == 200
        assert b"What the reward model knows" not in answer.content


def test_every_row_that_a_run_left_out_is_listed_with_its_reason_and_keys():
    train = {"read": 40, "dropped": {"too long": 2}, "dropped_keys": {"too long": ["p[1]", "q"]}, "rankings": 10, "preference_pairs": 30}
    train |= {"tied_pairs": 0, "rankings_left_out": {"its weight is 0": 1}, "rankings_left_out_keys": {"its weight is 0": ["r7"]}}
    held_out = {
        "read": 4,
        "rankings": 1,
        "preference_pairs": 3,
        "tied_pairs": 1,
        "rankings_shortened": 1,
        "rankings_shortened_keys": ["r9"],
    }
    told = [(entry.name, entry.counts, entry.keys) for entry in ledger_of({"train": train, "held_out": held_out})]
    assert told == [
        ("completions read", (40, 4), ()),
        ("rankings of usable prompts", (10, 1), ()),
        ("rankings that lost a completion", (0, 1), ("r9",)),
        ("preference pairs", (30, 3), ()),
        ("tied pairs", (0, 1), ()),
        ("completions left out: too long", (2, 0), ("p[1]", "q")),
        ("rankings left out: its weight is 0", (1, 0), ("r7",)),
    ]


def test_runs_that_read_no_rankings_have_no_such_list():
    assert ledger_of(None) == ledger_of({"kind": "counts", "train": {"read": 3}}) == []


def test_a_job_moves_while_its_learning_curve_is_drawn():
    part = {"kind": "part", "share": 0.25, "step": 3, "steps": 10, "tokens_per_second": 50.0, "eta_seconds": 9.0}
    assert progress_of([part]) == {"step": 3, "steps": 10, "tokens_per_second": 50.0, "eta_seconds": 9.0}
    assert progress_of([part, {"kind": "start", "steps": 40, "first_step": 0}])["step"] == 0


def test_a_run_that_was_stopped_in_a_part_can_go_on(tmp_path):
    run = RunDirectory.create(tmp_path / "run", method="reward", seed=0, inputs={}, options={}, code={})
    assert not run.can_go_on()
    part = run.path / "curve" / "0.25"
    (part / "checkpoints" / "step-3").mkdir(parents=True)
    assert not run.can_go_on(), "half a checkpoint is none"
    (part / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    assert run.can_go_on()
