"""Snapshots: immutable files that are the same bytes in every database, and that are found out when they are not whole."""

import hashlib
import json
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from annotation.errors import Refused
from annotation.models import Completion, Lease, Project, Prompt, Ranking, Snapshot, User
from annotation.pairs import pair_count, pairs_of, tie_count, ties_of
from annotation.services.leases import lease_next
from annotation.services.prompts import prompts_add
from annotation.services.rankings import ranking_amend, ranking_submit
from annotation.services.snapshots import snapshot_create
from tests.annotation import desk
from tests.annotation.files import folder_of, load, manifest_of, ranked, real, refused, rows_of, run, written

pytestmark = pytest.mark.django_db

# Keys and raters that databases sort differently by default: case, accents, punctuation, digits, other scripts, astral characters.
KEYS = ["b", "B", "a", "ab", "a-b", "a b", "ä", "z", "Z9", "10", "9", "é", "日本", "\U0001f600", "\uffee"]
GOLDEN = "69bfd0c05851967c"


def mixed(tmp_path: Path, seed: int = 0) -> Path:
    rows = []
    for number, key in enumerate(KEYS):
        for rater in ("ute", "Ute", "ärger", "r-1"):
            ranks = [1 + (number + place * len(rater)) % 3 for place in range(2 + number % 5)]
            rows.append(
                ranked(key, ranks, rater=rater, criteria={"honest": {"ranks": ranks[::-1]}}, flags={"0": ["b", "a"]}, duration_seconds=0.1)
            )
    random.Random(seed).shuffle(rows)
    return written(tmp_path / f"mixed-{seed}.jsonl", rows)


def anew(tmp_path: Path, seed: int) -> Snapshot:
    """Load the same rankings in another order into an emptied database whose row numbers went on."""
    Snapshot.objects.all().delete()
    Ranking.objects.all().delete()
    Project.objects.all().delete()
    User.objects.all().delete()
    load("p", mixed(tmp_path, seed))
    return snapshot_create(project=Project.objects.get(slug="p"))


def test_pairs_and_ties_follow_from_bands() -> None:
    """[[2], [0, 1], [3]]: 2 beats 0, 1, 3; 0 and 1 beat 3; 0 and 1 are tied. 5 pairs + 1 tie = 4 * 3 / 2."""
    bands = [[2], [0, 1], [3]]
    assert list(pairs_of(bands)) == [(2, 0), (2, 1), (2, 3), (0, 3), (1, 3)]
    assert list(ties_of(bands)) == [(0, 1)]
    assert (pair_count(bands), tie_count(bands)) == (5, 1)
    assert (pair_count([[0, 1, 2]]), tie_count([[0, 1, 2]])) == (0, 3)


def test_a_project_without_rankings_makes_no_snapshot() -> None:
    project = desk.project()
    desk.prompts(project)
    with pytest.raises(Refused, match="no rankings"):
        snapshot_create(project=project)
    assert not Snapshot.objects.exists()
    assert "no project" in refused("snapshot", "create", "nowhere")


def test_unknown_filters_are_refused(tmp_path: Path) -> None:
    load("p", written(tmp_path / "f.jsonl", [ranked("a", [1, 2])]))
    project = Project.objects.get()
    for filters in ({"rater": ["r1"]}, {"raters": ["nobody"]}, {"kinds": ["alien"]}, {"criterion": "charm"}, {"rounds": [7]}):
        with pytest.raises(Refused):
            snapshot_create(project=project, **filters)
    assert "There is no rater 'nobody'" in refused("snapshot", "create", "p", "--rater", "nobody")
    assert "write a date" in refused("snapshot", "create", "p", "--since", "yesterday")


def test_the_same_rankings_are_the_same_bytes_in_any_order_and_database(tmp_path: Path) -> None:
    """The digest is written down: SQLite and PostgreSQL, whatever their collation, must come to the same one."""
    first, second = anew(tmp_path, 1), anew(tmp_path, 2)
    assert first.digest == second.digest
    places = [(row["key"], row["rater"], row["ranking"]) for row in rows_of(second)]
    assert places == sorted(places)
    assert len(places) == len(KEYS) * 4
    assert second.digest.startswith(GOLDEN)


