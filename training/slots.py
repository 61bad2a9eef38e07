"""Several low-rank adapters, by name, over one set of frozen weights: a policy, its value model and its reward model share a backbone.

A slot is an adapter. Which slots speak is switched as a whole (`Slots.speaking`): one slot for an ordinary forward pass, several to have
each token computed once for each of them, side by side in one pass, and `BARE` for the weights without any adapter, which is the reference.
peft can switch adapters too, but choose them for each row only by hooks that are gone when activations are recomputed.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.errors import InputError
from training.language_model import Lora

BARE = ""  # the slot of no adapter
WEIGHTS = "adapter_model.safetensors"
MERGED_ROWS = 192  # from so many rows on one product with the sum of weights is faster than two more products with small matrices


class Switch:
    """Which slots speak in the next forward pass, one for each copy of the rows."""

    def __init__(self, slots: tuple[str, ...]) -> None:
        self.slots = slots


class SlotLora(nn.Module):
    """A frozen linear layer, and W x + (alpha / r) B A x for each slot that has matrices here.

    Shapes:  A (r, in), B (out, r); B of a new slot is zero, so that it starts as the backbone.
    Source:  Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.layer = layer
        self.switch = switch
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.scales: dict[str, float] = {}

    def put(self, slot: str, a: Tensor, b: Tensor, scale: float, *, trained: bool) -> None:
        device = next(self.layer.parameters()).device
        self.lora_a[slot] = nn.Parameter(a.to(device), requires_grad=trained)
        self.lora_b[slot] = nn.Parameter(b.to(device), requires_grad=trained)
        self.scales[slot] = scale

    def forward(self, states: Tensor) -> Tensor:
        """(C x B, ..., in) -> (C x B, ..., out), block c of the rows by the c-th slot that speaks."""
        slots = self.switch.slots
        here = [slot for slot in slots if slot in self.scales]
        if self._worth_merging(states):
            layer: Any = self.layer
            return MergedLora.apply(states, layer.weight, layer.bias, self.lora_a[slots[0]], self.lora_b[slots[0]], self.scales[slots[0]])
        plain = self.layer(states)
        if not here:
            return plain
        inputs = states.reshape(len(slots), -1, states.shape[-1])
        outputs = plain.reshape(len(slots), -1, plain.shape[-1])
        if len(here) == len(slots) and len({(self.scales[slot], len(self.lora_a[slot])) for slot in here}) == 1:
            if len(slots) == 1:
                low = inputs[0] @ self.lora_a[slots[0]].T
                return torch.addmm(outputs[0], low, self.lora_b[slots[0]].T, alpha=self.scales[slots[0]]).view_as(plain)
            a, b = (torch.stack([matrices[slot] for slot in slots]).mT for matrices in (self.lora_a, self.lora_b))
            return torch.baddbmm(outputs, torch.bmm(inputs, a), b, alpha=self.scales[slots[0]]).view_as(plain)
        parts = [self._one(slot, inputs[place], outputs[place]) for place, slot in enumerate(slots)]
        return torch.stack(parts).view_as(plain)

    @property
    def merges(self) -> bool:
        """Whether one slot speaks and its matrices can be added to the weight: in bfloat16 the weight would swallow them."""
        layer: Any = self.layer
        slots = self.switch.slots
        return type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and len(slots) == 1 and slots[0] in self.scales

    @torch.no_grad()
    def merged_weight(self) -> tuple[Tensor, Tensor | None]:
        """(weight with the speaking slot added, bias)."""
        (slot,) = self.switch.slots
        layer: Any = self.layer
        return torch.addmm(layer.weight, self.lora_b[slot], self.lora_a[slot], alpha=self.scales[slot]), layer.bias

    def _worth_merging(self, states: Tensor) -> bool:
        """Whether adding the adapter to the weight costs less than taking every state through it."""
        enough = states.numel() >= MERGED_ROWS * states.shape[-1]
        return enough and self.merges and states.dtype == torch.float32 and not torch.is_autocast_enabled(states.device.type)

    def _one(self, slot: str, states: Tensor, plain: Tensor) -> Tensor:
        if slot not in self.scales:
            return plain
        return torch.addmm(plain, states @ self.lora_a[slot].T, self.lora_b[slot].T, alpha=self.scales[slot])

    # What a layer of peft answers to: a model is merged and saved the same way whoever put the adapters in.

    def get_base_layer(self) -> nn.Module:
        return self.layer

    @property
    def active_adapters(self) -> list[str]:
        return [slot for slot in self.switch.slots if slot in self.scales]

    @torch.no_grad()
    def get_delta_weight(self, slot: str) -> Tensor:
        change = self.scales[slot] * (self.lora_b[slot] @ self.lora_a[slot])
        return change.T if isinstance(self.layer, Conv1D) else change


