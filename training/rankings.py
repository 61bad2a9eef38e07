"""Readers of the three data files: a snapshot's rankings, demonstrations for SFT, and prompts; and their encoding.

Rankings of one prompt and the same completions are gathered into one item: each completion is encoded once, however many raters
ranked it, and two completions of the same tokens are one row.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.encode import Encoder, Message, TooLong
from training.errors import InputError
from training.ledger import Ledger
from training.rundir import file_digest

Bands = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class RaterRanking:
    """What one rater said: bands of completion indices, best first."""

    bands: Bands
    rater: str = ""
    weight: float = 1.0
    uid: str = ""
    displayed: tuple[int, ...] = ()  # the order on the rater's screen; empty where it is not known
    strengths: tuple[float, ...] = ()  # how much better each band is than the next; empty where it is not known


@dataclass(frozen=True, slots=True)
class RankedPrompt:
    """One prompt, its K completions (texts), and every ranking of them."""

    key: str
    digest: str
    split: str
    messages: list[Message]
    completions: list[str]
    rankings: list[RaterRanking] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """Tokens of a RankedPrompt. `rows` are distinct completions (each ends in EOS); completion k is `rows[places[k]]`."""

    key: str
    digest: str
    prompt_ids: list[int]
    rows: list[list[int]]
    places: list[int]
    rankings: list[RaterRanking]
    texts: list[str]

    @property
    def size(self) -> int:
        return len(self.places)

    @property
    def tokens(self) -> int:
        """Of the prompt and of each distinct completion, once: what is encoded."""
        return len(self.prompt_ids) + sum(map(len, self.rows))


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One SFT row."""

    key: str
    messages: list[Message]
    completion: str


@dataclass(frozen=True, slots=True)
class EncodedDemonstration:
    key: str
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One row of a prompts file."""

    key: str
    messages: list[Message]
    split: str = "train"


def read_rankings(path: str | Path, *, digest: str | None = None, split: str | None = None) -> list[RankedPrompt]:
    """A snapshot's rankings, gathered by prompt and completions, in file order.

    Args:    digest: the SHA-256 the file must have;  split: only this one.
    Raises:  InputError if the digest differs, a line is not a ranking, or one prompt stands in both splits.
    """
    if digest is not None and file_digest(path) != digest:
        raise InputError(f"{path}: the SHA-256 is not {digest}.", remedy="Use the snapshot that was named, unchanged.")
    gathered: dict[tuple[str, tuple[str, ...]], RankedPrompt] = {}
    split_of: dict[str, str] = {}
    for number, row in read_lines(path):
        try:
            texts = [completion["text"] for completion in row["completions"]]
            prompt = RankedPrompt(row["key"], row["prompt"], row["split"], _messages(row["messages"]), texts)
            said = _said(row, len(texts))
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_line(path, number, "a ranking", error) from error
        if split_of.setdefault(prompt.digest, prompt.split) != prompt.split:
            raise InputError(f"{path}:{number}: prompt {prompt.key} stands in both splits.", remedy="Make the snapshot again.")
        if split is None or prompt.split == split:
            gathered.setdefault((prompt.key, tuple(texts)), prompt).rankings.append(said)
    return list(gathered.values())


def read_demonstrations(path: str | Path) -> list[Demonstration]:
    """SFT rows: `{"prompt": text or messages, "completion": text}` or `{"messages": [..., assistant turn]}`."""
    rows = []
    for number, row in read_lines(path):
        try:
            if "completion" in row:
                prompt = row["prompt"]
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
                completion = row["completion"]
            else:
                *messages, answer = _messages(row["messages"])
                if answer["role"] != "assistant" or not messages:
                    raise ValueError("messages must end with the assistant's turn, after at least one other")
                completion = answer["content"]
            if not isinstance(completion, str):
                raise TypeError("completion is not a text")
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_line(path, number, "a demonstration", error) from error
        rows.append(Demonstration(str(row.get("key", row.get("id", f"line {number}"))), messages, completion))
    return rows


def read_prompts(path: str | Path, *, split: str | None = None) -> list[PromptRow]:
    """Prompt rows: `{"key", "messages", "split"}`."""
    rows = []
    for number, row in read_lines(path):
        try:
            prompt = PromptRow(str(row["key"]), _messages(row["messages"]), str(row.get("split", "train")))
        except (KeyError, TypeError, ValueError) as error:
            raise _bad_line(path, number, "a prompt", error) from error
        if split is None or prompt.split == split:
            rows.append(prompt)
    return rows


def encode_rankings(prompts: Iterable[RankedPrompt], encoder: Encoder, ledger: Ledger) -> list[EncodedRanking]:
    """Tokens of each prompt and completion, once. An over-long completion leaves its rankings; fewer than two leave nothing to rank.

    The ledger counts completions.
    """
    encoded = []
    for prompt in prompts:
        ledger.read += len(prompt.completions)
        try:
            prompt_ids = encoder.prompt_ids(prompt.messages)
        except (TooLong, ValueError) as error:
            ledger.drop(prompt.key, str(error), count=len(prompt.completions))
            continue
        row_of: dict[tuple[int, ...], int] = {}
        places: list[int] = []
        kept: dict[int, int] = {}
        for index, text in enumerate(prompt.completions):
            try:
                ids = tuple(encoder.completion_ids(text))
                encoder.check_length(prompt_ids, ids)
            except (TooLong, ValueError) as error:
                ledger.drop(f"{prompt.key}[{index}]", str(error))
                continue
            kept[index] = len(places)
            places.append(row_of.setdefault(ids, len(row_of)))
            encoder.check_boundary(prompt.messages, text)
        if len(places) < 2:
            ledger.drop(prompt.key, "fewer than two completions left", count=len(places))
            continue
        ledger.used += len(places)
        rankings = [_keep(ranking, kept) for ranking in prompt.rankings]
        rows = [list(ids) for ids in row_of]
        texts = [prompt.completions[index] for index in kept]
        encoded.append(EncodedRanking(prompt.key, prompt.digest, prompt_ids, rows, places, rankings, texts))
    return encoded


def encode_demonstrations(rows: Iterable[Demonstration], encoder: Encoder, ledger: Ledger) -> list[EncodedDemonstration]:
    """Tokens of each demonstration; over-long ones are left out and counted."""
    encoded = []
    for row in rows:
        ledger.read += 1
        try:
            item = EncodedDemonstration(row.key, encoder.prompt_ids(row.messages), encoder.completion_ids(row.completion))
            encoder.check_length(item.prompt_ids, item.completion_ids)
        except (TooLong, ValueError) as error:
            ledger.drop(row.key, str(error))
            continue
        encoder.check_boundary(row.messages, row.completion)
        ledger.used += 1
        encoded.append(item)
    return encoded


def read_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line of a JSON lines file; blank lines are passed over."""
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _bad_line(path, number, "JSON", error) from error
            if not isinstance(row, dict):
                raise _bad_line(path, number, "a JSON object", TypeError(type(row).__name__))
            yield number, row


