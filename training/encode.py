"""Messages and completions to tokens and back, the same way in every trainer and in generation.

A prompt and a completion are encoded apart and joined: the tokens that are trained are exactly those that sampling after the prompt can
produce, and the boundary never moves. The encoder travels with each model as `rankloop_encoder.json`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from training.errors import InputError
from training.options import TrainingOptions
from training.rundir import write_atomically

ENCODER_FILE = "rankloop_encoder.json"
ENCODER_FORMAT = "rankloop.encoder/1"
PLAIN_SEPARATOR = "\n"

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class TooLong(Exception):
    """A text over the token limit. `part` is "prompt", "completion", or "prompt and completion" (over the model's positions)."""

    part: str
    tokens: int
    limit: int

    def __str__(self) -> str:
        return f"{self.part} of more than {self.limit} tokens"


def split_gguf(name: str | Path) -> tuple[str, str | None]:
    """`"folder/file.gguf"` -> `("folder", "file.gguf")`; any other name -> `(name, None)`."""
    path = Path(name)
    return (str(path.parent), path.name) if path.suffix.lower() == ".gguf" else (str(name), None)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    folder, gguf_file = split_gguf(name)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"No tokenizer can be loaded from {name}: {error}", remedy="Name a Hugging Face model folder.") from error
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer of {name} is not a fast one.", remedy="Save it with a tokenizer.json.")
    return tokenizer


