"""The cache of log-probabilities under the reference: what is computed, what is reused, and that results never depend on which."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import alignment.dpo
import alignment.reference_logps as reference_module
from alignment.reference_logps import REFERENCE_FILE, LogpCache, cache_folder, model_digest, row_digest
from tests.training.tiny import REPOSITORY, events, llama, make_run, snapshot, start, weights, write_lines
from training.errors import Stopped
from training.language_model import Lora, load_policy
from training.pack import Row

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl", prompts=16, raters=1, size=4, held_out=4)


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch):
    monkeypatch.delenv("RANKLOOP_CACHE", raising=False)


def finished(folder, model, data, *, reference=None, **options):
    run = make_run(folder, "dpo", model=model, data=data, **{"batch_rankings": 8, "max_steps": 2, "learning_rate": 1e-3, **options})
    if reference:
        run.inputs["reference"] = str(reference)
    alignment.dpo.run(run)
    return run


def counted(run):
    counts = run.result()["counts"]
    assert counts == {name: events(run, "counts")[0][name] for name in counts}
    return counts["reference_reused"], counts["reference_computed"]


def tables(folder):
    return sorted((folder / "cache" / "logps").glob("*/*.safetensors"))


def used(run):
    return load_file(run.path / REFERENCE_FILE)["logps"]


def test_a_second_run_computes_nothing_and_is_the_same_bit_by_bit(tmp_path, model, data):
    one, two = (finished(tmp_path / "runs" / name, model, data) for name in ("one", "two"))
    rows = counted(one)[1]
    assert rows > 30
    assert counted(one) == (0, rows)
    assert counted(two) == (rows, 0)
    assert len(tables(tmp_path)) == 1
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())
    assert one.result()["metrics"] == two.result()["metrics"]


def test_a_sweep_over_lora_beta_and_losses_shares_one_reference(tmp_path, model, data):
    """The adapter switched off is the starting model, and so is that model named as reference."""
    rows = counted(finished(tmp_path / "runs" / "full", model, data))[1]
    for name, options in {
        "lora": {"lora_rank": 4},
        "beta": {"beta": 0.5},
        "simpo": {"loss": "simpo"},
        "named": {"reference": model},
    }.items():
        assert counted(finished(tmp_path / "runs" / name, model, data, **options)) == (rows, 0), name


def test_lora_that_fills_the_cache_gives_what_the_full_model_gives(tmp_path, model, data):
    lora = finished(tmp_path / "a" / "runs" / "lora", model, data, lora_rank=4)
    full = finished(tmp_path / "b" / "runs" / "full", model, data)
    assert torch.equal(used(lora), used(full))
    assert tables(tmp_path / "a")[0].parent.name == tables(tmp_path / "b")[0].parent.name


def test_only_what_is_missing_is_computed_and_a_warm_cache_changes_no_bit(tmp_path, model, data):
    """Half of the prompts first, then all: the same values and weights as with a cold cache."""
    half = write_lines(tmp_path / "half.jsonl", [json.loads(line) for line in data.read_text().splitlines()[::2]])
    first = finished(tmp_path / "warm" / "runs" / "half", model, half)
    warm = finished(tmp_path / "warm" / "runs" / "all", model, data)
    cold = finished(tmp_path / "cold" / "runs" / "all", model, data)
    reused, computed = counted(warm)
    assert reused == counted(first)[1] > 0
    assert computed == counted(cold)[1] - reused > 0
    assert torch.equal(used(warm), used(cold))
    assert all(torch.equal(tensor, weights(cold)[name]) for name, tensor in weights(warm).items())


def test_another_model_or_dtype_has_its_own_values(tmp_path, model, data):
    finished(tmp_path / "runs" / "one", model, data)
    other = llama(tmp_path / "other", seed=9)
    assert counted(finished(tmp_path / "runs" / "two", other, data))[0] == 0
    assert counted(finished(tmp_path / "runs" / "three", model, data, reference=other))[1] == 0
    assert counted(finished(tmp_path / "runs" / "rough", model, data, dtype="bfloat16"))[0] == 0


def test_a_run_that_resumes_reads_its_own_file_whatever_became_of_the_cache(tmp_path, model, data):
    run = finished(tmp_path / "runs" / "run", model, data)
    before, counts = weights(run), counted(run)
    stamp = (run.path / REFERENCE_FILE).stat().st_mtime_ns
    for file in tables(tmp_path):
        file.unlink()
    (run.path / "result.json").unlink()
    alignment.dpo.run(run)
    assert (run.path / REFERENCE_FILE).stat().st_mtime_ns == stamp
    assert not tables(tmp_path)
    assert counted(run) == counts
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty"])
def test_a_corrupt_file_is_passed_over_with_a_warning(tmp_path, model, data, harm):
    rows = counted(finished(tmp_path / "runs" / "one", model, data))[1]
    (file,) = tables(tmp_path)
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-20], "flipped": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[harm])
    two = finished(tmp_path / "runs" / "two", model, data)
    assert counted(two) == (0, rows)
    assert any(file.name in event["text"] for event in events(two, "warning"))
    assert counted(finished(tmp_path / "runs" / "three", model, data)) == (rows, 0)


def test_a_pass_that_is_stopped_goes_on_where_it_was_and_tells_how_far_it_is(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(reference_module, "UNITS_AT_A_TIME", 4)
    monkeypatch.setattr(reference_module, "stop_requested", lambda: True)
    run = make_run(tmp_path / "runs" / "run", "dpo", model=model, data=data, batch_rankings=8, max_steps=2, learning_rate=1e-3)
    with pytest.raises(Stopped, match="prompt 4 of 16"):
        alignment.dpo.run(run)
    assert [(event["what"], event["step"], event["steps"]) for event in events(run, "part")] == [("reference", 4, 16)]
    assert events(run, "end")[0]["status"] == "stopped"
    monkeypatch.undo()
    monkeypatch.delenv("RANKLOOP_CACHE", raising=False)
    alignment.dpo.run(run)
    assert events(run, "part")[-1]["steps"] == 12
    whole = finished(tmp_path / "cold" / "runs" / "run", model, data)
    assert torch.equal(used(run), used(whole))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(run).items())


def test_a_cache_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path, model, data, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RANKLOOP_CACHE", str(tmp_path / "file"))
    run = finished(tmp_path / "runs" / "run", model, data)
    assert run.result() is not None
    assert any("could not be kept" in event["text"] for event in events(run, "warning"))


def test_where_the_cache_lies(tmp_path, model, data, monkeypatch):
    alone = finished(tmp_path / "somewhere" / "run", model, data)
    assert cache_folder(alone) is None
    assert not list(tmp_path.rglob("cache"))
    assert (alone.path / REFERENCE_FILE).is_file()
    assert cache_folder(make_run(tmp_path / "runs" / "x", "dpo", model=model, data=data)) == tmp_path / "cache"
    monkeypatch.setenv("RANKLOOP_CACHE", str(tmp_path / "shared"))
    assert cache_folder(alone) == tmp_path / "shared"


def test_two_processes_share_the_work_and_the_cache(tmp_path, model, data):
    two = make_run(tmp_path / "runs" / "two", "dpo", model=model, data=data, batch_rankings=8, max_steps=2, learning_rate=1e-3)
    child = start(two, "--processes", "2")
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    alone = finished(tmp_path / "cold" / "runs" / "one", model, data)
    assert counted(two) == counted(alone)
    assert torch.equal(used(two), used(alone)), "a prompt's rows are computed together, whoever does it"
    assert counted(finished(tmp_path / "runs" / "again", model, data))[1] == 0


WRITER = """
import sys
from pathlib import Path
from alignment.reference_logps import LogpCache
cache = LogpCache(Path(sys.argv[1]), lambda text: sys.exit(text))
for number in range(40):
    cache.write({bytes([int(sys.argv[2]), number]) + bytes(30): float(number), bytes([9, number]) + bytes(30): float(sys.argv[2])})
    cache.read(set())
