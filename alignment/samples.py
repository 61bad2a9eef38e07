"""What a run wrote for people to look at: `samples.jsonl`, by evaluation where it wrote at several, else `completions.jsonl`. Pure.

A file grows with each evaluation and a page asks for it again and again, so only the rows that are shown are parsed.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = ("samples.jsonl", "completions.jsonl")
STEP = re.compile(r'\{"step": (\d+),')  # PPO writes the step first


@dataclass(frozen=True, slots=True)
class Written:
    """`rows` of the evaluation at `step`, at most as many as were asked for, of `total`. `steps`: those of all evaluations, newest first;
    [] (and `step` None) where the run wrote once."""

    steps: list[int] = field(default_factory=list)
    step: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0


def read_samples(folder: Path, *, limit: int, step: int | None = None) -> Written:
    """Args:  step: None, or one that is not there, is the newest.
    Returns: nothing of a folder that is not on this machine, or has no samples yet."""
    for name in FILES:
        try:
            with (folder / name).open(encoding="utf-8", newline="\n", errors="replace") as opened:
                # Only a newline ends a line: texts may hold other characters that `str.splitlines` cuts at.
                lines = [line for line in opened if line.endswith("\n") and line.strip()]
        except OSError:
            continue
        if lines:
            return _chosen(lines, limit, step)
    return Written()


def _chosen(lines: list[str], limit: int, step: int | None) -> Written:
    by_step: dict[int | None, list[str]] = {}
    for line in lines:
        found = STEP.match(line)
        by_step.setdefault(int(found[1]) if found else None, []).append(line)
    steps = sorted((known for known in by_step if known is not None), reverse=True)
    chosen = step if step in steps else steps[0] if steps else None
    return Written(steps, chosen, _parsed(by_step[chosen][:limit]), len(by_step[chosen]))


def _parsed(lines: list[str]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
