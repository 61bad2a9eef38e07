"""Frozen weights in 4 or 8 bits under LoRA adapters (QLoRA), by bitsandbytes.

Source:  Dettmers et al. 2023, arXiv:2305.14314: NormalFloat4 with double quantisation; Dettmers et al. 2022, arXiv:2208.07339: LLM.int8().
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from training.encode import split_gguf
from training.errors import InputError


def quantised(kind: str, name: str | Path, *, device: torch.device | str) -> dict[str, Any]:
    """What `from_pretrained` needs to load a model with its linear layers quantised; {} for `kind` "". Heads stay in float32.

    Args:    kind: "", "4bit" or "8bit";  name: of the model, for errors.
    Raises:  InputError without bitsandbytes, where it cannot compute on the device, or for a .gguf file.
    """
    if not kind:
        return {}
    if split_gguf(name)[1]:
        raise InputError(
            f"quantise = {kind!r}: {name} is a .gguf file.", remedy="Name a model folder with safetensors, or leave quantise out."
        )
    if find_spec("bitsandbytes") is None:
        raise InputError(f"quantise = {kind!r} needs bitsandbytes, which is not installed.", remedy="pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    _try(kind, torch.device(device))
    if kind == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        compute = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}


def _try(kind: str, device: torch.device) -> None:
    """One small product and its gradient: where the library has no kernels for a device, it says so only when it computes."""
    import bitsandbytes

    try:
        if kind == "8bit":
            layer: torch.nn.Module = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        else:
            layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        states = torch.ones(2, 64, device=device, requires_grad=True)
        layer.to(device)(states).sum().backward()
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        raise InputError(
            f"quantise = {kind!r}: bitsandbytes {bitsandbytes.__version__} does not work on {device}: {error}",
            remedy="Install the build of bitsandbytes for this device, or leave quantise out.",
        ) from error
