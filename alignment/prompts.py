"""Which prompts a policy answers: those of a prompts file or of a snapshot, each question once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.encode import Encoder, Message, TooLong
from training.errors import InputError
from training.language_model import unwrap
from training.ledger import Ledger
from training.rankings import PromptRow, read_lines, read_prompts, read_rankings


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A question to the policy, and its tokens up to where the completion begins."""

    key: str
    messages: list[Message]
    split: str
    prompt_ids: list[int]


def prompt_rows(path: str | Path) -> list[PromptRow]:
    """The prompts of a snapshot's `rankings.jsonl` or of a prompts file, in file order; equal messages count once, under their first key.

    Raises:  InputError if a line is neither (docs/data-flow.md, sections 1 and 3).
    """
    _, first = next(read_lines(path), (0, {}))
    if "bands" in first:
        rows = [PromptRow(item.key, item.messages, item.split) for item in read_rankings(path)]
    else:
        rows = read_prompts(path)
    unique: dict[str, PromptRow] = {}
    for row in rows:
        unique.setdefault(json.dumps(row.messages, sort_keys=True, ensure_ascii=False), row)
    return list(unique.values())


def choose_split(rows: Sequence[PromptRow], split: str) -> tuple[list[PromptRow], str]:
    """The rows of a split, and its name: `auto` is `held_out` where any prompt is held out, else `all`.

    Raises:  InputError if the split has no prompts.
    """
    if split == "auto":
        split = "held_out" if any(row.split == "held_out" for row in rows) else "all"
    chosen = [row for row in rows if split in ("all", row.split)]
    if not chosen:
        found = sorted({row.split for row in rows})
        raise InputError(f"No prompt is in the split {split!r} ({len(rows)} in {found}).", remedy="Set split, or give another file.")
    return chosen, split


def encode_prompts(rows: Sequence[PromptRow], encoder: Encoder, *, max_dropped_share: float) -> tuple[list[EncodedPrompt], dict[str, Any]]:
    """Tokens of each prompt, and the counts. Over-long prompts are left out, counted, and refused above `max_dropped_share`."""
    ledger = Ledger("prompts")
    encoded = []
    for row in rows:
        ledger.read += 1
        try:
            encoded.append(EncodedPrompt(row.key, row.messages, row.split, encoder.prompt_ids(row.messages)))
        except (TooLong, ValueError) as error:
            ledger.drop(row.key, str(error))
            continue
        ledger.used += 1
    ledger.enforce(max_dropped_share)
    return encoded, ledger.counts()


def check_room(model: Any, prompts: Sequence[EncodedPrompt], max_completion_tokens: int) -> None:
    """Raises InputError if the longest prompt and a completion of full length would pass the positions that the model knows."""
    positions = getattr(unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    if positions and longest + max_completion_tokens > positions:
        raise InputError(
            f"The longest prompt ({longest}) and max_completion_tokens ({max_completion_tokens}) pass the model's {positions} positions.",
            remedy=f"Set max_completion_tokens to at most {max(1, positions - longest)}, or lower max_prompt_tokens.",
        )
