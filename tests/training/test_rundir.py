import json

import pytest

from training.errors import InputError
from training.rundir import RunDirectory, file_digest


def new(folder, **inputs):
    return RunDirectory.create(folder / "run", method="sft", seed=1, inputs=inputs, options={"epochs": 2})


def test_a_second_run_never_overwrites_the_first(tmp_path):
    new(tmp_path)
    with pytest.raises(InputError, match="already holds a run"):
        new(tmp_path)


def test_an_unknown_method_and_a_folder_without_configuration_are_refused(tmp_path):
    with pytest.raises(InputError, match="no method"):
        RunDirectory.create(tmp_path / "x", method="magic", seed=1, inputs={}, options={})
    with pytest.raises(InputError, match="cannot be read"):
        RunDirectory.open(tmp_path)


def test_a_changed_input_file_is_refused(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("a")
    run = new(tmp_path, data={"path": str(data), "digest": file_digest(data)})
    assert run.data_file() == data
    data.write_text("b")
    with pytest.raises(InputError, match="has changed"):
        run.data_file()
    with pytest.raises(InputError, match="held_out is missing"):
        run.data_file("held_out")


def test_configuration_survives_and_knows_the_code(tmp_path):
    new(tmp_path, model="m")
    run = RunDirectory.open(tmp_path / "run")
    assert (run.method, run.seed, run.inputs, run.options) == ("sft", 1, {"model": "m"}, {"epochs": 2})
    assert len(run.config["code"]["sources"]) == 64


def test_a_half_written_last_line_waits_and_is_read_once_whole(tmp_path):
    run = new(tmp_path)
    run.event("start", steps=2)
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"kind": "st')
    events, offset = run.read_events()
    assert [event["kind"] for event in events] == ["start"]
    with (run.path / "events.jsonl").open("a") as file:
        file.write('ep", "step": 1}\n')
    events, offset = run.read_events(offset)
    assert [event["step"] for event in events] == [1]
    assert run.read_events(offset) == ([], offset)


def test_a_line_cut_by_a_crash_does_not_swallow_the_next_one(tmp_path):
    run = new(tmp_path)
    (run.path / "events.jsonl").write_text('{"kind": "step", "st')
    RunDirectory.open(run.path).event("resume", step=3)
    events, _ = run.read_events()
    assert [event["kind"] for event in events] == ["warning", "resume"]


def test_numbers_that_json_cannot_say_become_null(tmp_path):
    run = new(tmp_path)
    run.event("step", metrics={"loss": float("nan"), "kl": [float("inf"), 1.0]})
    run.write_result(metrics={"loss": float("inf")}, artefacts={}, seconds=1.0)
    assert run.read_events()[0][0]["metrics"] == {"loss": None, "kl": [None, 1.0]}
    assert run.result()["metrics"] == {"loss": None}


def test_a_result_is_whole_or_absent_and_takes_an_old_error_away(tmp_path):
    run = new(tmp_path)
    assert run.result() is None
    run.write_error("it broke", "mend it", "trace")
    assert run.error() == {"error": "it broke", "remedy": "mend it", "detail": "trace"}
    run.write_result(metrics={"loss": 1.0}, artefacts={"model": "m"}, seconds=2.0, counts={"used": 1})
    assert run.result()["format"] == "rankloop.result/1"
    assert run.error() is None
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "result.json"]


def test_only_whole_checkpoints_are_found(tmp_path):
    run = new(tmp_path)
    assert run.newest_checkpoint() is None
    for name in ("step-2", "step-10", "step-11", ".step-12.new"):
        (run.checkpoints / name).mkdir(parents=True)
        if name != "step-11":
            (run.checkpoints / name / "manifest.json").write_text(json.dumps({}))
    assert run.newest_checkpoint().name == "step-10"


def test_processes_besides_the_first_write_nothing(tmp_path):
    run = new(tmp_path)
    run.is_writer = False
    run.event("step")
    run.write_result(metrics={}, artefacts={}, seconds=0.0)
    assert run.read_events() == ([], 0)
    assert run.result() is None
