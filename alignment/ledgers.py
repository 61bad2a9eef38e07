"""What became of the rankings that a run read, for its page. Pure."""

from dataclasses import dataclass
from typing import Any

SPLITS = ("train", "held_out")
# (words, count) in the order in which the loss meets them.
WHOLE = (
    ("completions read", "read"),
    ("rankings of usable prompts", "rankings"),
    ("rankings that lost a completion", "rankings_shortened"),
    ("preference pairs", "preference_pairs"),
    ("tied pairs", "tied_pairs"),
    ("pairs of equal completions", "pairs_of_equal_completions"),
)
LEFT_OUT = (("completions left out", "dropped"), ("rankings left out", "rankings_left_out"))
ALWAYS = ("read", "rankings", "preference_pairs", "tied_pairs")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: `counts` of training and held-out rows, and the first `keys` of those that were left out or changed."""

    name: str
    counts: tuple[int, int]
    keys: tuple[str, ...] = ()


def ledger_of(counts: dict[str, Any] | None) -> list[Entry]:
    """Lines of a run on rankings, what is never left out first, then what was by reason; [] for other runs."""
    parts = [(counts or {}).get(split) for split in SPLITS]
    known = [part if isinstance(part, dict) and "preference_pairs" in part else {} for part in parts]
    if not any(known):
        return []
    entries = []
    for words, name in WHOLE:
        both = _both(known, lambda part, name=name: part.get(name, 0))
        if any(both) or name in ALWAYS:
            entries.append(Entry(words, both, _keys(part.get(f"{name}_keys", []) for part in known)))
    for words, name in LEFT_OUT:
        reasons = dict.fromkeys(reason for part in known for reason in part.get(name, {}))
        for reason in reasons:
            both = _both(known, lambda part, name=name, reason=reason: part.get(name, {}).get(reason, 0))
            entries.append(Entry(f"{words}: {reason}", both, _keys(part.get(f"{name}_keys", {}).get(reason, []) for part in known)))
    return entries


def _both(known: list[dict[str, Any]], count: Any) -> tuple[int, int]:
    return int(count(known[0])), int(count(known[1]))


def _keys(lists: Any) -> tuple[str, ...]:
    return tuple(str(key) for keys in lists for key in keys)