def test_every_row_has_the_fields_of_the_format(tmp_path: Path) -> None:
    row = ranked(
        "k", [2, 1, 2], criteria={"honest": {"ranks": [1, 2, 3]}}, displayed=[2, 0, 1], flags={"1": ["unsafe"]}, duration_seconds=3
    )
    row["completions"] = [{"text": "c", "policy": "P"}, {"text": "a", "policy": "Q"}, {"text": "b"}]
    load("p", written(tmp_path / "f.jsonl", [row]))
    snapshot = snapshot_create(project=Project.objects.get())
    (found,) = rows_of(snapshot)
    prompt = Prompt.objects.get()
    assert found == {
        "ranking": str(Ranking.objects.get().uid),
        "revision": 1,
        "key": "k",
        "prompt": prompt.digest,
        "split": prompt.split,
        "round": 0,
        "messages": [{"role": "user", "content": "Question k?"}],
        "completions": [{"text": "a", "policy": "Q"}, {"text": "b", "policy": ""}, {"text": "c", "policy": "P"}],
        "bands": [[0], [1, 2]],
        "displayed": [1, 2, 0],
        "criteria": {"honest": [[2], [0], [1]]},
        "flags": {"0": ["unsafe"]},
        "rater": "r1@p",
        "rater_kind": "imported",
        "duration_seconds": 3.0,
    }


def test_the_order_of_completions_says_nothing_of_rank_or_screen(tmp_path: Path) -> None:
    load("p", written(tmp_path / "f.jsonl", [ranked("k", [1, 2, 3]), ranked("k", [3, 2, 1], rater="r2", displayed=[1, 2, 0])]))
    one, other = rows_of(snapshot_create(project=Project.objects.get()))
    assert one["completions"] == other["completions"]
    assert one["bands"] == other["bands"][::-1]


def test_the_manifest_counts_by_hand(tmp_path: Path) -> None:
    """a: two raters, K=3, [1,2,2] has 2 pairs 1 tie, [1,1,1] has 3 ties. b: one rater, K=2: 1 pair. One prompt may be held out, or none."""
    load("p", written(tmp_path / "f.jsonl", [ranked("a", [1, 2, 2]), ranked("a", [1, 1, 1], rater="r2"), ranked("b", [2, 1])]))
    manifest = manifest_of(snapshot_create(project=Project.objects.get()))
    counts = manifest["counts"]
    total = {name: counts[name] for name in ("rankings", "prompts", "completions", "raters", "bands", "pairs", "ties")}
    assert total == {"rankings": 3, "prompts": 2, "completions": 5, "raters": 2, "bands": 5, "pairs": 3, "ties": 4}
    for name in ("rankings", "prompts", "completions", "bands", "pairs", "ties"):
        assert counts["train"][name] + counts["held_out"][name] == total[name]
    assert manifest["raters"] == {"r1@p": 2, "r2@p": 1}
    assert (manifest["format"], manifest["project"], manifest["held_out_percent"]) == ("rankloop.snapshot/1", "p", 10)
    assert (manifest["filters"], manifest["left_out"]) == ({}, {})


def test_only_the_current_revision_goes_in() -> None:
    project = desk.project(overlap=1)
    anna = desk.member(project, "anna")
    desk.prompts(project, number=1)
    lease = lease_next(project=project, rater=anna)
    ranking, _ = ranking_submit(rater=anna, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))
    before = snapshot_create(project=project)
    ranking_amend(rater=anna, ranking_uid=ranking.uid, client_id=uuid.uuid4(), bands=desk.in_order(lease)[::-1])
    after = snapshot_create(project=project)
    assert [row["revision"] for row in rows_of(after)] == [2]
    assert [row["revision"] for row in rows_of(before)] == [1]
    assert before.digest != after.digest


