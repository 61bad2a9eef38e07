"""What a notice is worth: the hidden truth of the demo, which no trainer ever sees.

Facts are looked for as statements: a value counts only inside a phrase that really says it ("on Monday", "a red kite"), never in a sentence
that denies it, and never beside another value of the same slot, so that a list of all values, or an echo of the prompt, earns nothing.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from demo.facts import EMPTY_TALK, SLOTS, read_prompt

NEGATION = re.compile(r"\b(?:not|no|never|nor|neither|without|nobody|nothing|isn't|wasn't|hasn't|except|maybe|perhaps)\b", re.IGNORECASE)
FOUND = r"(?:found|picked up|left|brought in)"
# How each slot is stated. {v} is the value; a pattern must match inside one sentence.
FRAMES: dict[str, str] = {
    "item": r"\b(?:an?|the)(?: (?!and\b)\w+)? {v}\b",
    "colour": r"\b(?:an?|the) {v} (?:" + "|".join(SLOTS["item"]) + r")\b|\bit (?:is|was) {v}\b",
    "mark": r"\b(?:with|has|had|bears) {v}\b",
    "found at": r"\b(?:at|near|beside|by) the {v}\b",
    "day": r"\bon {v}\b",
    "finder": r"\bby the {v}\b|\bthe {v} " + FOUND + r"\b",
    "waits at": r"\b(?:waits|waiting|kept|ask for it|asked for|collect it|collected|fetch it)(?: \w+)? at the {v}\b",
}
STATED = {
    (slot, value): re.compile(FRAMES[slot].replace("{v}", re.escape(value)), re.IGNORECASE)
    for slot, values in SLOTS.items()
    for value in values
}
VALUE = {(slot, value): re.compile(rf"\b{re.escape(value)}\b", re.IGNORECASE) for slot, values in SLOTS.items() for value in values}
CLAUSE = re.compile(r"\b(?:was|were|has been|found|picked up|left|brought in|waits|collect|ask|is|has)\b", re.IGNORECASE)
WRONG_ARTICLE = re.compile(r"\ban (?=[^aeiou\s])|\ba (?=[aeiou])", re.IGNORECASE)
FILLERS = [text.rstrip(".").lower() for text in EMPTY_TALK]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one notice says and how: `said`, `invented` and `asked` count facts; `fluency` is 0 to 1; `utility` is the hidden truth."""

    asked: int
    said: int
    invented: int
    fluency: float
    words: int
    utility: float

    @property
    def facts_said(self) -> float:
        return self.said / self.asked


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def values_in(text: str, slot: str) -> set[str]:
    return {value for value in SLOTS[slot] if VALUE[slot, value].search(text)}


def states(text: str, slot: str, value: str) -> bool:
    """Whether the text states this value of this slot, does not deny it, and names no other value of the slot."""
    if values_in(text, slot) != {value}:
        return False
    return any(STATED[slot, value].search(part) and not NEGATION.search(part) for part in sentences(text))


def facts_said(prompt: str, text: str) -> float:
    """Share of the prompt's facts that the text states, 0 to 1."""
    facts = read_prompt(prompt)
    return sum(states(text, slot, value) for slot, value in facts.items()) / len(facts)


def fluency_faults(text: str) -> list[str]:
    """Every rule of plain writing that the text breaks, by name; an empty list means fluent."""
    parts, words = sentences(text), re.findall(r"[\w']+", text.lower())
    if not words:
        return ["empty"]
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    lowered = " ".join(words)
    mentions = [len(pattern.findall(text)) for pattern in VALUE.values()]
    faults = {
        "more than two sentences": len(parts) > 2,
        "no full stop": not text.strip().endswith("."),
        "no capital": any(not part[0].isupper() for part in parts),
        "no clause": any(not CLAUSE.search(part) for part in parts),
        "a for an": bool(WRONG_ARTICLE.search(text)),
        "word twice running": any(first == second for first, second in itertools.pairwise(words)),
        "phrase repeated": len(set(trigrams)) < len(trigrams),
        "fact repeated": any(count > 1 for count in mentions),
        "empty talk": any(filler in lowered for filler in FILLERS),
    }
    return [name for name, broken in faults.items() if broken]


def judge(prompt: str, text: str) -> Verdict:
    """The verdict on one notice. Utility: 4 for all facts, 2 for fluency; less 1 for each invention and 0.05 for each needless word."""
    facts = read_prompt(prompt)
    said = sum(states(text, slot, value) for slot, value in facts.items())
    invented = sum(bool(values_in(text, slot) - {facts.get(slot)}) for slot in SLOTS)
    fluency = max(0.0, 1.0 - 0.25 * len(fluency_faults(text)))
    words = len(text.split())
    needless = max(0, words - 5 - 4 * len(facts))
    utility = 4.0 * said / len(facts) + 2.0 * fluency - invented - 0.05 * needless
    return Verdict(len(facts), said, invented, fluency, words, utility)


def mean_with_interval(values: Sequence[float], groups: Sequence[str], seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """Mean and 95 % interval, by bootstrap over groups: samples of one prompt stand or fall together.

    Args:    values (N,) one a sample; groups (N,) the prompt of each sample.
    Returns: mean, lower and upper end.
    Raises:  ValueError if there is nothing to average."""
    if not values or len(values) != len(groups):
        raise ValueError(f"{len(values)} values in {len(groups)} groups: there must be at least one value, each with its group.")
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(index)
    picks = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def wins(mine: float, other: float) -> float:
    """1 if my utility is higher, 0 if lower, one half if equal."""
    return 1.0 if mine > other else 0.0 if mine < other else 0.5
