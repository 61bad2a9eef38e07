"""Exports for other tools: TRL's two shapes, ties left out and counted, each pair tagged with its ranking."""

import json
from pathlib import Path
from typing import Any

import pytest

from annotation.models import Project, Ranking, Snapshot
from annotation.services.snapshots import snapshot_create
from annotation.snapshot_files import plain_prompt
from tests.annotation.files import folder_of, load, ranked, real, refused, run, written

pytestmark = pytest.mark.django_db
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Three pairs: two from `a` (best of three, the others tied), none from `t` (all tied), one from the conversation `c`."""
    rows = [ranked("a", [2, 1, 2]), ranked("t", [1, 1]), {**ranked("c", [1, 2]), "prompt": CHAT}]
    load("p", written(tmp_path / "f.jsonl", rows))
    return snapshot_create(project=Project.objects.get())


def exported(snapshot: Snapshot, path: Path, *words: Any) -> tuple[list[dict[str, Any]], str]:
    _, said = run("snapshot", "export", snapshot.digest, "-o", path, *words)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()], said


def test_unknown_snapshots_and_folders_are_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    assert "There is no snapshot" in refused("snapshot", "export", "ffffffff", "-o", tmp_path / "x")
    assert "Cannot write" in refused("snapshot", "export", snapshot.digest, "-o", tmp_path / "absent" / "x")
    assert "invalid choice" in refused("snapshot", "export", snapshot.digest, "--format", "csv")


def test_ties_make_no_pair_and_are_counted(snapshot: Snapshot, tmp_path: Path) -> None:
    rows, said = exported(snapshot, tmp_path / "out.jsonl", "--format", "trl")
    assert "3 rows from 3 rankings; 2 ties left out" in said
    assert [(row["key"], row["chosen"], row["rejected"]) for row in rows] == [
        ("a", "a answer 1", "a answer 0"),
        ("a", "a answer 1", "a answer 2"),
        ("c", "c answer 0", "c answer 1"),
    ]


def test_each_pair_is_tagged_with_its_ranking_and_rater(snapshot: Snapshot, tmp_path: Path) -> None:
    for shape in ("trl", "trl-conversational"):
        for row in exported(snapshot, tmp_path / "out.jsonl", "--format", shape)[0]:
            ranking = Ranking.objects.get(uid=row["ranking"])
            assert (row["key"], row["rater"], row["split"]) == (ranking.prompt.key, "r1@p", ranking.prompt.split)


def test_the_conversational_shape_keeps_the_turns(snapshot: Snapshot, tmp_path: Path) -> None:
    row = exported(snapshot, tmp_path / "out.jsonl")[0][-1]
    assert row["prompt"] == CHAT
    assert row["chosen"] == [{"role": "assistant", "content": "c answer 0"}]
    assert row["rejected"] == [{"role": "assistant", "content": "c answer 1"}]


def test_the_standard_shape_writes_a_conversation_turn_by_turn() -> None:
    assert plain_prompt(CHAT[:1]) == "Hi"
    assert plain_prompt(CHAT) == "User: Hi\n\nAssistant: Hello.\n\nUser: Why?\n\nAssistant: "


def test_a_split_is_exported_alone_and_both_make_the_whole(tmp_path: Path) -> None:
    load("p", real("rankings/squality_k3.jsonl"))
    snapshot = snapshot_create(project=Project.objects.get())
    whole, _ = exported(snapshot, tmp_path / "all.jsonl")
    parts = {split: exported(snapshot, tmp_path / f"{split}.jsonl", "--split", split)[0] for split in ("train", "held_out")}
    assert all(row["split"] == split for split, rows in parts.items() for row in rows)
    assert len(parts["train"]) + len(parts["held_out"]) == len(whole) == 900
    prompts = [{json.dumps(row["prompt"]) for row in rows} for rows in parts.values()]
    assert not prompts[0] & prompts[1]


def test_rankings_are_exported_as_they_stand(snapshot: Snapshot, tmp_path: Path) -> None:
    _, said = exported(snapshot, tmp_path / "out.jsonl", "--format", "rankings")
    assert "3 rows from 3 rankings; 2 ties kept" in said
    assert (tmp_path / "out.jsonl").read_bytes() == (folder_of(snapshot) / "rankings.jsonl").read_bytes()


def test_the_export_goes_to_standard_output_too(snapshot: Snapshot, capfdbinary: Any) -> None:
    run("snapshot", "export", snapshot.digest[:12], "--format", "trl")
    assert len(capfdbinary.readouterr().out.splitlines()) == 3


def test_an_export_loads_back_as_the_same_pairs(snapshot: Snapshot, tmp_path: Path) -> None:
    for shape in ("trl", "trl-conversational"):
        path = tmp_path / f"{shape}.jsonl"
        rows, _ = exported(snapshot, path, "--format", shape)
        for number, row in enumerate(rows):
            row["key"] = f"{number}"
        load(f"from-{shape}", written(path, rows))
        assert Ranking.objects.filter(project__slug=f"from-{shape}").count() == 3


@pytest.mark.parametrize(("shape", "conversational"), [("trl", False), ("trl-conversational", True)])
def test_trl_and_datasets_accept_both_shapes(snapshot: Snapshot, tmp_path: Path, shape: str, conversational: bool) -> None:
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    path = tmp_path / "out.jsonl"
    rows, _ = exported(snapshot, path, "--format", shape)
    stored = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(stored) == len(rows)
    for row, original in zip(stored, rows, strict=True):
        assert data_utils.is_conversational(row) == conversational
        assert data_utils.maybe_extract_prompt(dict(row)) == row
        assert row["chosen"] == original["chosen"]
    # The implicit shape, which TRL parts again by what both sides begin with.
    implicit = {name: original["prompt"] + original[name] for name in ("chosen", "rejected")}
    assert data_utils.extract_prompt(implicit)["rejected"] != implicit["rejected"]
