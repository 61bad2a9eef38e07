"""What a prompt and its completions may hold, and what their identity is. Pure: no database and no request.

Every text that enters Rankloop passes here, so that both databases can store it (PostgreSQL takes no NUL and no lone surrogate)
and so that the same content has the same digest wherever it is computed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant")
MAX_KEY_CHARACTERS = 200
MAX_TEXT_CHARACTERS = 1_000_000
MAX_TURNS = 1000

TRAIN, HELD_OUT = "train", "held_out"


class ContentRefused(ValueError):
    """Content that cannot be stored; the text names the place and the reason."""


def canonical(data: Any) -> bytes:
    """JSON bytes of `data` that are the same everywhere: sorted keys, no spaces, UTF-8.

    Raises: ContentRefused for NaN, infinities and text that UTF-8 cannot write.
    """
    try:
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise ContentRefused(f"cannot be written as JSON: {error}") from error


def prompt_digest(messages: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 of the messages: the prompt's identity, from which the split follows."""
    return hashlib.sha256(canonical([{"role": turn["role"], "content": turn["content"]} for turn in messages])).hexdigest()


def split_of(digest: str, held_out_percent: int) -> str:
    """`train` or `held_out`, from the prompt's digest alone: the same prompt is on the same side in every database.

    The first 64 bits of the digest are read as a fraction of one; raising the percentage only moves prompts out of training.
    """
    return HELD_OUT if int(digest[:16], 16) * 100 < held_out_percent << 64 else TRAIN


def text_checked(value: Any, place: str, *, limit: int = MAX_TEXT_CHARACTERS) -> str:
    """`value` when it is text that both databases can store. Raises: ContentRefused, naming `place`."""
    if not isinstance(value, str):
        raise ContentRefused(f"{place} must be text, not {_kind(value)}")
    if len(value) > limit:
        raise ContentRefused(f"{place} has {len(value):,} characters; at most {limit:,} are allowed")
    if "\x00" in value:
        raise ContentRefused(f"{place} holds a NUL character (\\u0000), which databases cannot store")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ContentRefused(f"{place} holds half of a surrogate pair at character {error.start}, which is not valid text") from error
    return value


def messages_checked(value: Any, place: str = "messages") -> list[dict[str, str]]:
    """Chat messages that end with the turn to be answered. Raises: ContentRefused, naming the turn."""
    if not isinstance(value, list | tuple) or not value:
        raise ContentRefused(f"{place} must be a list of at least one turn, not {_kind(value)}")
    if len(value) > MAX_TURNS:
        raise ContentRefused(f"{place} has {len(value):,} turns; at most {MAX_TURNS:,} are allowed")
    turns = [_turn_checked(turn, f"{place}, turn {number}") for number, turn in enumerate(value, start=1)]
    if turns[-1]["role"] == "assistant":
        raise ContentRefused(f"{place} must end with the turn that is answered, not with the assistant's")
    if not turns[-1]["content"].strip():
        raise ContentRefused(f"{place}: the turn to be answered is blank")
    return turns


def _turn_checked(turn: Any, place: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ContentRefused(f"{place} must be an object with `role` and `content`, not {_kind(turn)}")
    if extra := sorted(str(name) for name, value in turn.items() if name not in ("role", "content") and value):
        raise ContentRefused(f"{place} has `{extra[0]}`, which is not supported: only `role` and `content` are")
    if turn.get("role") not in ROLES:
        raise ContentRefused(f"{place}: role must be one of {', '.join(ROLES)}, not {str(turn.get('role'))[:40]!r}")
    return {"role": turn["role"], "content": text_checked(turn.get("content"), f"{place}, content")}


def key_checked(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**60:
        value = str(value)
    key = text_checked(value, "the key", limit=MAX_KEY_CHARACTERS)
    if not key.strip():
        raise ContentRefused("the key is blank")
    return key


@dataclass(frozen=True, slots=True)
class CompletionItem:
    """One text, and the policy, run and sampling parameters that it came from."""

    text: str
    policy: str = ""
    run: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str]:
        return self.text, self.policy

    @classmethod
    def checked(cls, raw: Any, place: str) -> "CompletionItem":
        if not isinstance(raw, Mapping):
            raise ContentRefused(f"{place} must be an object with `text`, not {_kind(raw)}")
        sampling = raw.get("sampling") or {}
        if not isinstance(sampling, Mapping):
            raise ContentRefused(f"{place}, sampling must be an object, not {_kind(sampling)}")
        if b"\\u0000" in canonical(sampling):
            raise ContentRefused(f"{place}, sampling holds a NUL character (\\u0000), which databases cannot store")
        item = cls(
            text=text_checked(raw.get("text", ""), f"{place}, text"),
            policy=text_checked(raw.get("policy") or "", f"{place}, policy", limit=200),
            run=text_checked(raw.get("run") or "", f"{place}, run", limit=100),
            sampling=dict(sampling),
        )
        if not item.text.strip() and not item.policy:
            raise ContentRefused(f"{place} has neither a text nor a policy")
        return item


@dataclass(frozen=True, slots=True)
class PromptItem:
    """One question with its distinct completions. `place_of[i]` is where the i-th completion of the source went."""

    key: str
    messages: list[dict[str, str]]
    completions: tuple[CompletionItem, ...] = ()
    place_of: tuple[int, ...] = ()
    digest: str = ""
    round: int = 0

    @property
    def repeated(self) -> int:
        return len(self.place_of) - len(self.completions)

    @classmethod
    def checked(cls, raw: Any, round: int = 0) -> "PromptItem":
        """From {key?, messages, completions?: [{text, policy, run, sampling}]}. Raises: ContentRefused."""
        if not isinstance(raw, Mapping):
            raise ContentRefused(f"a prompt must be an object with `messages`, not {_kind(raw)}")
        messages = messages_checked(raw.get("messages"))
        listed = raw.get("completions") or ()
        if not isinstance(listed, list | tuple):
            raise ContentRefused(f"completions must be a list, not {_kind(listed)}")
        items = [CompletionItem.checked(one, f"completion {number}") for number, one in enumerate(listed, start=1)]
        distinct, place_of = _merged(items)
        key = raw.get("key")
        return cls(
            key=_content_key(messages, distinct) if key is None else key_checked(key),
            messages=messages,
            completions=distinct,
            place_of=place_of,
            digest=prompt_digest(messages),
            round=round,
        )


def _merged(items: Sequence[CompletionItem]) -> tuple[tuple[CompletionItem, ...], tuple[int, ...]]:
    """Store what one policy said twice only once, and keep the count: raters should not be asked to compare a text with itself."""
    places: dict[tuple[str, str], int] = {}
    counts: list[int] = []
    distinct: list[CompletionItem] = []
    place_of = []
    for item in items:
        place = places.setdefault(item.identity, len(distinct))
        if place == len(distinct):
            distinct.append(item)
            counts.append(0)
        given = item.sampling.get("count", 1)
        counts[place] += given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else 1
        place_of.append(place)
    merged = (
        item if count == 1 else CompletionItem(item.text, item.policy, item.run, {**item.sampling, "count": count})
        for item, count in zip(distinct, counts, strict=True)
    )
    return tuple(merged), tuple(place_of)


def _content_key(messages: list[dict[str, str]], completions: Sequence[CompletionItem]) -> str:
    content = {"messages": messages, "completions": sorted(list(item.identity) for item in completions)}
    return hashlib.sha256(canonical(content)).hexdigest()


def _kind(value: Any) -> str:
    names = {
        type(None): "nothing",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
