"""Causal language models: loading, LoRA, log-probabilities of completions, saving.

Weights are kept in float32; `Processes.autocast` brings bfloat16 to the matrices. Dropout is off everywhere: what is sampled, what
is trained and what is measured are one distribution.
"""

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.encode import Encoder, split_gguf
from training.errors import InputError
from training.merge import merged
from training.options import TrainingOptions
from training.quantise import quantised
from training.rundir import replace_folder
from training.sharding import one_pass

# Logits of one chunk of positions may take this much; more chunks are recomputed in the backward pass.
LOGIT_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters on the named modules; `keep` are modules trained in full and saved with them (the score head).

    `quantise` ("4bit" or "8bit") keeps the frozen weights below them in fewer bits.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("all-linear",)
    keep: tuple[str, ...] = ()
    quantise: str = ""

    @classmethod
    def of(cls, options: TrainingOptions, *, keep: tuple[str, ...] = ()) -> "Lora | None":
        if not options.lora_rank:
            return None
        return cls(options.lora_rank, options.lora_alpha or 2.0 * options.lora_rank, options.lora_targets, keep, options.quantise)


def load_policy(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    quantise: str = "",
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Any:
    """A causal language model with float32 weights, dropout off, scaled-dot-product attention; with LoRA only the adapters train.

    Args:    name: a model folder, a hub name, or `folder/file.gguf`;  seed: of the adapters' start.
    Raises:  InputError if nothing can be loaded from there.
    """
    model = load_pretrained(AutoModelForCausalLM, name, **quantised(lora.quantise if lora else quantise, name, device=device))
    if lora is not None:
        model = add_lora(model, lora, task="CAUSAL_LM", seed=seed)
    return prepare(model, device=device, gradient_checkpointing=gradient_checkpointing)


def load_pretrained(auto_class: Any, name: str | Path, **extra: Any) -> PreTrainedModel:
    folder, gguf_file = split_gguf(name)
    if gguf_file:
        extra["gguf_file"] = gguf_file
    else:
        extra["use_safetensors"] = True
    for attention in ("sdpa", "eager"):
        try:
            model = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, **extra)
        except (OSError, ValueError, ImportError) as error:
            if attention == "eager" or "attention" not in str(error):
                raise InputError(
                    f"No model can be loaded from {name}: {error}",
                    remedy="Name a model folder with config.json and safetensors, a hub name, or a .gguf file.",
                ) from error
        else:
            return _as_if_never_quantised(model) if gguf_file else model
    raise AssertionError("unreachable")


def _as_if_never_quantised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of a GGUF file are plain float32 once loaded; transformers would still refuse to save them."""
    model.hf_quantizer = None  # type: ignore[assignment]
    for name in ("is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None if name == "quantization_method" else False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def prepare(model: Any, *, device: torch.device | str, gradient_checkpointing: bool = False) -> Any:
    """Dropout off (also where a module keeps its own rate), key-value cache off, on its device."""
    turn_off_dropout(model)
    plain = unwrap(model)
    for module in plain.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in place at the first pass: what is saved afterwards would be other weights, and
        # layers narrower than a block fail.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    plain.config.use_cache = False
    if gradient_checkpointing:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if is_adapted(model):
            plain.enable_input_require_grads()
        model.train()  # transformers recomputes activations in training mode only; there is no dropout left to wake
    return model if is_quantised(model) else model.to(device)  # what is quantised was loaded to its device, and refuses to be moved


def turn_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_pdrop", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def add_lora(model: PreTrainedModel, lora: Lora, *, task: Literal["CAUSAL_LM", "SEQ_CLS"], seed: int) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model  # here, because loading it takes as long as torch does, and most runs need none

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear" if lora.targets == ("all-linear",) else list(lora.targets),
        modules_to_save=list(lora.keep) or None,
        task_type=TaskType(task),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def is_adapted(model: Any) -> bool:
    """Whether this is peft's wrapper around a model with LoRA adapters."""
    return hasattr(model, "get_base_model")


def is_quantised(model: Any) -> bool:
    """Whether the frozen weights under the adapters are kept in 4 or 8 bits (QLoRA)."""
    return getattr(unwrap(model), "hf_quantizer", None) is not None


