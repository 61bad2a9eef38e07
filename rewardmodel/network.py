"""The reward network: a causal language model with one score, or one score a member, in place of its vocabulary.

The artefact is a standard `AutoModelForSequenceClassification` of one label a member. Transformers finds the last token by the id of
padding, which is wrong wherever padding and end of text share an id; here it is found by the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rewardmodel.members import ADAPTERS, AdapterEnsemble
from training.encode import split_gguf
from training.errors import InputError
from training.language_model import Lora, add_lora, hidden_states, load_pretrained, prepare, unwrap
from training.quantise import quantised
from training.sharding import one_pass

HEAD = "score"


@dataclass(frozen=True, slots=True)
class Ensemble:
    """How many members: M heads over one backbone, or M adapters with a head each (`rewardmodel.members`)."""

    size: int = 1
    kind: Literal["heads", "adapters"] = "heads"

    @classmethod
    def of(cls, size: int, kind: Literal["heads", "adapters"]) -> "Ensemble":
        """One member is one head, whatever the kind."""
        return cls(size, kind) if size > 1 else cls()


def load_reward_model(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    ensemble: Ensemble | None = None,
) -> Any:
    """A reward model from its folder, or a new one on the backbone of any causal language model.

    A single new head starts at zero: all completions equal. Several would then stay equal, so each starts at random with a standard
    deviation of 1 / sqrt(H + 1) (Stiennon et al. 2020, arXiv:2009.01325), which differs by seed.

    Args:    name: folder, hub name or `folder/file.gguf`;  lora: adapters on the backbone, with the head trained in full (a saved ensemble
             of adapters goes on with its own);  ensemble: of a new model; None: as the folder is.
    Raises:  InputError if nothing can be loaded, the architecture has no score head, or the folder is another ensemble.
    """
    found = saved_ensemble(name)
    if found and ensemble and found != ensemble:
        raise InputError(
            f"{name} is a reward model of {found.size} {found.kind}, not of {ensemble.size} {ensemble.kind}.",
            remedy=f"Set ensemble_size = {found.size} and ensemble = {found.kind!r}, or start from a policy.",
        )
    wanted = found or ensemble or Ensemble()
    in_bits = quantised(lora.quantise if lora else "", name, device=device)
    model: Any = load_pretrained(AutoModelForSequenceClassification, name, num_labels=wanted.size, **in_bits)
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(f"{type(model).__name__} has no head named {HEAD}.", remedy="Use a causal language model such as Llama or Qwen.")
    if not found:
        _start_heads(model.score, seed)
    if found and found.kind == "adapters":
        model = AdapterEnsemble.load(model, Path(name) / ADAPTERS)
    elif wanted.kind == "adapters":
        if lora is None:
            raise InputError("An ensemble of adapters needs LoRA.", remedy="Set lora_rank, or ensemble = 'heads'.")
        model = AdapterEnsemble(model, wanted.size, lora, seed=seed)
    elif lora is not None:
        model = _with_lora(model, lora, seed)
    return prepare(model, device=device, gradient_checkpointing=gradient_checkpointing)


def load_value_model(
    name: str | Path,
    normalisation: tuple[Sequence[float], Sequence[float]],
    *,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> tuple[Any, float, float]:
    """A model of one head that says, at the last token, what the ensemble's mean says there: the start of PPO's value model.

    Heads: their mean, exact, with each member's normalisation folded in: mean over m of (w_m h - mean_m) / scale_m is one row
    w = mean of w_m / scale_m, and one number. Adapters have no such sum: the first member alone.

    Args:    normalisation: (means, scales) of the members' scores.
    Returns: (model, mean, scale): its score, less mean, over scale, is the normalised one.
    """
    given: dict[str, Any] = {"device": device, "gradient_checkpointing": gradient_checkpointing}
    found = saved_ensemble(name) or Ensemble()
    if found.size == 1:
        return load_reward_model(name, lora=lora, seed=seed, **given), normalisation[0][0], normalisation[1][0]
    model = load_reward_model(name)
    if found.kind == "adapters":
        model = model.member(0)
    old = model.score
    head, mean, scale = mean_head(old, normalisation, found.kind)
    model.score = head
    model.config.num_labels = model.num_labels = 1
    model = prepare(model if lora is None else _with_lora(model, lora, seed), **given)
    return model, mean, scale


@torch.no_grad()
def mean_head(
    heads: nn.Linear, normalisation: tuple[Sequence[float], Sequence[float]], kind: Literal["heads", "adapters"]
) -> tuple[nn.Linear, float, float]:
    """One head that says what M heads say in the mean, or, of adapters, what the first says; and its (mean, scale): see
    `load_value_model`."""
    single = nn.Linear(heads.in_features, 1, bias=heads.bias is not None)
    used = len(heads.weight) if kind == "heads" else 1
    means, scales = (torch.tensor(list(numbers[:used]), dtype=torch.float32) for numbers in normalisation)
    if used == 1:
        weights, mean, scale = torch.ones(1), float(means), float(scales)
    else:
        weights, mean, scale = 1 / (scales * used), float((means / scales).mean()), 1.0
    single.weight.copy_(weights[None] @ heads.weight[:used].cpu())
    if heads.bias is not None:
        single.bias.copy_(weights[None] @ heads.bias[:used].cpu())
    return single.to(heads.weight.device), mean, scale


def _with_lora(model: Any, lora: Lora, seed: int) -> Any:
    return add_lora(model, replace(lora, keep=(HEAD,)), task="SEQ_CLS", seed=seed)


@torch.no_grad()
def _start_heads(head: nn.Linear, seed: int) -> None:
    if len(head.weight) == 1:
        nn.init.zeros_(head.weight)
    else:
        spread = (head.in_features + 1) ** -0.5
        head.weight.copy_(spread * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def is_reward_model(name: str | Path) -> bool:
    """Whether the folder's weights have a score head already."""
    return saved_ensemble(name) is not None


def saved_ensemble(name: str | Path) -> Ensemble | None:
    """What a folder's weights are: an ensemble (perhaps of one); None where they have no score head."""
    folder, gguf_file = split_gguf(name)
    if gguf_file:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"No model can be loaded from {name}: {error}", remedy="Name a model folder or a hub name.") from error
    if not any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or []):
        return None
    return Ensemble(config.num_labels, "adapters" if (Path(name) / ADAPTERS / "member-0").is_dir() else "heads")


@one_pass
def scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores of each row, read at its last real token.

    Shapes:  B rows of T tokens, padded on either side; M members.
    Args:    input_ids, attention_mask (B, T), at least one real token in each row.
    Returns: (B, M) float32, not normalised.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(-1)
    states = hidden_states(unwrap(model).base_model, input_ids, attention_mask)
    return head_scores(model, states[torch.arange(len(last), device=last.device), last])


@one_pass
def token_values(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score of a model of one head read at each token, (B, T) float32, 0 on padding: what PPO's value model says."""
    states = hidden_states(unwrap(model).base_model, input_ids, attention_mask)
    return head_scores(model, states)[..., 0] * attention_mask


def head_scores(model: Any, states: Tensor) -> Tensor:
    """States of the backbone, (..., H), or (..., M x H) of M adapters -> (..., M) float32 scores."""
    with torch.autocast(states.device.type, enabled=False):
        head: Any = unwrap(model).score
        if not isinstance(model, AdapterEnsemble):
            return head(states.float()).float()
        own = states.float().reshape(*states.shape[:-1], *head.weight.shape)
        points = (own * head.weight.float()).sum(-1)
        return points if head.bias is None else points + head.bias.float()