def test_filters_choose_rankings_and_stand_in_the_manifest(tmp_path: Path) -> None:
    rows = [ranked(key, [1, 2], rater=rater) for key in "ab" for rater in ("r1", "r2")]
    rows.append(ranked("c", [1, 2], criteria={"honest": {"ranks": [2, 1]}}, round=3))
    load("p", written(tmp_path / "f.jsonl", rows))
    project = Project.objects.get()
    anna = desk.member(project, "anna")
    lease = lease_next(project=project, rater=anna)
    ranking_submit(rater=anna, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))

    def raters(**filters: Any) -> list[str]:
        return [row["rater"] for row in rows_of(snapshot_create(project=project, **filters))]

    assert raters(raters=["r2"]) == ["r2@p", "r2@p"]
    assert "r1@p" not in raters(exclude_raters=["r1@p"])
    assert raters(kinds=["human"]) == ["anna"]
    assert raters(rounds=[3]) == ["r1@p"]
    assert raters(since=Ranking.objects.get(rater=anna).created_at) == ["anna"]
    turned = snapshot_create(project=project, criterion="honest")
    assert rows_of(turned)[0]["bands"] == [[1], [0]]
    assert manifest_of(turned)["left_out"] == {"no_such_criterion": 5}
    assert manifest_of(turned)["filters"] == {"criterion": "honest"}
    assert run("snapshot", "create", "p", "--kind", "human", "--since", "2020-01-01", "--exclude-rater", "r1")[0]


def test_rankings_without_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    row = ranked("t", [1, 2])
    bare = {"key": "n", "prompt": "q", "completions": [{"policy": "x"}, {"policy": "y"}], "ranks": [1, 2]}
    load("p", written(tmp_path / "f.jsonl", [row, bare]))
    snapshot = snapshot_create(project=Project.objects.get())
    assert manifest_of(snapshot)["left_out"] == {"no_texts": 1}
    assert [found["key"] for found in rows_of(snapshot)] == ["t"]


def test_the_same_snapshot_twice_is_one_row_and_one_folder(tmp_path: Path) -> None:
    load("p", written(tmp_path / "f.jsonl", [ranked("a", [1, 2])]))
    project = Project.objects.get()
    first = snapshot_create(project=project)
    assert snapshot_create(project=project).pk == first.pk
    folder = folder_of(first)
    assert [path.name for path in sorted(folder.iterdir())] == ["manifest.json", "rankings.jsonl"]
    assert all(path.stat().st_mode & 0o222 == 0 for path in folder.iterdir())
    assert not list(folder.parent.glob(".new-*"))
    assert hashlib.sha256((folder / "rankings.jsonl").read_bytes()).hexdigest() == first.digest == folder.name


def test_a_snapshot_whose_file_was_damaged_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    load("p", written(tmp_path / "f.jsonl", [ranked("a", [1, 2], rater="damage")]))
    project = Project.objects.get()
    folder = folder_of(snapshot_create(project=project))
    (folder / "rankings.jsonl").chmod(0o644)
    (folder / "rankings.jsonl").write_text("{}\n")
    with pytest.raises(Refused, match="damaged"):
        snapshot_create(project=project)


def changed(tmp_path: Path, change: Any) -> Path:
    """A copy of a snapshot in which `change(rows, manifest)` was made, the digest set right again."""
    load("p", mixed(tmp_path))
    snapshot = snapshot_create(project=Project.objects.get())
    rows, manifest = rows_of(snapshot), manifest_of(snapshot)
    change(rows, manifest)
    content = b"".join(json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n" for row in rows)
    manifest["digest"] = hashlib.sha256(content).hexdigest()
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "rankings.jsonl").write_bytes(content)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def spoiled(tmp_path: Path, change: Any) -> str:
    """What `verify` says of it."""
    return refused("snapshot", "verify", changed(tmp_path, change))


def test_stated_strengths_and_weights_are_part_of_the_format(tmp_path: Path) -> None:
    def state(rows: Any, manifest: Any) -> None:
        rows[0].update(weight=0.5, strengths=[2] * (len(rows[0]["bands"]) - 1))

    assert "whole" in run("snapshot", "verify", changed(tmp_path, state))[0]


