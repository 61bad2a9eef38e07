"""Options of a run: frozen dataclasses that refuse unknown keys, wrong types and values out of range.

No torch and no Django here, so that the command line can check options before anything heavy starts.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from training.errors import InputError

T = TypeVar("T")


class OptionError(InputError):
    """An option that does not exist, has the wrong type or is out of range."""


def parse_options(cls: type[T], mapping: Mapping[str, Any], where: str = "options") -> T:
    """Build the dataclass `cls` from plain values (from TOML, JSON or `--set`).

    Args:    cls: a dataclass whose fields all have defaults or must be given;  mapping: {name: value};  where: named in errors.
    Raises:  OptionError for an unknown key (with the near name), a wrong type, a missing value, or a range that `__post_init__` refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise OptionError(f"{where}: there is no option {key!r}.{_near(key, fields)}", remedy=f"Known: {', '.join(sorted(fields))}.")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in mapping.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise OptionError(f"{where}: {', '.join(missing)} must be given.")
    try:
        return cls(**values)
    except OptionError as error:
        raise OptionError(f"{where}: {error}", remedy=error.remedy) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["epochs=2", "schedule=linear"]` -> `{"epochs": 2, "schedule": "linear"}`: values are TOML, or else plain text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"{assignment!r} is not of the form key=value.")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text.strip()
    return values


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments:
            near = _near(str(value), [str(item) for item in arguments])
            raise OptionError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}.{near}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise OptionError(f"{where}: expected a list, got {value!r}.")
        return origin(_convert(arguments[0], item, where) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise OptionError(f"{where}: {value!r} is not a finite number.")
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise OptionError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}.")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    error: OptionError | None = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, where)
        except OptionError as raised:
            error = raised
    raise error or OptionError(f"{where}: {value!r} is not allowed.")


def require(holds: bool, message: str) -> None:
    """For `__post_init__`: raise OptionError(message) unless `holds`."""
    if not holds:
        raise OptionError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What every trainer shares. Lengths in tokens; `0` means "off" or "decide for me" where the comment says so."""

    template: Literal["", "chat", "plain"] = ""  # "": as remembered in the model folder, else chat if the tokenizer has a template
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 512
    max_dropped_share: float = 0.02  # more rows over length (or otherwise unusable) than this end the run

    epochs: float = 1.0
    max_steps: int = 0  # 0: by epochs
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: float = 0.05
    final_learning_rate_share: float = 0.1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_gradient_norm: float = 1.0  # 0: no clipping

    lora_rank: int = 0  # 0: train all weights
    lora_alpha: float = 0.0  # 0: twice the rank
    lora_targets: tuple[str, ...] = ("all-linear",)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    quantise: Literal["", "4bit", "8bit"] = ""  # the frozen base under LoRA adapters (QLoRA); needs lora_rank and bitsandbytes
    tokens_per_micro_batch: int = 4096  # memory, not the update, depends on it; halved where memory runs out

    log_steps: int = 10
    evaluate_steps: int = 0  # 0: at the end only
    checkpoint_seconds: float = 300.0  # 0: never by time
    checkpoint_steps: int = 0  # 0: never by count
    keep_checkpoints: int = 2
    verify_saved: bool = True  # load the saved model again and compare it with the trained one

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_completion_tokens", "tokens_per_micro_batch", "log_steps", "keep_checkpoints"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1.")
        for name in ("max_steps", "lora_rank", "evaluate_steps", "checkpoint_steps"):
            require(getattr(self, name) >= 0, f"{name} must not be negative.")
        for name in ("weight_decay", "max_gradient_norm", "lora_alpha", "checkpoint_seconds"):
            require(getattr(self, name) >= 0, f"{name} must not be negative.")
        for name in ("max_dropped_share", "warmup_share", "final_learning_rate_share"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1.")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must be at least 0 and below 1.")
        require(self.epochs > 0 or self.max_steps > 0, "epochs must be positive, or max_steps given.")
        require(self.learning_rate > 0, "learning_rate must be positive.")
        require(self.adam_epsilon > 0, "adam_epsilon must be positive.")
        require(not self.quantise or self.lora_rank > 0, "quantise needs LoRA adapters to train: set lora_rank, 16 for example.")
