"""Snapshot files: write, verify, export (docs/data-flow.md, section 1). Files only: no database, and no row is held longer than needed."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from annotation.content import HELD_OUT, TRAIN, ContentRefused, canonical, messages_checked, prompt_digest, split_of
from annotation.errors import Refused
from annotation.pairs import pair_count, pairs_of, tie_count

FORMAT = "rankloop.snapshot/1"
COUNTED = ("rankings", "prompts", "completions", "raters", "bands", "pairs", "ties")
SPLITS = (TRAIN, HELD_OUT)
EXPORTS = ("trl", "trl-conversational", "rankings")
ROW_FIELDS = {"ranking", "revision", "key", "prompt", "split", "round", "messages", "completions", "bands", "displayed", "criteria"}
ROW_FIELDS |= {"flags", "rater", "rater_kind", "duration_seconds"}
OPTIONAL_FIELDS = {"strengths", "weight"}


class Tally:
    """Counts rows that come sorted by key. Raters are named once each; everything else is a number."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {split: Counter(dict.fromkeys(COUNTED, 0)) for split in SPLITS}
        self.raters: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.key: str | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        counts = self.counts[row["split"]]
        counts["rankings"] += 1
        counts["bands"] += len(row["bands"])
        counts["pairs"] += pair_count(row["bands"])
        counts["ties"] += tie_count(row["bands"])
        self.raters[row["split"]][row["rater"]] += 1
        if row["key"] != self.key:
            self.key = row["key"]
            counts["prompts"] += 1
            counts["completions"] += len(row["completions"])

    def rater_counts(self) -> dict[str, int]:
        total = self.raters[TRAIN] + self.raters[HELD_OUT]
        return {name: total[name] for name in sorted(total)}

    def summary(self) -> dict[str, Any]:
        """All, and by split. A rater who ranked in both splits is one rater in all."""
        for split in SPLITS:
            self.counts[split]["raters"] = len(self.raters[split])
        total: dict[str, Any] = {name: sum(self.counts[split][name] for split in SPLITS) for name in COUNTED}
        total["raters"] = len(self.rater_counts())
        return {**total, **{split: dict(self.counts[split]) for split in SPLITS}}


