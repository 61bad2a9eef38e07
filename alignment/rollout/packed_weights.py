"""Weights made ready while completions are written, for as long as they do not change.

The adapter that speaks is added to its layer's weight: with a token a row, its two small products cost more than they compute. On a CPU
large matrices are put in oneDNN's own order: with few rows a product is bound by how its weights lie in memory, and a large
head then takes half the time. The numbers are float32's own, in another order of summation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.slots import SlotLora

# A second copy of the weights is held: of the largest matrices, while they fit.
MOST_BYTES = 256 * 2**20
# Smaller products gain nothing.
LEAST_WEIGHTS = 2**18
# The order is best for about so many rows, and good for any from 4 on.
ROWS = 32


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, layers with one adapter speaking use their sum, and the large float32 `nn.Linear` of a model on a CPU packed copies, as far
    as MOST_BYTES go for each; what is no such layer is left as it is. No gradients.

    The weights must not change inside."""
    chosen: list[nn.Module] = []
    try:
        left = MOST_BYTES
        for adapted in [module for module in model.modules() if isinstance(module, SlotLora)]:
            if not adapted.merges:
                continue
            left -= sum(weight.numel() * 4 for weight in adapted.layer.parameters())
            if left >= 0:
                weight, bias = adapted.merged_weight()
                adapted.forward = partial(_plain, weight, bias)  # type: ignore[method-assign]
                chosen.append(adapted)
        for linear in _layers(model):
            linear.forward = partial(_forward, _packed(linear.weight), linear.bias)  # type: ignore[method-assign]
            chosen.append(linear)
        yield
    finally:
        for layer in chosen:
            del layer.forward


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The largest ones first, while their copies fit."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return []
    left = MOST_BYTES
    chosen = []
    inside = {module.layer for module in model.modules() if isinstance(module, SlotLora)}
    found = [module for module in model.modules() if type(module) is nn.Linear and _packs(module) and module not in inside]
    for layer in sorted(found, key=lambda layer: -layer.weight.numel()):
        size = layer.weight.numel() * layer.weight.element_size()
        if size <= left:
            left -= size
            chosen.append(layer)
    return chosen


def _packs(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, Tensor) and "forward" not in vars(layer)
    return plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _packed(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _plain(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return F.linear(states, weight, bias)


def _forward(packed: Any, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
