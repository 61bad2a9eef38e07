"""Weights in oneDNN's own order while a CPU decodes: with few rows a product is bound by how its weights lie in memory, and a large
head then takes half the time. The numbers are float32's own, in another order of summation."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# A second copy of the weights is held: of the largest matrices, while they fit.
MOST_BYTES = 256 * 2**20
# Smaller products gain nothing.
LEAST_WEIGHTS = 2**18
# The order is best for about so many rows, and good for any from 4 on.
ROWS = 32


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the large float32 `nn.Linear` of a model on a CPU use packed copies; what is no such layer is left as it is. No gradients.

    The weights must not change inside."""
    chosen: list[nn.Linear] = []
    try:
        for layer in _layers(model):
            layer.forward = partial(_forward, _packed(layer.weight), layer.bias)  # type: ignore[method-assign]
            chosen.append(layer)
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
    found = [module for module in model.modules() if type(module) is nn.Linear and _packs(module)]
    for layer in sorted(found, key=lambda layer: -layer.weight.numel()):
        left -= layer.weight.numel() * layer.weight.element_size()
        if left < 0:
            break
        chosen.append(layer)
    return chosen


def _packs(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = type(weight) in (nn.Parameter, Tensor) and "forward" not in vars(layer)
    return plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _packed(weight: Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)


def _forward(packed: Any, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
