"""One backbone: policy, reference, value and reward model as adapters and heads over one set of frozen weights.

PPO then needs little more memory than LoRA on one model, and one forward pass says what two or three models say. The reward model has to
have been trained as LoRA over the very model PPO starts from, which is checked weight by weight.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from alignment.ppo.voices import Judged, Manner, Said, in_order
from rewardmodel.members import ADAPTERS
from rewardmodel.network import HEAD, Ensemble, mean_head, saved_ensemble
from rewardmodel.score import REWARD_FILE, RewardNotes
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, load_policy, save_model
from training.merge import merged, plain_weight
from training.pack import Row
from training.packed_model import packs_rows
from training.readings import Reading, Speech, readings
from training.rundir import replace_folder, write_atomically
from training.slots import BARE, WEIGHTS, SlotLora, Slots

T = TypeVar("T")
ValueKind = Literal["head", "adapter"]
VALUE_FORMAT = "rankloop.value/1"
POLICY, VALUE = "policy", "value"
# A saved reward model is its backbone and its adapter added up in float32; more than this share of the largest weight is another backbone.
ROUNDING = 1e-4


class Shared:
    """The one-backbone form of `alignment.ppo.voices.Voices`, in which the value model is one of

    - a head on the policy's states, added to what the reward model expects at each token: V = V_reward + w h_policy with w = 0 at the
      start. The reward model reads the rows anyway, so this costs no pass. The head learns from the states and does not bend them;
    - an adapter of its own, which starts as the reward model's: a second copy of each row in every update.
    """

    def __init__(self, slots: Slots, reward: "Reward", manner: Manner, value: ValueKind | None) -> None:
        self.policy = slots
        self.reward = reward
        self.notes = reward.notes
        self.manner = manner
        self.value = value
        self.speech = Speech(slots)
        packs_rows(slots.model.base_model)  # tried once, now, while a single slot speaks
        self.trained: dict[str, nn.Module] = {POLICY: slots.part(POLICY)}
        if value == "head":
            self.value_head = nn.Linear(reward.heads.in_features, 1).to(reward.heads.weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.value_notes = RewardNotes()
            self.trained[VALUE] = nn.ModuleDict({"head": self.value_head})
        elif value == "adapter":
            slots.copy(VALUE, reward.slots[0])
            self.value_head, mean, scale = mean_head(reward.heads, (self.notes.means, self.notes.scales), reward.kind)
            self.value_notes = replace(self.notes, mean=mean, scale=scale)
            self.trained[VALUE] = nn.ModuleDict({"adapter": slots.part(VALUE), "head": self.value_head})

    @torch.no_grad()
    def judged(self, rows: Sequence[Row], read: Sequence[Row], *, budget: int, values: bool, logps: bool) -> Judged:
        """One pass for all of them: what comes before a token is the same whether the last one is as written or as read."""
        kind = self.value if values else None
        asked = [BARE, *self.reward.slots]
        asked += [POLICY] if logps or kind == "head" else []
        asked += [VALUE] if kind == "adapter" else []

        def judge(reading: Reading) -> Judged:
            written = torch.tensor([token for place in reading.rows for token in rows[place].completion_ids], device=self.manner.device)
            nothing = torch.zeros((len(reading.rows), self.manner.width))
            base = reading.by_row(self.reward.expectations(reading, first=1), self.manner.width).cpu() if kind == "head" else nothing
            own = nothing if kind is None else self._values(reading, len(asked) - 1).cpu()  # the policy's copy, or its own: the last
            return Judged(
                reference_logps=self._logps(reading, 0, written).cpu(),
                logps=self._logps(reading, asked.index(POLICY), written).cpu() if logps else nothing,
                values=base + own,
                base_values=base,
                raw_scores=self.reward.scores(reading, first=1).cpu(),
            )

        if not rows:  # fewer prompts than processes
            nothing = torch.zeros((0, self.manner.width))
            return Judged(nothing, nothing, nothing, nothing, torch.zeros((0, len(self.reward.heads.weight))))
        parts = list(self._passes(read, judge, budget, asked))
        return in_order([numbers for numbers, _ in parts], [part for _, part in parts])

    def learned(self, rows: Sequence[Row], *, budget: int) -> Iterator[Said]:
        """Policy and value in one pass."""

        def say(reading: Reading) -> Said:
            values = None
            if self.value:
                values = self._values(reading, 1 if self.value == "adapter" else 0)
            return Said(self.policy, reading.rows, self._logps(reading, 0, reading.targets), values)

        for _, said in self._passes(rows, say, budget, [POLICY, VALUE] if self.value == "adapter" else [POLICY]):
            yield said

    def _passes(
        self, rows: Sequence[Row], read: Callable[[Reading], T], budget: int, slots: Sequence[str]
    ) -> Iterator[tuple[tuple[int, ...], T]]:
        with self.policy.speaking(*slots):
            yield from readings(self.policy, rows, read, way=self.manner.way, budget=budget, copies=len(slots))

    def _logps(self, reading: Reading, copy: int, targets: Tensor) -> Tensor:
        found = self.speech.logps(reading, copy=copy, temperature=self.manner.temperature, targets=targets)
        return reading.by_row(found, self.manner.width)

    def _values(self, reading: Reading, copy: int) -> Tensor:
        states = reading.predicting(copy)
        raw = _said(self.value_head, states.detach() if self.value == "head" else states)[:, 0]
        return reading.by_row((raw - self.value_notes.means[0]) / self.value_notes.scales[0], self.manner.width)

    def save_value(self, folder: Path, encoder: Encoder) -> None:
        """A standard reward model's folder for an adapter. A head is no model by itself: `head.safetensors`, and what it is added to."""
        if not self.manner.processes.is_main:
            return
        if self.value == "head":
            beside = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            save_file({name: tensor.detach().cpu() for name, tensor in self.value_head.state_dict().items()}, beside / "head.safetensors")
            note = {
                "format": VALUE_FORMAT,
                "value": "normalised score of reward_model + head on the last hidden state of policy",
                "reward_model": str(Path(self.reward.folder).resolve()),
                "policy": "../model",
            }
            write_atomically(beside / "rankloop_value.json", json.dumps(note, indent=2))
            replace_folder(beside, folder)
            return
        with self.policy.speaking(VALUE):
            plain = merged(self.policy)
        config = plain.config
        config.num_labels = 1
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config)
        model.base_model.load_state_dict(plain.base_model.state_dict(), assign=True)
        setattr(model, HEAD, self.value_head)
        save_model(model, encoder, folder, notes={REWARD_FILE: self.value_notes.as_json()})


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward model inside a shared backbone: its slots (one, or one a member), its heads and its notes."""

    slots: tuple[str, ...]
    heads: nn.Linear
    kind: Any
    notes: RewardNotes
    folder: str

    def expectations(self, reading: Reading, *, first: int) -> Tensor:
        """(N,): what the members say in the mean, in normalised reward, before each completion token."""
        if len(self.slots) == 1:
            raw = _said(self.heads, reading.predicting(first))
        else:
            members = [_said(self.heads, reading.predicting(first + member))[:, member] for member in range(len(self.slots))]
            raw = torch.stack(members, 1)
        means, scales = (torch.tensor(numbers, device=raw.device) for numbers in (self.notes.means, self.notes.scales))
        return ((raw - means) / scales).mean(-1)

    def scores(self, reading: Reading, *, first: int) -> Tensor:
        """(B, M) float32 scores of the rows, read at their last tokens; `first` is the copy of the first slot."""
        if len(self.slots) == 1:
            return _said(self.heads, reading.last(first))
        members = [_said(self.heads, reading.last(first + member))[:, member] for member in range(len(self.slots))]
        return torch.stack(members, 1)


def _said(head: nn.Linear, states: Tensor) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return head(states.float()).float()


def why_not_shared(model: str, reward_model: str, reference: str | None, lora_rank: int) -> str:
    """Empty where the reward model's folder has adapters that could share the policy's backbone; else why not. (Weights come later.)"""
    if not lora_rank:
        return "lora_rank = 0 trains all weights"
    if reference and Path(reference).resolve() != Path(model).resolve():
        return f"the reference {reference} is another model than the policy's start {model}"
    if not _adapter_folders(Path(reward_model)):
        return f"the reward model {reward_model} was not trained with LoRA"
    return ""


def load_slots(model: str, reward_model: str, notes: RewardNotes, *, lora: Lora, seed: int, **given: Any) -> tuple[Slots, Reward]:
    """The policy's start with the reward model's adapters and a new one for the policy.

    Raises:  InputError if the reward model's backbone is not this model.
    """
    plain = load_policy(model, quantise=lora.quantise, **given)
    slots = Slots(plain, POLICY)
    folders = _adapter_folders(Path(reward_model))
    names = tuple(f"reward-{number}" for number in range(len(folders)))
    for name, folder in zip(names, folders, strict=True):
        slots.read(name, folder)
    ensemble = saved_ensemble(reward_model) or Ensemble()
    reward = Reward(names, _checked_heads(slots, names, Path(reward_model), model), ensemble.kind, notes, reward_model)
    slots.add(POLICY, lora, seed=seed)
    if Speech(slots).needs_logits:
        raise InputError(f"{model} has an output head that does not stand alone.", remedy="Set backbone = 'separate'.")
    if given.get("gradient_checkpointing"):
        plain.enable_input_require_grads()
    return slots, reward


def _adapter_folders(reward_model: Path) -> list[Path]:
    """Of each member, or of the one; empty where there is none."""
    folder = reward_model / ADAPTERS
    members = sorted(folder.glob("member-*"), key=lambda place: int(place.name.removeprefix("member-")))
    return members or ([folder] if (folder / WEIGHTS).exists() else [])


@torch.no_grad()
def _checked_heads(slots: Slots, names: tuple[str, ...], reward_model: Path, model: str) -> nn.Linear:
    """The reward model's heads, once each of its other weights has been found in the backbone: bare, or with its one adapter added."""
    head: dict[str, Tensor] = {}
    compared = 0
    with slots.speaking(names[0]):
        for file in sorted(reward_model.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no mapping)
                    tensor = opened.get_tensor(key)
                    if key.startswith(f"{HEAD}."):
                        head[key.removeprefix(f"{HEAD}.")] = tensor
                    elif key.startswith(f"{slots.model.base_model_prefix}."):
                        expected = _expected(slots, key, add=len(names) == 1)
                        if expected is None or expected.shape != tensor.shape or not _near(expected, tensor):
                            difference = "has no place in it" if expected is None else "differs"
                            raise InputError(
                                f"The reward model {reward_model} stands on another backbone than {model}: {key} {difference}.",
                                remedy="Train the reward model with lora_rank on the model PPO starts from, or set backbone = 'separate'.",
                            )
                        compared += 1
    if "weight" not in head or not compared:
        raise InputError(f"{reward_model} holds no weights of a reward model.", remedy="Put the folder's files back.")
    layer = nn.Linear(head["weight"].shape[1], len(head["weight"]), bias="bias" in head)
    layer.load_state_dict({name: tensor.float() for name, tensor in head.items()})
    return layer.requires_grad_(False).to(next(slots.parameters()).device)


def _expected(slots: Slots, key: str, *, add: bool) -> Tensor | None:
    parent, _, leaf = key.rpartition(".")
    try:
        module: Any = slots.model.get_submodule(parent)
    except AttributeError:
        return None
    layer = module.layer if isinstance(module, SlotLora) else module
    if not hasattr(layer, leaf):
        return None
    tensor = plain_weight(layer) if leaf == "weight" else getattr(layer, leaf)
    if add and isinstance(module, SlotLora) and leaf == "weight":
        for slot in module.active_adapters:
            tensor = tensor + module.get_delta_weight(slot)
    return tensor.float().cpu()


def _near(one: Tensor, other: Tensor) -> bool:
    other = other.float()
    return float((one - other).abs().max()) <= ROUNDING * max(float(other.abs().max()), 1e-6)
