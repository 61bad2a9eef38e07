"""Hugging Face models that take packed rows: any whose attention comes from `AttentionInterface`.

The mask that a model makes at the start of its forward pass is replaced by a `Sight` of the tree, which travels to each layer in the mask's
place. Whatever is not packed is computed exactly as before.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.pack import Row
from training.shared_prompt import Packed, Tree, pack_rows
from training.tree_attention import Scoring, tree_attention

PREFIX = "rankloop_"

_tree: ContextVar[Tree | None] = ContextVar("tree", default=None)


class CannotShare(Exception):
    """This architecture's mask or attention is not one that a tree can stand for."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a layer gets in place of a mask: the tree, and how many positions back a token sees (0: all)."""

    tree: Tree
    window: int


def packs_rows(backbone: Any) -> bool:
    """Whether packed rows give this model's own states. Tried once, on a few tokens; `unpacked_reason` says why not."""
    if not hasattr(backbone, "_rankloop_unpacked"):
        backbone._rankloop_unpacked = _why_not(backbone)
    return not backbone._rankloop_unpacked


def unpacked_reason(backbone: Any) -> str:
    """Empty where rows are packed; else a sentence for the run's events."""
    if packs_rows(backbone):
        return ""
    return f"{type(backbone).__name__} cannot share prompts: {backbone._rankloop_unpacked}. Each completion is encoded with its prompt."


def packed_states(backbone: Any, packed: Packed, *, copies: int = 1) -> Tensor:
    """(C, T, H): the last layer's states of a packed row, `copies` of it side by side (adapters may differ between them).

    Raises:  CannotShare if the model cannot take a tree.
    """
    _use_tree_attention(backbone)
    with _packed(packed.tree):
        return backbone(
            input_ids=packed.input_ids.expand(copies, -1), position_ids=packed.position_ids.expand(copies, -1), use_cache=False
        ).last_hidden_state


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Inside, the model has the attention it was loaded with, for code that knows only those of transformers."""
    now = str(model.config._attn_implementation)
    if not now.startswith(PREFIX):
        yield
        return
    model.set_attn_implementation(now.removeprefix(PREFIX))
    try:
        yield
    finally:
        model.set_attn_implementation(now)


@contextmanager
def _packed(tree: Tree) -> Iterator[None]:
    token = _tree.set(tree)
    try:
        yield
    finally:
        _tree.reset(token)


def _use_tree_attention(backbone: Any) -> None:
    now = str(backbone.config._attn_implementation)
    if now.startswith(PREFIX):
        return
    if now not in ("sdpa", "eager"):
        raise CannotShare(f"its attention is {now}")
    backbone.set_attn_implementation(PREFIX + now)
    if backbone.config._attn_implementation != PREFIX + now:
        raise CannotShare("its attention cannot be exchanged")


@torch.no_grad()
def _why_not(backbone: Any) -> str:
    vocabulary = int(backbone.config.get_text_config().vocab_size)
    prompt = [(5 + 3 * place) % vocabulary for place in range(9)]
    rows = [Row(prompt, [(7 * place + number) % vocabulary for place in range(number + 2)]) for number in range(3)]
    (packed,) = pack_rows(rows, budget=1 << 30, share=True)
    packed = packed.to(backbone.device)
    before = str(backbone.config._attn_implementation)
    why = ""
    try:
        with torch.autocast(backbone.device.type, enabled=False):
            ours = packed_states(backbone, packed)[0][packed.ends].float()
            theirs = torch.stack([_own_state(backbone, rows[row]) for row in packed.rows])
        off, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        exact = getattr(backbone, "hf_quantizer", None) is None and next(backbone.parameters()).dtype == torch.float32
        if not off <= (1e-3 if exact else 5e-2) * size:
            why = f"its states differ by {off:.2g} when a prompt is shared"
    except (CannotShare, TypeError, ValueError, AttributeError, RuntimeError) as error:
        why = str(error) or type(error).__name__
    if why and str(backbone.config._attn_implementation) != before:
        backbone.set_attn_implementation(before)
    return why


def _own_state(backbone: Any, row: Row) -> Tensor:
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=backbone.device)
    return backbone(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()


def _mask(plain: str) -> Any:
    def make(*args: Any, **given: Any) -> Any:
        tree = _tree.get()
        if tree is None:
            return ALL_MASK_ATTENTION_FUNCTIONS[plain](*args, **given)
        if given.get("use_vmap") or getattr(given.get("config"), "attention_chunk_size", None):
            raise CannotShare("its mask is neither causal nor a sliding window")
        return Sight(tree, int(given.get("local_size") or 0))

    return make


def _attention(plain: str) -> Any:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
        if not isinstance(attention_mask, Sight):
            if _tree.get() is not None:
                raise CannotShare("a layer makes a mask of its own")
            return _plain(plain, module)(module, query, key, value, attention_mask, **given)
        if given.get("s_aux") is not None or given.get("position_bias") is not None:
            raise CannotShare("its attention has sinks or biases")
        scaling = given.get("scaling")
        scoring = Scoring(
            scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            softcap=float(given.get("softcap") or 0.0),
            window=attention_mask.window,
        )
        return tree_attention(query, key, value, attention_mask.tree, scoring), None

    return attend


def _plain(name: str, module: nn.Module) -> Any:
    if name == "eager":  # each family has its own
        return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return ALL_ATTENTION_FUNCTIONS[name]


for _name in ("sdpa", "eager"):
    AttentionInterface.register(PREFIX + _name, _attention(_name))
    AttentionMaskInterface.register(PREFIX + _name, _mask(_name))
