"""What a run wrote for people to look at: `samples.jsonl`, by evaluation where it wrote at several, else `completions.jsonl`. Pure.

A file grows with each evaluation and a page asks for it again and again, so only the rows that are shown are parsed.
"""

import json
import re
import unicodedata
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


# Marks that turn the direction of writing: with them a text can be shown as what it is not.
TURNING = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Untrusted text for a terminal: what could move the cursor, colour, hide or command is shown as its code; line ends and tabs stay."""
    return "".join(
        char if char in "\n\t" or (unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") and char not in TURNING) else _code(char)
        for char in text
    )


def _code(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
