"""M low-rank adapters over one frozen backbone, read in one forward pass.

Each row enters the backbone M times, one block of rows a member; a `MemberLora` layer adds each block its own member's matrices; and the M
states of a token leave side by side, (B, T, M x H). To whoever calls the backbone it is a model with longer states, so packing and
recomputing activations go on as with one model. peft can choose an adapter for each row too, but by hooks that are gone when activations
are recomputed in the backward pass: it would then train the wrong member.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from training.errors import InputError
from training.language_model import Lora
from training.slots import WEIGHTS, adapter_key, layer_sizes, linear_layers, put_layer, write_adapter

ADAPTERS = "adapter"


class MemberLora(nn.Module):
    """A frozen linear layer and M low-rank additions: block m of the rows gets W x + (alpha / r) B_m A_m x.

    Shapes:  A (M, r, in), B (M, out, r); B starts at zero, so that every member starts as the backbone.
    Source:  Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, layer: nn.Module, members: int, lora: Lora, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.scale = lora.alpha / lora.rank
        inside, outside = layer_sizes(layer)
        bound = 1 / math.sqrt(inside)
        start = torch.empty(members, lora.rank, inside).uniform_(-bound, bound, generator=generator)
        device = next(layer.parameters()).device  # quantised weights are on the accelerator from the start
        self.lora_a = nn.Parameter(start.to(device))
        self.lora_b = nn.Parameter(torch.zeros(members, outside, lora.rank, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """(M x B, ..., in) -> (M x B, ..., out), member by member."""
        plain = self.layer(states)
        blocks = states.reshape(len(self.lora_a), -1, states.shape[-1])
        added = torch.bmm(torch.bmm(blocks, self.lora_a.transpose(1, 2)), self.lora_b.transpose(1, 2))
        return plain + self.scale * added.reshape(plain.shape)

    def get_base_layer(self) -> nn.Module:
        return self.layer

    @torch.no_grad()
    def merged(self, member: int) -> nn.Module:
        """The layer inside, changed to be this member alone."""
        change = self.scale * self.lora_b[member] @ self.lora_a[member]
        weight: Any = self.layer.weight
        weight.add_(change.T if isinstance(self.layer, Conv1D) else change)
        return self.layer


class AdapterEnsemble(nn.Module):
    """A reward model of M heads, head m over the states of member m.

    It answers to the names that peft's wrapper has (`get_base_model`, `save_pretrained`; its layers to `get_base_layer`), so that a model
    is saved the same way whoever put the adapters in. M of them cannot be merged into one backbone: its folder is the backbone with all M
    heads, and `adapter/member-<m>/`, each a peft adapter.
    """

    def __init__(self, model: PreTrainedModel, members: int, lora: Lora, *, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self.members = members
        self.lora = lora
        model.requires_grad_(False)
        model.score.requires_grad_(True)
        generator = torch.Generator().manual_seed(seed)
        self.names = linear_layers(model, lora.targets)
        for name in self.names:
            put_layer(model, name, MemberLora(model.get_submodule(name), members, lora, generator))
        backbone = model.base_model
        backbone.register_forward_pre_hook(partial(_repeat, members), with_kwargs=True)
        backbone.register_forward_hook(partial(_side_by_side, members))

    @classmethod
    def load(cls, model: PreTrainedModel, folder: Path) -> "AdapterEnsemble":
        """The adapters of a saved ensemble, put back onto its backbone; ranks and targets are the folder's."""
        from peft import LoraConfig  # here, because loading it takes as long as torch does, and most runs need none

        places = sorted(folder.glob("member-*"), key=lambda place: int(place.name.removeprefix("member-")))
        config = LoraConfig.from_pretrained(str(places[0]))
        ensemble = cls(model, len(places), Lora(config.r, float(config.lora_alpha), tuple(config.target_modules or ())))
        for member, place in enumerate(places):
            try:
                ensemble._read(member, load_file(place / WEIGHTS))
            except (OSError, KeyError, RuntimeError) as error:
                raise InputError(f"{place} is not an adapter of this model: {error}", remedy="Put the folder's files back.") from error
        return ensemble

    def get_base_model(self) -> PreTrainedModel:
        return self.model

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """`member-<m>/` for each member: `adapter_config.json` and `adapter_model.safetensors`, as peft reads them."""
        layers = self._layers()
        for member in range(self.members):
            tensors: dict[str, Tensor] = {}
            for name, layer in layers.items():
                tensors |= {adapter_key(name, "A"): layer.lora_a[member], adapter_key(name, "B"): layer.lora_b[member]}
            transposed = any(isinstance(layer.layer, Conv1D) for layer in layers.values())
            write_adapter(Path(folder) / f"member-{member}", self.lora, tensors, fan_in_fan_out=transposed)

    def member(self, member: int) -> PreTrainedModel:
        """The model of one member, its adapter merged, everything trained; all M heads are still there. This ensemble is spent."""
        return self._taken_out(lambda layer: layer.merged(member)).requires_grad_(True)

    def _layers(self) -> dict[str, MemberLora]:
        return {name: self.model.get_submodule(name) for name in self.names}  # type: ignore[misc]

    def _taken_out(self, replacement: Any) -> PreTrainedModel:
        for name, layer in self._layers().items():
            put_layer(self.model, name, replacement(layer))
        self.model.base_model._forward_pre_hooks.clear()
        self.model.base_model._forward_pre_hooks_with_kwargs.clear()
        self.model.base_model._forward_hooks.clear()
        return self.model

    @torch.no_grad()
    def _read(self, member: int, tensors: dict[str, Tensor]) -> None:
        for name, layer in self._layers().items():
            layer.lora_a[member].copy_(tensors[adapter_key(name, "A")])
            layer.lora_b[member].copy_(tensors[adapter_key(name, "B")])


def _repeat(members: int, _backbone: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Every row M times, the whole batch for member 0 first."""
    rows = len(kwargs["input_ids"])

    def tiled(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            return value.repeat(members, *[1] * (value.ndim - 1))
        return value

    return tuple(map(tiled, args)), {name: tiled(value) for name, value in kwargs.items()}


def _side_by_side(members: int, _backbone: nn.Module, _args: Any, output: Any) -> Any:
    """States (M x B, T, H) -> (B, T, M x H)."""
    states = output.last_hidden_state
    output.last_hidden_state = states.unflatten(0, (members, -1)).movedim(0, -2).flatten(-2)
    return output
