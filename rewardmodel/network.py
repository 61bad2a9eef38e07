"""The reward network: a causal language model with one score in place of its vocabulary.

The artefact is a standard `AutoModelForSequenceClassification` of one label. Transformers finds the last token by the id of padding,
which is wrong wherever padding and end of text share an id; here it is found by the mask.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from training.encode import split_gguf
from training.errors import InputError
from training.language_model import Lora, add_lora, hidden_states, load_pretrained, prepare, unwrap

HEAD = "score"


def load_reward_model(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    lora: Lora | None = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Any:
    """A reward model from its folder, or a new one on the backbone of any causal language model (its head starts at zero: all equal).

    Args:    name: folder, hub name or `folder/file.gguf`;  lora: adapters on the backbone, with the head trained in full.
    Raises:  InputError if nothing can be loaded or the architecture has no score head.
    """
    is_new = not is_reward_model(name)
    model: Any = load_pretrained(AutoModelForSequenceClassification, name, num_labels=1)
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise InputError(f"{type(model).__name__} has no head named {HEAD}.", remedy="Use a causal language model such as Llama or Qwen.")
    if is_new:
        nn.init.zeros_(model.score.weight)
        if model.score.bias is not None:
            nn.init.zeros_(model.score.bias)
    if lora is not None:
        keep = Lora(lora.rank, lora.alpha, lora.targets, (HEAD,))
        model = add_lora(model, keep, task="SEQ_CLS", seed=seed)
    return prepare(model, device=device, gradient_checkpointing=gradient_checkpointing)


def is_reward_model(name: str | Path) -> bool:
    """Whether the folder's weights have a score head already."""
    folder, gguf_file = split_gguf(name)
    if gguf_file:
        return False
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"No model can be loaded from {name}: {error}", remedy="Name a model folder or a hub name.") from error
    return any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or [])


def scores(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score of each row, read at its last real token.

    Shapes:  B rows of T tokens, padded on either side.
    Args:    input_ids, attention_mask (B, T), at least one real token in each row.
    Returns: (B,) float32, not normalised.
    """
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask.long() * places).argmax(-1)
    states = hidden_states(unwrap(model).base_model, input_ids, attention_mask)
    return head_scores(model, states[torch.arange(len(last), device=last.device), last])


def token_values(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Score read at each token, (B, T) float32, 0 on padding: what PPO's value model starts from."""
    states = hidden_states(unwrap(model).base_model, input_ids, attention_mask)
    return head_scores(model, states) * attention_mask


def head_scores(model: Any, states: Tensor) -> Tensor:
    """(..., H) states of the backbone -> (...) float32 scores."""
    with torch.autocast(states.device.type, enabled=False):
        head: Any = unwrap(model).score
        return head(states.float())[..., 0].float()
