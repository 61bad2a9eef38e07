"""A model with adapters as a plain one: adapters added to the weights, quantised weights as floats, in a standard architecture.

Nothing is copied but what is written: each merged tensor is made by itself and goes to the CPU, and the live model stays as it is.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def merged(model: Any) -> PreTrainedModel:
    """The model inside a LoRA wrapper (peft's, or one that answers to the same names) with its active adapters merged, on the CPU.

    Layers whose adapters cannot be merged into one weight (an ensemble's) come without them.
    """
    inside = model.get_base_model()
    config = copy.deepcopy(inside.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(inside)(config)
    tensors = {name: _tensor(inside, *name.rpartition(".")[::2]) for name in plain.state_dict()}
    plain.load_state_dict(tensors, assign=True)
    plain.tie_weights()
    if hasattr(inside, "generation_config"):
        plain.generation_config = inside.generation_config
    return plain


def _tensor(inside: nn.Module, parent: str, leaf: str) -> Tensor:
    """One tensor of the plain model, found in the adapted one and merged."""
    module: Any = inside.get_submodule(parent)
    if hasattr(module, "modules_to_save"):  # a layer trained in full beside the adapters: the score head
        module = module.modules_to_save[module.active_adapter]
    changes: list[Tensor] = []
    if hasattr(module, "get_base_layer"):
        if leaf == "weight" and hasattr(module, "get_delta_weight"):
            changes = [module.get_delta_weight(adapter) for adapter in module.active_adapters]
        module = module.get_base_layer()
    tensor = plain_weight(module) if leaf == "weight" else getattr(module, leaf)
    for change in changes:
        tensor = tensor + change.to(tensor.dtype)
    return tensor.detach().cpu()


def plain_weight(layer: Any) -> Tensor:
    """A layer's weight; what bitsandbytes keeps in 4 or 8 bits becomes float32."""
    if type(layer.weight).__name__ not in ("Params4bit", "Int8Params"):
        return layer.weight
    from peft.utils.integrations import dequantize_module_weight

    # On some CPUs bitsandbytes repacks 4-bit weights at the first pass; asking for the state puts them back in the order that is
    # dequantised. yer.state_dict()
    return dequantize_module_weight(layer).float()
