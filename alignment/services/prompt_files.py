"""Writes a project's prompts to a file that a run reads (docs/data-flow.md, section 3). Same prompts, same bytes, same digest."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from django.conf import settings

from alignment.services.home import ROUND_SUFFIX
from annotation.errors import Refused
from annotation.models import Project, Prompt

SPLITS = ("all", "train", "held_out")


def prompts_write(*, project: Project, split: str = "all", limit: int = 0, seed: int = 0) -> dict[str, str]:
    """Choose prompts by hash and write them once each, however many rounds asked them.

    Args:    limit: at most so many, 0 for all; another seed chooses others.
    Returns: {"path", "digest"} for a run's `inputs`.
    Raises:  Refused if the split is unknown or has no prompts.
    """
    if split not in SPLITS:
        raise Refused("split_unknown", f"There is no split {split!r}: use one of {', '.join(SPLITS)}.")
    rows = Prompt.objects.filter(project=project)
    if split != "all":
        rows = rows.filter(split=split)
    first: dict[str, int] = {}
    for pk, digest in rows.order_by("id").values_list("pk", "digest").iterator():
        first.setdefault(digest, pk)
    if not first:
        where = f"no prompts in the split {split!r}" if split != "all" else "no prompts"
        raise Refused("no_prompts", f"Project {project.slug} has {where}: `manage.py load {project.slug} FILE` brings them in.")
    chosen = sorted(first, key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
    wanted = [first[digest] for digest in (chosen[:limit] if limit else chosen)]
    folder = Path(settings.VAR) / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{os.getpid()}.{project.slug}.partial"
    content = hashlib.sha256()
    with partial.open("wb") as stream:
        for start in range(0, len(wanted), 500):
            for line in _lines(wanted[start : start + 500]):
                content.update(line)
                stream.write(line)
    path = folder / f"{content.hexdigest()}.jsonl"
    partial.replace(path)
    return {"path": str(path), "digest": content.hexdigest()}


def _lines(keys: list[int]) -> list[bytes]:
    rows: dict[int, Any] = Prompt.objects.in_bulk(keys)
    return [
        json.dumps(
            {"key": ROUND_SUFFIX.sub("", rows[pk].key), "messages": rows[pk].messages, "split": rows[pk].split},
            sort_keys=True,
            ensure_ascii=False,
        ).encode()
        + b"\n"
        for pk in keys
    ]
