"""What a run wrote for people to look at: `samples.jsonl`, by evaluation where it wrote at several, else `completions.jsonl`. Pure.

A file grows with each evaluation and a page asks for it again and again, so it is read line by line, and only rows that are shown are kept.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES = ("samples.jsonl", "completions.jsonl")
STEP = re.compile(r'\{"step": (\d{1,9}),')  # PPO writes the step first


@dataclass(frozen=True, slots=True)
class Written:
    """`rows` of the evaluation at `step`, at most as many as were asked for, of `total`. `steps`: those of all evaluations, newest first;
    [] (and `step` None) where the run wrote once. `rolled_back`: those whose policy was given up, with the step gone back to."""

    steps: list[int] = field(default_factory=list)
    step: int | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    rolled_back: dict[int, int] = field(default_factory=dict)

    @property
    def rolled_back_to(self) -> int | None:
        """Where the run went back to from the evaluation that is shown."""
        return None if self.step is None else self.rolled_back.get(self.step)


def read_samples(folder: Path, *, limit: int, step: int | None = None, rollbacks: Sequence[tuple[int, int]] = ()) -> Written:
    """Args:  step: None, or one that is not there, is the newest that was not rolled back;  rollbacks: (step, to_step) of each.
    Returns: nothing of a folder that is not on this machine, or has no samples yet."""
    for name in FILES:
        try:
            # Only a newline ends a line: texts may hold other characters that `str.splitlines` cuts at.
            with (folder / name).open(encoding="utf-8", newline="\n", errors="replace") as opened:
                found = _chosen(opened, limit, step, rollbacks)
        except OSError:
            continue
        if found.total:
            return found
    return Written()


def _chosen(lines: Iterable[str], limit: int, step: int | None, rollbacks: Sequence[tuple[int, int]]) -> Written:
    """One pass that holds the lines of the asked step and of the best default so far, and counts the others."""
    counts: dict[int | None, int] = {}
    kept: dict[int | None, list[str]] = {}
    default: int | None = None
    for line in lines:
        if not (line.endswith("\n") and line.strip()):
            continue
        found = STEP.match(line)
        at = int(found[1]) if found else None
        if at not in counts and (not counts or _rank(at, rollbacks) > _rank(default, rollbacks)):
            kept = {one: rows for one, rows in kept.items() if one == step}
            default = at
        counts[at] = counts.get(at, 0) + 1
        if at in (step, default) and len(kept.setdefault(at, [])) < limit:
            kept[at].append(line)
    steps = sorted((known for known in counts if known is not None), reverse=True)
    chosen = step if step in steps else default
    back = {known: to for known in steps if (to := _went_back(known, rollbacks)) is not None}
    return Written(steps, chosen, _parsed(kept.get(chosen, [])), counts.get(chosen, 0), back)


def _went_back(step: int, rollbacks: Sequence[tuple[int, int]]) -> int | None:
    return next((to_step for at, to_step in rollbacks if to_step < step <= at), None)


def _rank(step: int | None, rollbacks: Sequence[tuple[int, int]]) -> tuple[bool, int]:
    return (False, -1) if step is None else (_went_back(step, rollbacks) is None, step)


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


def text_shown(text: Any) -> str:
    """What a policy wrote, also where it wrote nothing."""
    return str(text) if str(text or "").strip() else "(empty)"


def of_rejection(sample: dict[str, Any]) -> dict[str, str]:
    """What rejection sampling did with it, as a name and its value: accepted, or taken because too few of its prompt's candidates were."""
    told = sample.get("rejection")
    if not isinstance(told, dict):
        return {}
    acceptance = told.get("acceptance")
    numbers = f"(acceptance {acceptance:.2g})" if isinstance(acceptance, int | float) else ""
    return {"accepted" if told.get("accepted") else "filled up": numbers}


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