class Encoder:
    """A tokenizer, a template, and the tokens that end a turn."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: Literal["chat", "plain"],
        separator: str = PLAIN_SEPARATOR,
        extra_stop_ids: Sequence[int] = (),
        max_prompt_tokens: int = 512,
        max_completion_tokens: int = 512,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.separator = separator
        self.max_prompt_tokens = max_prompt_tokens
        self.max_completion_tokens = max_completion_tokens
        self.max_positions: int | None = None  # of the model, where its configuration says so
        self.boundary_moves = 0  # prompts where the chat template renders the full conversation in other tokens than prompt + completion
        if template == "chat" and not tokenizer.chat_template:
            raise InputError("template = chat, but the tokenizer has no chat template.", remedy="Set template = plain.")
        self.end_id = self._end_of_turn()
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids = frozenset([self.end_id, *eos, *extra_stop_ids])
        self.pad_id = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id)
        bos = tokenizer.bos_token_id
        self._bos: list[int] = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        self.digest = self._digest()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        template: str | None = None,
        max_prompt_tokens: int = 512,
        max_completion_tokens: int = 512,
    ) -> Self:
        """From a model folder (or hub name, or `folder/file.gguf`).

        Args:    template: "chat", "plain", or None/"": as remembered in the folder, else chat where the tokenizer has a template.
        Raises:  InputError if there is no fast tokenizer, no end-of-text token, or the remembered digest is not that of the files.
        """
        tokenizer = load_tokenizer(folder)
        remembered = _remembered(folder)
        chosen = template or remembered.get("template") or ("chat" if tokenizer.chat_template else "plain")
        encoder = cls(
            tokenizer,
            template=chosen,  # type: ignore[arg-type]
            separator=remembered.get("separator", PLAIN_SEPARATOR),
            extra_stop_ids=_generation_stop_ids(folder, len(tokenizer)),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
        )
        encoder.max_positions = _positions(folder)
        if remembered and chosen == remembered.get("template") and remembered.get("digest") != encoder.digest:
            raise InputError(
                f"{folder}: the tokenizer or chat template is not the one that {ENCODER_FILE} was written with.",
                remedy=f"Put the original tokenizer files back, or delete {ENCODER_FILE} if the change is meant.",
            )
        return encoder

    @classmethod
    def of(cls, folder: str | Path, options: TrainingOptions) -> Self:
        """As `load`, with a trainer's template and limits."""
        return cls.load(
            folder,
            template=options.template,
            max_prompt_tokens=options.max_prompt_tokens,
            max_completion_tokens=options.max_completion_tokens,
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens up to where the completion begins, with at most one BOS.

        Raises:  TooLong over `max_prompt_tokens`;  ValueError if there is no token at all.
        """
        if self.template == "chat":
            text = self._render(messages, add_generation_prompt=True)
            ids = self._ids(text)
        else:
            ids = self._bos + self._ids("\n".join(message["content"] for message in messages) + self.separator)
        if len(ids) > self.max_prompt_tokens:
            raise TooLong("prompt", len(ids), self.max_prompt_tokens)
        if not ids:
            raise ValueError("prompt without a token: nothing would predict the completion's first one")
        return ids

    def completion_ids(self, text: str) -> list[int]:
        """Tokens of a completion, ending in the token that ends the turn (which is trained).

        Raises:  TooLong over `max_completion_tokens`;  ValueError if the text itself holds a token that ends a turn.
        """
        ids = self._ids(text)
        if not self.stop_ids.isdisjoint(ids):
            raise ValueError("completion holds an end-of-turn token")
        ids.append(self.end_id)
        if len(ids) > self.max_completion_tokens:
            raise TooLong("completion", len(ids), self.max_completion_tokens)
        return ids

    def check_length(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        """Raises TooLong if both together are more than the model has positions for."""
        tokens = len(prompt_ids) + len(completion_ids)
        if self.max_positions is not None and tokens > self.max_positions:
            raise TooLong("prompt and completion", tokens, self.max_positions)

    def check_boundary(self, messages: Sequence[Message], text: str) -> bool:
        """Whether the chat template renders the whole conversation in the same tokens as prompt + completion. Misses are counted."""
        if self.template == "plain":
            return True
        whole = self._ids(self._render([*messages, {"role": "assistant", "content": text}], add_generation_prompt=False))
        joined = self._ids(self._render(messages, add_generation_prompt=True)) + self._ids(text) + [self.end_id]
        same = whole[: len(joined)] == joined
        self.boundary_moves += not same
        return same

    def decode(self, ids: Sequence[int]) -> str:
        """Text of completion tokens, up to the first token that ends the turn, without special tokens."""
        kept = []
        for token in ids:
            if int(token) in self.stop_ids:
                break
            kept.append(int(token))
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: str | Path) -> None:
        """Tokenizer files and `rankloop_encoder.json`."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        content = {
            "format": ENCODER_FORMAT,
            "template": self.template,
            "separator": self.separator,
            "end_id": self.end_id,
            "stop_ids": sorted(self.stop_ids),
            "pad_id": self.pad_id,
            "digest": self.digest,
        }
        write_atomically(folder / ENCODER_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt))

    def _end_of_turn(self) -> int:
        """The special token that the chat template puts after an assistant's turn, else the tokenizer's end-of-text token."""
        if self.template == "chat":
            question = [{"role": "user", "content": "a"}]
            opening = self._render(question, add_generation_prompt=True)
            whole = self._render([*question, {"role": "assistant", "content": "b"}], add_generation_prompt=False)
            tail = whole[len(opening) :] if whole.startswith(opening) else whole[whole.rfind("b") :]
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
            for token in self._ids(tail.lstrip().removeprefix("b")):
                if self.tokenizer.convert_ids_to_tokens(token) in special:
                    return int(token)
        if self.tokenizer.eos_token_id is None:
            raise InputError("The tokenizer has no end-of-text token.", remedy="Set eos_token in its tokenizer_config.json.")
        return int(self.tokenizer.eos_token_id)

    def _digest(self) -> str:
        parts: dict[str, Any] = {
            "template": self.template,
            "separator": self.separator if self.template == "plain" else None,
            "chat_template": self.tokenizer.chat_template if self.template == "chat" else None,
            "end_id": self.end_id,
            "bos": self._bos,
            # Only what turns text into ids counts: padding and truncation settings are left by whoever used the tokenizer last.
            "tokenizer": {
                key: value
                for key, value in json.loads(self.tokenizer.backend_tokenizer.to_str()).items()
                if key not in ("padding", "truncation", "post_processor", "version")
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _remembered(folder: str | Path) -> dict[str, Any]:
    file = Path(split_gguf(folder)[0]) / ENCODER_FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _positions(folder: str | Path) -> int | None:
    name, gguf_file = split_gguf(folder)
    if gguf_file:
        return None
    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError):
        return None
    return getattr(config, "max_position_embeddings", None)


def _generation_stop_ids(folder: str | Path, vocabulary: int) -> list[int]:
    """Further end tokens that the model's generation config names (Llama 3 has three)."""
    name, gguf_file = split_gguf(folder)
    if gguf_file:
        return []
    try:
        ids = GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        return []
    ids = ids if isinstance(ids, list) else [ids]
    return [token for token in ids if token is not None and token < vocabulary]
