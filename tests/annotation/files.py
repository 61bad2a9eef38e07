"""Files to load and where the real data lies, for tests of loading, snapshots and exports."""

import json
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command

from annotation.models import Project, Snapshot
from annotation.snapshot_files import snapshot_manifest

REAL = Path(settings.BASE_DIR).parent / "shared" / "data"
RANKINGS = ("e2e_quality_k5", "e2e_naturalness_k5", "rankme_k3", "squality_k3", "oasst_en100", "wmt16_ron-eng_k5", "wmt16_eng-ron_k5")
PAIRS = ("hh_helpful_train", "hh_harmless_train")


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"the real data is not beside the checkout: {path} is absent")
    return path


def written(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines; text and bytes are written as they are."""
    with path.open("wb") as stream:
        for row in rows:
            line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
            stream.write(line + b"\n")
    return path


def run(*words: Any) -> tuple[str, str]:
    """A command's standard output and error. Raises: CommandError."""
    out, err = StringIO(), StringIO()
    call_command(*[str(word) for word in words], stdout=out, stderr=err, no_color=True)
    return out.getvalue(), err.getvalue()


def refused(*words: Any) -> str:
    """What a command says when it fails: its message, after what it reported before."""
    out, err = StringIO(), StringIO()
    with pytest.raises(CommandError) as caught:
        call_command(*[str(word) for word in words], stdout=out, stderr=err, no_color=True)
    return f"{err.getvalue()}{caught.value}"


def load(slug: str, path: Path, *words: Any) -> str:
    """Load a file that has no bad line; the summary."""
    if not Project.objects.filter(slug=slug).exists():
        Project.objects.create(slug=slug, name=slug)
    return run("load", slug, path, *words)[0]


def ranked(key: str, ranks: list[Any], rater: str = "r1", **fields: Any) -> dict[str, Any]:
    texts = [f"{key} answer {number}" for number in range(len(ranks))]
    return {"key": key, "prompt": f"Question {key}?", "completions": texts, "ranks": ranks, "rater": rater, **fields}


def folder_of(snapshot: Snapshot) -> Path:
    return Path(settings.SNAPSHOTS_DIR) / snapshot.digest


def rows_of(snapshot: Snapshot) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder_of(snapshot) / "rankings.jsonl").read_bytes().splitlines()]


def manifest_of(snapshot: Snapshot) -> dict[str, Any]:
    return snapshot_manifest(folder_of(snapshot))