def snapshot_write(root: Path, rows: Iterable[Mapping[str, Any]], manifest: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Write rows, then the manifest, beside their place; name the folder by the digest and move it there. Returns (digest, manifest).

    Args:    rows sorted by (key, rater, ranking);  manifest: called after the last row, for what is known only then.
    Raises:  Refused when there are no rows, or when the folder is there already and damaged.
    """
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        tally, digest = Tally(), hashlib.sha256()
        with (work / "rankings.jsonl").open("wb") as stream:
            for row in rows:
                line = canonical(row) + b"\n"
                digest.update(line)
                stream.write(line)
                tally.add(row)
            _to_disk(stream)
        name = digest.hexdigest()
        whole = {
            "format": FORMAT,
            "digest": name,
            "counts": tally.summary(),
            "raters": tally.rater_counts(),
            **manifest(),
        }
        if not whole["counts"]["rankings"]:
            left = ", ".join(f"{number:,} left out: {reason}" for reason, number in whole["left_out"].items())
            raise Refused("no_rankings", "There are no rankings to put into a snapshot" + (f" ({left})." if left else "."))
        with (work / "manifest.json").open("wb") as stream:
            stream.write(json.dumps(whole, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n")
            _to_disk(stream)
        _settle(work, root / name)
        return name, whole
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _to_disk(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _settle(work: Path, place: Path) -> None:
    for file in work.iterdir():
        file.chmod(0o444)
    work.chmod(0o755)
    try:
        work.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        if file_digest(place / "rankings.jsonl") != place.name:
            message = f"{place} is there already, but its rankings.jsonl is damaged. Move that folder away and repeat."
            raise Refused("snapshot_damaged", message, 409) from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def snapshot_find(root: Path, name: str) -> Path:
    """The folder of a snapshot, from its path, its digest, or the beginning of its digest. Raises: Refused."""
    path = Path(name)
    if path.is_file():
        path = path.parent
    if path.is_dir() and (path / "rankings.jsonl").exists():
        return path
    word = name.lower()
    known = len(word) >= 4 and set(word) <= set("0123456789abcdef")
    found = sorted(folder for folder in root.glob(f"{word}*") if folder.is_dir()) if known else []
    if len(found) == 1:
        return found[0]
    if found:
        raise Refused("snapshot_ambiguous", f"{len(found)} snapshots begin with {name!r}: give more of the digest.")
    raise Refused("snapshot_unknown", f"There is no snapshot {name!r} in {root}; `manage.py snapshot list PROJECT` shows them.", 404)


def snapshot_rows(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / "rankings.jsonl").open("rb") as stream:
        for line in stream:
            yield json.loads(line)


def snapshot_manifest(folder: Path) -> dict[str, Any]:
    """Raises: Refused when the manifest is absent or no snapshot's."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Refused("snapshot_damaged", f"{folder / 'manifest.json'} cannot be read: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Refused("snapshot_damaged", f"{folder / 'manifest.json'} is not a manifest of format {FORMAT}.")
    return manifest


def snapshot_verify(folder: Path) -> list[str]:
    """Recompute everything that the manifest says and the format promises. Returns what is broken, [] when all is well."""
    try:
        manifest = snapshot_manifest(folder)
    except Refused as error:
        return [error.message]
    broken = []
    actual = file_digest(folder / "rankings.jsonl")
    if actual != manifest.get("digest"):
        broken.append(f"digest: rankings.jsonl has {actual or 'gone'}, the manifest says {manifest.get('digest')}")
    if len(folder.name) == 64 and folder.name != manifest.get("digest"):
        broken.append(f"digest: the folder is called {folder.name}, the manifest says {manifest.get('digest')}")
    if not actual:
        return broken
    tally = Tally()
    broken += _verify_rows(folder / "rankings.jsonl", manifest, tally)
    if not any(one.startswith("line") for one in broken):
        for name, recounted in (("counts", tally.summary()), ("raters", tally.rater_counts())):
            if manifest.get(name) != recounted:
                broken.append(f"{name}: recounted {recounted}, the manifest says {manifest.get(name)}")
    return broken


def _verify_rows(path: Path, manifest: Mapping[str, Any], tally: Tally) -> list[str]:
    broken: list[str] = []
    before: tuple[str, str, str] = ("", "", "")
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                row = json.loads(line)
                problems = _row_problems(row, line, manifest)
                place = (row["key"], row["rater"], row["ranking"])
                if place <= before:
                    problems.append("does not stand in order of (key, rater, ranking)")
                before = place
                tally.add(row)
            except (ContentRefused, ValueError, KeyError, TypeError, AttributeError) as error:
                problems = [f"cannot be read as a ranking: {error!r}"]
            broken += [f"line {number}: {problem}" for problem in problems]
            if len(broken) >= 100:
                return [*broken, "... and perhaps more"]
    return broken


def _row_problems(row: Mapping[str, Any], line: bytes, manifest: Mapping[str, Any]) -> list[str]:
    problems = []
    if set(row) - OPTIONAL_FIELDS != ROW_FIELDS:
        problems.append(f"its fields differ from the format: {', '.join(sorted((set(row) - OPTIONAL_FIELDS) ^ ROW_FIELDS))}")
    if not _is_amount(row.get("weight", 1)):
        problems.append("weight is not a finite number of at least 0")
    strengths = row.get("strengths", [0] * (len(row["bands"]) - 1))
    if len(strengths) != len(row["bands"]) - 1 or not all(map(_is_amount, strengths)):
        problems.append(f"strengths are not {len(row['bands']) - 1} finite numbers of at least 0, one less than the bands")
    if canonical(row) + b"\n" != line:
        problems.append("is not in the one way of writing: sorted keys, no spaces, UTF-8")
    if prompt_digest(messages_checked(row["messages"])) != row["prompt"]:
        problems.append("`prompt` is not the SHA-256 of `messages`")
    # The split follows from the prompt's digest alone, so when each line is right no prompt can be in both splits.
    if split_of(row["prompt"], manifest["held_out_percent"]) != row["split"]:
        problems.append(f"is in split {row['split']!r}, where its prompt does not belong")
    count = len(row["completions"])
    for name, bands in {"bands": row["bands"], **row["criteria"]}.items():
        if sorted(place for band in bands for place in band) != list(range(count)) or not all(bands):
            problems.append(f"{name} does not name each of the {count} completions once")
    if sorted(row["displayed"]) != list(range(count)):
        problems.append(f"displayed does not name each of the {count} completions once")
    texts = [(one["text"], one["policy"]) for one in row["completions"]]
    if texts != sorted(texts):
        problems.append("completions do not stand in order of (text, policy)")
    return problems


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def snapshot_export(folder: Path, shape: str, stream: BinaryIO, split: str = "") -> dict[str, int]:
    """Write rankings, or their pairs in one of TRL's two shapes, as JSON lines. Returns `rankings`, `pairs` and `ties` (left out).

    `split`: only `train` or `held_out`. Raises: Refused for an unknown shape.
    """
    if shape not in EXPORTS:
        raise Refused("shape_unknown", f"There is no export {shape!r}: use one of {', '.join(EXPORTS)}.")
    counts = Counter({"rankings": 0, "pairs": 0, "ties": 0})
    for row in snapshot_rows(folder):
        if split and row["split"] != split:
            continue
        counts["rankings"] += 1
        counts["pairs"] += pair_count(row["bands"])
        counts["ties"] += tie_count(row["bands"])
        if shape == "rankings":
            stream.write(canonical(row) + b"\n")
            continue
        for chosen, rejected in pairs_of(row["bands"]):
            stream.write(canonical(_pair(row, chosen, rejected, shape)) + b"\n")
    return dict(counts)


def _pair(row: Mapping[str, Any], chosen: int, rejected: int, shape: str) -> dict[str, Any]:
    texts = [row["completions"][place]["text"] for place in (chosen, rejected)]
    tags = {"ranking": row["ranking"], "rater": row["rater"], "key": row["key"], "split": row["split"]}
    if shape == "trl":
        return {"prompt": plain_prompt(row["messages"]), "chosen": texts[0], "rejected": texts[1], **tags}
    sides = [[{"role": "assistant", "content": text}] for text in texts]
    return {"prompt": row["messages"], "chosen": sides[0], "rejected": sides[1], **tags}


def plain_prompt(messages: list[dict[str, str]]) -> str:
    """A lone question is itself; a conversation is written turn by turn and ends where the assistant's answer begins."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages) + "\n\nAssistant: "


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete. Raises: Refused when it cannot be written."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            _to_disk(stream)
        part.replace(path)
    except OSError as error:
        raise Refused("file_unwritable", f"Cannot write {path}: {error}.") from error
    finally:
        part.unlink(missing_ok=True)
