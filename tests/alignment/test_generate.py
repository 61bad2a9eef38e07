"""Generation: what is written, its lineage, and that neither a crash nor the number of processes changes a text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment import generate
from alignment.options import GenerateOptions
from tests.alignment.letters import write_models, write_prompts
from training.errors import InputError
from training.options import OptionError, parse_options
from training.rundir import RunDirectory, file_digest

HOUSE = Path(__file__).resolve().parents[2]


def make(folder: Path, home: Path, *, data: Path | None = None, seed: int = 0, **options) -> RunDirectory:
    inputs = {"model": str(home / "policy"), "data": str(data or home / "prompts.jsonl")}
    chosen = {"samples": 3, "max_completion_tokens": 8, **options}
    return RunDirectory.create(folder, method="generate", seed=seed, inputs=inputs, options=chosen)


def rows_of(run: RunDirectory) -> list[dict]:
    return [json.loads(line) for line in (run.path / "completions.jsonl").open(encoding="utf-8")]


def test_options_that_cannot_be_meant_are_refused():
    for wrong in ({"greedy": True, "samples": 2}, {"temperature": 0.0}, {"top_p": 0.0}, {"samples": 0}, {"splits": "all"}):
        with pytest.raises(OptionError):
            parse_options(GenerateOptions, wrong)


def test_a_split_without_prompts_is_refused(home: Path, tmp_path: Path):
    lines = [line for line in (home / "prompts.jsonl").open() if json.loads(line)["split"] == "train"]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match="held_out"):
        generate.run(make(tmp_path / "run", home, data=tmp_path / "train.jsonl", split="held_out"))


def test_too_many_prompts_over_length_are_refused(home: Path, tmp_path: Path):
    with pytest.raises(InputError, match="prompts cannot be used"):
        generate.run(make(tmp_path / "run", home, max_prompt_tokens=4))


def test_each_line_says_what_was_asked_who_answered_and_how(home: Path, tmp_path: Path):
    run = make(tmp_path / "run", home, temperature=0.9)
    generate.run(run)
    rows, result = rows_of(run), run.result()
    prompts = [json.loads(line) for line in (home / "prompts.jsonl").open()]
    assert [(row["key"], row["sample"]) for row in rows] == [(prompt["key"], sample) for prompt in prompts for sample in range(3)]
    assert [row["messages"] for row in rows[::3]] == [prompt["messages"] for prompt in prompts]
    for row in rows:
        assert row["policy"] == str(home / "policy")
        assert "<" not in row["text"]
        assert len(row["text"]) <= row["sampling"]["tokens"] - row["sampling"]["finished"]  # special tokens leave no text
        assert row["sampling"].keys() == {"temperature", "seed", "tokens", "finished"}
        assert row["logprob_nats"] < 0
    weights = result["artefacts"]["policy"]["weights"]
    assert weights == {"model.safetensors": file_digest(home / "policy" / "model.safetensors")}
    assert result["artefacts"]["completions_digest"] == file_digest(run.path / "completions.jsonl")


def test_counts_of_unfinished_empty_and_equal_texts_are_those_of_the_file(home: Path, tmp_path: Path):
    run = make(tmp_path / "run", home, samples=8, max_completion_tokens=2)
    generate.run(run)
    rows, result = rows_of(run), run.result()
    unfinished = sum(not row["sampling"]["finished"] for row in rows)
    empty = sum(not row["text"].strip() for row in rows)
    distinct = len({(row["key"], row["text"]) for row in rows})
    assert 0 < unfinished < len(rows)
    assert empty > 0
    assert result["counts"]["completions"] == {
        "completions": 192,
        "unfinished": unfinished,
        "empty": empty,
        "duplicates": 192 - distinct,
    }
    assert result["metrics"]["duplicate_share"] == pytest.approx((192 - distinct) / 192)


def test_a_prompt_of_several_rankings_and_rounds_is_asked_once(home: Path, tmp_path: Path):
    messages = [{"role": "user", "content": "abc"}]
    ranking = {
        "completions": [{"text": "a", "policy": "x"}, {"text": "b", "policy": "y"}],
        "bands": [[0], [1]],
        "prompt": "d" * 64,
        "split": "held_out",
        "messages": messages,
    }
    lines = [{**ranking, "key": key, "rater": rater} for key in ("p1", "p1~r1") for rater in ("r", "s")]
    (tmp_path / "rankings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = make(tmp_path / "run", home, data=tmp_path / "rankings.jsonl", split="held_out")
    generate.run(run)
    assert [row["key"] for row in rows_of(run)] == ["p1"] * 3


def test_two_policies_under_one_seed_do_not_write_with_the_same_luck(home: Path, tmp_path: Path):
    write_models(tmp_path / "other", spread=0.0501)
    one, other = make(tmp_path / "one", home), make(tmp_path / "two", tmp_path / "other", data=home / "prompts.jsonl")
    generate.run(one)
    generate.run(other)
    equal = sum(mine["text"] == theirs["text"] for mine, theirs in zip(rows_of(one), rows_of(other), strict=True))
    assert equal < 20


def test_what_a_crash_left_behind_is_kept_but_for_its_last_lines(home: Path, tmp_path: Path):
    """A line cut short, a prompt half done, and a text with a line separator that is none in JSON lines."""
    partial = tmp_path / "partial.jsonl"
    rows = [{"key": key, "sample": sample, "text": "a\u2028b\x85"} for key in ("p0", "p1") for sample in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    partial.write_text("".join(lines[:3]) + lines[3][:10], encoding="utf-8")
    assert generate.resume_at(partial, ["p0", "p1"], 2) == 1
    assert partial.read_text(encoding="utf-8") == "".join(lines[:2])
    assert generate.resume_at(partial, ["p7", "p1"], 2) == 0


@pytest.mark.training
def test_killed_or_on_two_processes_the_texts_are_the_same(home: Path, tmp_path: Path):
    """Enough prompts for several blocks. The log-probabilities of another batch shape agree to float32's last digits."""
    prompts = write_prompts(tmp_path / "many.jsonl", count=36 * 5)
    rows = [json.loads(line) for line in prompts.open()]
    unique = {row["messages"][0]["content"]: row for row in rows}
    options = {"data": prompts, "samples": 16, "max_completion_tokens": 24}
    whole = make(tmp_path / "whole", home, **options)
    generate.run(whole)
    expected = rows_of(whole)
    assert len(expected) == 16 * len(unique)

    # What SIGKILL leaves behind: some prompts, a few samples of another, half a line.
    lines = (whole.path / "completions.jsonl").read_text(encoding="utf-8").split("\n")
    killed = make(tmp_path / "killed", home, **options)
    (killed.path / generate.PARTIAL).write_text("\n".join([*lines[:150], lines[150][:20]]), encoding="utf-8")
    generate.run(killed)
    assert [event["step"] for event in killed.read_events()[0] if event["kind"] == "resume"] == [9]
    assert [row["text"] for row in rows_of(killed)] == [row["text"] for row in expected]
    assert killed.result()["counts"] == whole.result()["counts"]

    two = make(tmp_path / "two", home, **options)
    assert start(two, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2").wait(180) == 0
    for mine, theirs in zip(rows_of(two), expected, strict=True):
        assert mine["text"] == theirs["text"]
        assert mine["logprob_nats"] == pytest.approx(theirs["logprob_nats"], abs=1e-4)


def start(run: RunDirectory, *launcher: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, "-m", "alignment", str(run.path)]
    with (run.path / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=HOUSE, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
