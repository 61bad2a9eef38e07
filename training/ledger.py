"""Counts of rows read, used and left out, with reasons and the first keys: nothing disappears in silence."""

from collections import Counter
from typing import Any

from training.errors import InputError

LISTED_KEYS = 20


class Ledger:
    """One for each file that is read. `what` names the rows: "rankings", "prompts", "completions"."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.read = 0
        self.used = 0
        self.reasons: Counter[str] = Counter()
        self.keys: dict[str, list[str]] = {}

    def drop(self, key: str, reason: str, *, count: int = 1) -> None:
        self.reasons[reason] += count
        listed = self.keys.setdefault(reason, [])
        if len(listed) < LISTED_KEYS:
            listed.append(key)

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    def counts(self) -> dict[str, Any]:
        return {"what": self.what, "read": self.read, "used": self.used, "dropped": dict(self.reasons), "dropped_keys": dict(self.keys)}

    def enforce(self, max_dropped_share: float) -> None:
        """Raises InputError if more than this share of what was read cannot be used, or if nothing can."""
        if self.read and self.dropped > max_dropped_share * self.read:
            reasons = "; ".join(f"{reason}: {count} (first: {', '.join(self.keys[reason][:5])})" for reason, count in self.reasons.items())
            raise InputError(
                f"{self.dropped} of {self.read} {self.what} cannot be used, more than max_dropped_share = {max_dropped_share}. {reasons}.",
                remedy="Raise max_prompt_tokens or max_completion_tokens, mend the data, or raise max_dropped_share if this is meant.",
            )
        if not self.used:
            raise InputError(f"No {self.what} to work with ({self.read} read).", remedy="Check the file and its split.")