def swap_split(rows: Any, manifest: Any) -> None:
    rows[0]["split"] = "train" if rows[0]["split"] == "held_out" else "held_out"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_split, "line 1: is in split"),
        (lambda rows, manifest: rows[1]["messages"][0].update(content="Other?"), "line 2: `prompt` is not the SHA-256"),
        (lambda rows, manifest: rows[2]["bands"].pop(), "line 3: bands does not name each"),
        (lambda rows, manifest: rows[2]["displayed"].pop(), "line 3: displayed does not name each"),
        (lambda rows, manifest: rows[2]["completions"].reverse(), "completions do not stand in order"),
        (lambda rows, manifest: rows.reverse(), "does not stand in order of (key, rater, ranking)"),
        (lambda rows, manifest: rows[3].pop("rater_kind"), "line 4: its fields differ from the format: rater_kind"),
        (lambda rows, manifest: rows[3].pop("bands"), "cannot be read as a ranking"),
        (lambda rows, manifest: rows[0].update(weight=-1), "line 1: weight is not a finite number"),
        (lambda rows, manifest: rows[0].update(strengths=[1] * 20), "line 1: strengths are not"),
        (lambda rows, manifest: manifest["counts"].update(pairs=1), "counts: recounted"),
        (lambda rows, manifest: manifest["raters"].popitem(), "raters: recounted"),
        (lambda rows, manifest: manifest.update(held_out_percent=90), "is in split"),
        (lambda rows, manifest: manifest.update(format="other/1"), "not a manifest of format"),
    ],
)
def test_verify_says_what_is_broken(tmp_path: Path, change: Any, reason: str) -> None:
    assert reason in spoiled(tmp_path, change)


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    load("p", mixed(tmp_path))
    folder = folder_of(snapshot_create(project=Project.objects.get()))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    (copy / "rankings.jsonl").write_bytes((folder / "rankings.jsonl").read_bytes().replace(b"Question", b"question", 1))
    assert "digest: rankings.jsonl has" in refused("snapshot", "verify", copy)
    (copy / "rankings.jsonl").unlink()
    assert "There is no snapshot" in refused("snapshot", "verify", copy)
    assert "There is no snapshot" in refused("snapshot", "verify", "../../etc")


def test_verify_takes_a_digest_its_beginning_or_a_path(tmp_path: Path) -> None:
    load("p", mixed(tmp_path))
    snapshot = snapshot_create(project=Project.objects.get())
    folder = folder_of(snapshot)
    for name in (snapshot.digest, snapshot.digest[:12], folder, folder / "rankings.jsonl"):
        assert "whole. 60 rankings, 15 prompts, none in both splits" in run("snapshot", "verify", name)[0]
    assert snapshot.digest[:16] in run("snapshot", "list", "p")[0]


def test_a_snapshot_loads_back_as_the_same_rankings(tmp_path: Path) -> None:
    load("p", mixed(tmp_path))
    folder = folder_of(snapshot_create(project=Project.objects.get(slug="p")))
    said = load("again", folder / "rankings.jsonl", "--as", "rankings", "--rejects", tmp_path / "rejects")
    assert "60 rankings" in said
    assert "not used" not in said
    again = rows_of(snapshot_create(project=Project.objects.get(slug="again")))
    same = ("key", "prompt", "split", "messages", "completions", "bands", "displayed", "criteria", "flags")
    original = [json.loads(line) for line in (folder / "rankings.jsonl").read_bytes().splitlines()]
    assert [[row[name] for name in same] for row in again] == [[row[name] for name in same] for row in original]


def test_no_real_prompt_is_in_both_splits() -> None:
    load("p", real("rankings/e2e_quality_k5.jsonl"))
    snapshot = snapshot_create(project=Project.objects.get())
    splits: dict[str, set[str]] = {}
    for row in rows_of(snapshot):
        splits.setdefault(row["prompt"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    assert (snapshot.counts["rankings"], snapshot.counts["prompts"], snapshot.counts["ties"]) == (2439, 1155, 12121)
    assert snapshot.counts["pairs"] + snapshot.counts["ties"] == 2439 * 10
    assert "whole" in run("snapshot", "verify", snapshot.digest)[0]


def test_a_ranking_of_a_completion_that_is_gone_stops_the_snapshot() -> None:
    project = desk.project(overlap=1)
    anna = desk.member(project, "anna")
    prompts_add(
        project=project, items=[{"key": "k", "messages": [{"role": "user", "content": "Q"}], "completions": [{"text": "a"}, {"text": "b"}]}]
    )
    lease = lease_next(project=project, rater=anna)
    ranking_submit(rater=anna, token=lease.token, client_id=uuid.uuid4(), bands=desk.in_order(lease))
    Completion.objects.filter(text="a").delete()
    with pytest.raises(Refused, match="which its prompt does not have"):
        snapshot_create(project=project)
    assert Lease.objects.get().state == "done"