"""


def test_jobs_that_write_at_once_lose_nothing_and_read_nothing_half_written(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "logps"), str(one)], cwd=REPOSITORY) for one in (1, 2)]
    assert [child.wait(timeout=240) for child in children] == [0, 0]
    heard = []
    cache = LogpCache(tmp_path / "logps", heard.append)
    wanted = {bytes([one, number]) + bytes(30) for one in (1, 2, 9) for number in range(40)}
    known = cache.read(wanted)
    assert set(known) == wanted
    assert not heard
    assert all(known[bytes([one, number]) + bytes(30)] == number for one in (1, 2) for number in range(40))
    assert known == cache.read(wanted)
    assert not list((tmp_path / "logps").glob(".*"))


def test_a_row_is_known_by_its_tokens_and_where_the_completion_begins():
    assert row_digest(Row([1, 2], [3])) == row_digest(Row((1, 2), (3,)))
    assert len({row_digest(Row(*row)) for row in (([1, 2], [3]), ([1], [2, 3]), ([1, 2], [4]), ([2, 1], [3]))}) == 4


def test_a_model_is_known_by_its_weights_and_configuration(tmp_path, model):
    one = load_policy(model)
    digest = model_digest(one)
    assert model_digest(load_policy(model, lora=Lora(2, 4.0))) == digest
    with torch.no_grad():
        one.model.norm.weight[0] += 1e-6
    assert model_digest(one) != digest
    other = load_policy(model)
    other.config.rms_norm_eps *= 2
    assert model_digest(other) != digest