def _bad_line(path: str | Path, number: int, wanted: str, error: Exception) -> InputError:
    return InputError(f"{path}:{number}: not {wanted}: {error!r}", remedy="docs/data-flow.md says what each file holds.")


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list with at least one message")
    messages = [{"role": message["role"], "content": message["content"]} for message in value]
    if not all(isinstance(message["content"], str) and isinstance(message["role"], str) for message in messages):
        raise TypeError("role and content must be texts")
    return messages


def _bands(value: Any, size: int) -> Bands:
    bands = tuple(tuple(int(index) for index in band) for band in value)
    seen = [index for band in bands for index in band]
    if len(set(seen)) != len(seen) or any(not 0 <= index < size for index in seen):
        raise ValueError(f"bands {value} do not name each of {size} completions at most once")
    return bands


def _said(row: dict[str, Any], size: int) -> RaterRanking:
    bands = _bands(row["bands"], size)
    strengths = tuple(_amount(value, "a strength") for value in row.get("strengths") or ())
    if strengths and len(strengths) != len(bands) - 1:
        raise ValueError(f"{len(strengths)} strengths do not stand between {len(bands)} bands")
    return RaterRanking(
        bands,
        str(row.get("rater", "")),
        _amount(row.get("weight", 1.0), "the weight"),
        str(row.get("ranking", "")),
        displayed=_displayed(row.get("displayed"), size),
        strengths=strengths,
    )


def _amount(value: Any, name: str) -> float:
    amount = float(value)
    if not (math.isfinite(amount) and amount >= 0):
        raise ValueError(f"{name} must be a finite number, at least 0, not {value}")
    return amount


def _keep(ranking: RaterRanking, kept: dict[int, int]) -> RaterRanking:
    """Only these completions. Where a band disappears, what stood above it is better than what stood below by both strengths together."""
    bands: list[tuple[int, ...]] = []
    strengths: list[float] = []
    above = 0.0
    for place, band in enumerate(ranking.bands):
        if ranking.strengths and place:
            above += ranking.strengths[place - 1]
        if left := tuple(kept[index] for index in band if index in kept):
            if bands and ranking.strengths:
                strengths.append(above)
            bands.append(left)
            above = 0.0
    displayed = tuple(kept[index] for index in ranking.displayed if index in kept)
    return replace(ranking, bands=tuple(bands), displayed=displayed, strengths=tuple(strengths))


def _displayed(value: Any, size: int) -> tuple[int, ...]:
    shown = tuple(int(index) for index in value or ())
    if len(set(shown)) != len(shown) or any(not 0 <= index < size for index in shown):
        raise ValueError(f"displayed {value} does not name each of {size} completions at most once")
    return shown