class MergedLora(torch.autograd.Function):
    """y = x (W + scale B A)^T with W frozen: one product forth and one back, beside those of the small matrices' own gradients.

    Shapes:  x (..., in), W (out, in), A (r, in), B (out, r). The sum of weights is made anew in the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return F.linear(x, torch.addmm(weight, b, a, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        below = (out @ torch.addmm(weight, b, a, alpha=ctx.scale)).view_as(x) if ctx.needs_input_grad[0] else None
        to_a = ctx.scale * ((out @ b).T @ rows) if ctx.needs_input_grad[3] else None
        to_b = ctx.scale * (out.T @ (rows @ a.T)) if ctx.needs_input_grad[4] else None
        return below, None, None, to_a, to_b, None


class Slots(nn.Module):
    """A frozen model with adapters in slots. To others it is peft's wrapper of the slot `speaks`, which speaks unless told otherwise."""

    def __init__(self, model: PreTrainedModel, speaks: str) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.switch = Switch((speaks,))
        self.loras: dict[str, Lora] = {}

    @contextmanager
    def speaking(self, *slots: str) -> Iterator[None]:
        """Inside, each forward pass has one copy of its rows for each of these slots. A backward pass belongs inside too."""
        before, self.switch.slots = self.switch.slots, slots
        try:
            yield
        finally:
            self.switch.slots = before

    def add(self, slot: str, lora: Lora, *, seed: int) -> None:
        """A new slot that is trained, and starts as the backbone."""
        generator = torch.Generator().manual_seed(seed)
        for name in linear_layers(self.model, lora.targets):
            layer = self._layer(name)
            inside, outside = layer_sizes(layer.layer)
            bound = 1 / math.sqrt(inside)
            start = torch.empty(lora.rank, inside).uniform_(-bound, bound, generator=generator)
            layer.put(slot, start, torch.zeros(outside, lora.rank), lora.alpha / lora.rank, trained=True)
        self.loras[slot] = lora

    def read(self, slot: str, folder: Path) -> None:
        """A slot that is not trained, from a folder that peft wrote or that reads like one.

        Raises: InputError if its layers are not this model's."""
        from peft import LoraConfig  # here, because loading it takes as long as torch does, and most runs need none

        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
        names = [key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
        try:
            for name in names:
                a, b = (tensors[adapter_key(name, matrix)] for matrix in "AB")
                layer = self._layer(name)
                if (a.shape[1], b.shape[0]) != layer_sizes(layer.layer):
                    raise KeyError(name)
                layer.put(slot, a.float(), b.float(), float(config.lora_alpha) / config.r, trained=False)
        except (AttributeError, KeyError) as error:
            raise InputError(
                f"{folder} is not an adapter of this model: {error}", remedy="Name the folder of a model trained with LoRA."
            ) from error
        self.loras[slot] = Lora(config.r, float(config.lora_alpha), tuple(names))

    def copy(self, slot: str, source: str) -> None:
        """A new slot that is trained, and starts as another."""
        for _, layer in self._having(source):
            layer.put(
                slot, layer.lora_a[source].detach().clone(), layer.lora_b[source].detach().clone(), layer.scales[source], trained=True
            )
        self.loras[slot] = self.loras[source]

    def part(self, slot: str) -> nn.Module:
        """The parameters of a slot, as a module of their own: for its optimiser and its checkpoints."""
        found: dict[str, nn.Parameter] = {}
        for name, layer in self._having(slot):
            place = name.replace(".", "/")
            found |= {f"{place}/lora_a": layer.lora_a[slot], f"{place}/lora_b": layer.lora_b[slot]}
        return nn.ParameterDict(found)

    def _having(self, slot: str) -> list[tuple[str, SlotLora]]:
        return [(name, layer) for name, layer in self.model.named_modules() if isinstance(layer, SlotLora) and slot in layer.scales]

    def _layer(self, name: str) -> SlotLora:
        layer = self.model.get_submodule(name)
        if not isinstance(layer, SlotLora):
            layer_sizes(layer)
            layer = SlotLora(layer, self.switch)
            put_layer(self.model, name, layer)
        return layer

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    def disable_adapter(self) -> Any:
        return self.speaking(BARE)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """The slot that speaks, as peft reads it."""
        (slot,) = self.switch.slots
        layers = self._having(slot)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers:
            tensors |= {adapter_key(name, "A"): layer.lora_a[slot], adapter_key(name, "B"): layer.lora_b[slot]}
        transposed = any(isinstance(layer.layer, Conv1D) for _, layer in layers)
        write_adapter(Path(folder), self.loras[slot], tensors, fan_in_fan_out=transposed)


PREFIX = "base_model.model."


def adapter_key(name: str, matrix: str) -> str:
    """What peft calls matrix "A" or "B" of a layer."""
    return f"{PREFIX}{name}.lora_{matrix}.weight"


def write_adapter(folder: Path, lora: Lora, tensors: dict[str, Tensor], *, fan_in_fan_out: bool) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as peft reads them; `tensors` by `adapter_key`."""
    from peft import LoraConfig  # here, because loading it takes as long as torch does, and most runs need none

    names = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, folder / WEIGHTS)


def linear_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the layers that get adapters: all linear ones of the backbone, or those whose name ends as asked.

    Raises:  InputError if a target names no linear layer."""
    layers = dict(model.base_model.named_modules())
    inside = {f"{name}.layer" for name, layer in layers.items() if isinstance(layer, SlotLora)}
    linear = [
        f"{model.base_model_prefix}.{name}"
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | Conv1D | SlotLora) and name not in inside
    ]
    if tuple(targets) == ("all-linear",):
        return linear
    found = [name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not found:
        raise InputError(f"lora_targets {tuple(targets)} name no linear layer.", remedy="Use all-linear, or names such as q_proj.")
    return found


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer. Raises AttributeError for any other."""
    sizes: Any = (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
    return sizes


def put_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