def unwrap(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside (LoRA layers stay in place and stay active)."""
    return model.get_base_model() if is_adapted(model) else model


@contextmanager
def reference(model: Any, frozen: Any = None) -> Iterator[Any]:
    """The reference policy: `frozen` if given, else `model` with its LoRA adapter off. No gradients inside.

    Raises:  ValueError for a model without LoRA and no frozen second model.
    """
    with torch.no_grad():
        if frozen is not None:
            yield frozen
        elif is_adapted(model):
            with model.disable_adapter():
                yield model
        else:
            raise ValueError("a reference needs a LoRA policy, whose adapter can be switched off, or a frozen second model")


def frozen_copy(model: Any) -> Any:
    """A second model of the same weights that never trains."""
    twin = copy.deepcopy(model).eval()
    return twin.requires_grad_(False)


def hidden_states(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, H): the last layer's output. Positions count real tokens only, so padding on either side changes nothing."""
    accepted = _accepted(type(backbone).forward)
    extra: dict[str, Any] = {}
    if "position_ids" in accepted:
        extra["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        extra["use_cache"] = False
    return backbone(input_ids=input_ids, attention_mask=attention_mask, **extra).last_hidden_state


@lru_cache(maxsize=32)
def _accepted(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def completion_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each completion token given all tokens before it; 0 elsewhere.

    Shapes:  B rows of T tokens.   Units: nats.
    Args:    input_ids, attention_mask, completion_mask (B, T);  temperature: > 0, divides the logits.
    Returns: (B, T) float32: entry t belongs to token t (not t + 1). Logits exist for the needed positions only, a chunk at a time.
    Raises:  ValueError if temperature <= 0, or a completion begins at a row's first token (nothing predicts it).
    """
    return completion_statistics(model, input_ids, attention_mask, completion_mask, temperature, entropy=False)[0]


@one_pass
def completion_statistics(
    model: Any, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, temperature: float = 1.0, *, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """As `completion_logps`, and the entropy in nats of the distribution each completion token was drawn from, (B, T) float32."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    plain = unwrap(model)
    wanted = completion_mask[:, 1:].bool()
    rows, places = wanted.nonzero(as_tuple=True)
    targets = input_ids[rows, places + 1]
    head = output_head(plain)
    if head is None:
        logits = plain(input_ids=input_ids, attention_mask=attention_mask).logits[rows, places]
        logps, entropies = _from_logits(logits.float() / temperature, targets, entropy)
    else:
        states = hidden_states(plain.base_model, input_ids, attention_mask)[rows, places]
        logps, entropies = _in_chunks(head, states, targets, temperature, entropy)
    shape = (input_ids.shape[0], input_ids.shape[1])
    filled = torch.zeros(shape, dtype=torch.float32, device=logps.device).index_put((rows, places + 1), logps)
    if entropies is None:
        return filled, None
    return filled, torch.zeros(shape, dtype=torch.float32, device=logps.device).index_put((rows, places + 1), entropies)


def state_logps(head: "Head | None", states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """(N,) float32: log-probability in nats of each target, given the states (N, H) that predict them; logits exist a chunk at a time.

    Args:    head: None where the states are logits already."""
    if head is None:
        return _from_logits(states.float() / temperature, targets, False)[0]
    return _in_chunks(head, states, targets, temperature, False)[0]


def _in_chunks(head: "Head", states: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    size = max(1, LOGIT_CHUNK_BYTES // (4 * head.vocabulary))

    def part(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden)
        return _from_logits(logits if temperature == 1.0 else logits / temperature, target, entropy)

    if len(targets) <= size:
        return part(states, targets)
    parts = []
    for hidden, target in zip(states.split(size), targets.split(size), strict=True):
        parts.append(checkpoint(part, hidden, target, use_reentrant=False) if torch.is_grad_enabled() else part(hidden, target))
    logps = torch.cat([logps for logps, _ in parts])
    return logps, torch.cat([entropies for _, entropies in parts if entropies is not None]) if entropy else None


def _from_logits(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    if not entropy:
        return -F.cross_entropy(logits, targets, reduction="none"), None
    logps = logits.log_softmax(-1)
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


class Head:
    """Hidden states to float32 logits as the model itself does it: its output matrix, then the scaling some families add."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layer: Any = model.get_output_embeddings()
        self.multiply = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        self.cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.vocabulary = int(config.vocab_size)

    def __call__(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            logits = self.layer(states.float()).float()
        if self.multiply != 1.0:
            logits = logits * self.multiply
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits


def output_head(model: PreTrainedModel) -> Head | None:
    """The model's head, once it has been shown to give the model's own logits; None where it does not (the whole model is then called)."""
    if not hasattr(model, "_rankloop_head"):
        head = Head(model) if model.get_output_embeddings() is not None else None
        if head is not None:
            ids = torch.arange(4, device=model.device)[None] % head.vocabulary
            ones = torch.ones_like(ids)
            with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
                own = model(input_ids=ids, attention_mask=ones).logits.float()
                ours = head(hidden_states(model.base_model, ids, ones))
            if ours.shape != own.shape or not torch.allclose(ours, own, rtol=1e-3, atol=1e-3):
                head = None
        model._rankloop_head = head  # type: ignore[assignment]
    return model._rankloop_head  # type: ignore[return-value]


def save_model(model: Any, encoder: Encoder, folder: str | Path, *, notes: dict[str, Any] | None = None) -> None:
    """A standard model directory (safetensors, tokenizer, `rankloop_encoder.json`), whole or absent.

    A LoRA model is merged, so that plain transformers loads it, a quantised one into float32 weights; the adapter itself is kept in
    `adapter/`. Merged weights take four bytes a parameter in the CPU's memory while they are written.

    Args:    notes: {file name: JSON content} written beside the weights (`rankloop_reward.json`).
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if is_adapted(model):
        model.save_pretrained(beside / "adapter", safe_serialization=True)
    plain: Any = merged(model) if is_adapted(model) else model
    keep_cache = plain.config.use_cache
    plain.config.use_cache = True
    pad_id = None if hasattr(plain, "score") and encoder.pad_id in encoder.stop_ids else encoder.pad_id
    # Transformers reads a score at the last token that is not padding: with padding = end of text it would miss the end of text.
    # Without a padding id it reads at the last position, and refuses batches instead of scoring them wrongly.
    plain.config.pad_token_id = plain.config.get_text_config().pad_token_id = pad_id
    plain.save_pretrained(beside, safe_serialization=True)
    plain.config.use_cache = keep_cache
    encoder.save(beside)
    for name, content in (notes or {}).items():
        (beside / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    replace_folder(beside, folder)
