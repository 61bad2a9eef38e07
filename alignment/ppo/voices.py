"""What the models of PPO say of episodes, whichever form they have: four models, or adapters over one backbone (`alignment.ppo.shared`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rewardmodel.network import head_scores
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer
from training.encode import Encoder
from training.language_model import reference, save_model, unwrap
from training.pack import Row
from training.packed_model import packs_rows
from training.processes import Processes
from training.readings import Reading, Speech, Way, readings
from training.sharding import gathered, shard


@dataclass(frozen=True, slots=True)
class Manner:
    """How rows are read. `width`: most tokens of a completion;  `temperature`: of sampling, and so of log-probabilities."""

    pad_id: int
    width: int
    temperature: float
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def way(self) -> Way:
        return Way(self.pad_id, self.device, self.processes)


@dataclass(frozen=True, slots=True)
class Judged:
    """N rows as the frozen models see them, on the CPU. Shapes: T = `Manner.width`, M members.

    reference_logps, logps, values, base_values (N, T) float32, packed to the left;  raw_scores (N, M) float32, before normalisation.
    `logps` (the policy's) and `values` are zeros where they were not asked for. `base_values` is the part of `values` that does not change
    in training: the reward model's own expectation, where the value model is a head beside it; else zeros.
    """

    reference_logps: Tensor
    logps: Tensor
    values: Tensor
    base_values: Tensor
    raw_scores: Tensor


def in_order(numbers: Sequence[Sequence[int]], parts: Sequence[Judged]) -> Judged:
    """Parts of a judgement as one, in the order of the rows; `numbers` are those of each part's."""
    order = torch.tensor([number for some in numbers for number in some], dtype=torch.long).argsort()
    return Judged(*(torch.cat([getattr(part, one.name) for part in parts])[order] for one in fields(Judged)))


@dataclass(frozen=True, slots=True)
class Said:
    """One forward pass of `model` with gradients, over rows `rows` (numbers among those given; none of them in a pass that only keeps
    processes in step): (B, T) float32, packed to the left; `values` less `Judged.base_values`. None where this pass did not ask: two models
    have passes of their own."""

    model: Any
    rows: tuple[int, ...]
    logps: Tensor | None = None
    values: Tensor | None = None


class Voices(Protocol):
    """Policy, reference, value and reward model. `trained` has the parameters of `policy` and, where there is one, of `value`."""

    policy: Any
    trained: dict[str, nn.Module]
    notes: RewardNotes

    def judged(self, rows: Sequence[Row], read: Sequence[Row], *, budget: int, values: bool, logps: bool) -> Judged:
        """Args: rows: as the policy wrote them;  read: as the reward model reads them (they differ in the last token alone)."""

    def learned(self, rows: Sequence[Row], *, budget: int) -> Iterator[Said]:
        """Passes that together say everything of every row once. Go backward through one before the next is taken."""

    def save_value(self, folder: Path, encoder: Encoder) -> None:
        """The value model as a standard folder. Every process comes here; the first one writes."""


class Separate:
    """Four models. A reference of None is the policy with its adapter off; a value model of None is none (it comes with its notes)."""

    def __init__(self, policy: Any, reference: Any | None, value: tuple[Any, RewardNotes] | None, scorer: Scorer, manner: Manner) -> None:
        self.policy = policy
        self.reference = reference
        self.value: Any = value[0] if value else None
        self.value_notes = value[1] if value else scorer.notes
        self.scorer = scorer
        self.notes = scorer.notes
        self.manner = manner
        for model in (policy, reference):
            if model is not None:
                Speech(model)  # tried while the weights are whole, and so is packing
        models = [model for model in (policy, reference, self.value, scorer.model) if model is not None]
        for model in models:
            packs_rows(unwrap(model).base_model)
            shard(model, manner.processes)
        self.trained: dict[str, nn.Module] = {"policy": policy}
        if value:
            self.trained["value"] = value[0]

    def judged(self, rows: Sequence[Row], read: Sequence[Row], *, budget: int, values: bool, logps: bool) -> Judged:
        nothing = torch.zeros((len(rows), self.manner.width))
        with torch.no_grad():
            with reference(self.policy, self.reference) as frozen, gathered(frozen):
                reference_logps = self._whole(self._logps(frozen, rows, budget), len(rows))
            with gathered(self.policy):
                own = self._whole(self._logps(self.policy, rows, budget), len(rows)) if logps else nothing
            wanted = self.value if values else None
            with gathered(wanted):
                expected = nothing if wanted is None else self._whole(self._values(rows, budget), len(rows))
        with gathered(self.scorer.model), self.manner.processes.autocast():
            return Judged(reference_logps, own, expected, nothing, self.scorer.raw_scores(read))

    def learned(self, rows: Sequence[Row], *, budget: int) -> Iterator[Said]:
        """The policy's passes, then the value model's: the graph of one is gone before the next is built."""
        for numbers, logps in self._logps(self.policy, rows, budget):
            yield Said(self.policy, numbers, logps=logps)
        if self.value is not None:
            for numbers, values in self._values(rows, budget):
                yield Said(self.value, numbers, values=values)

    def _logps(self, model: Any, rows: Sequence[Row], budget: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        speech, manner = Speech(model), self.manner

        def read(reading: Reading) -> Tensor:
            return reading.by_row(speech.logps(reading, temperature=manner.temperature), manner.width)

        return readings(model, rows, read, way=manner.way, budget=budget, logits=speech.needs_logits)

    def _values(self, rows: Sequence[Row], budget: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Expected score before each completion token, read at the token before it, in normalised reward."""
        notes, manner = self.value_notes, self.manner

        def read(reading: Reading) -> Tensor:
            raw = head_scores(self.value, reading.predicting())[:, 0]
            return reading.by_row((raw - notes.means[0]) / notes.scales[0], manner.width)

        return readings(self.value, rows, read, way=manner.way, budget=budget)

    def _whole(self, parts: Iterator[tuple[tuple[int, ...], Tensor]], count: int) -> Tensor:
        whole = torch.zeros((count, self.manner.width))
        for numbers, part in parts:
            whole[list(numbers)] = part.float().cpu()
        return whole

    def save_value(self, folder: Path, encoder: Encoder) -> None:
        with gathered(self.value):
            if self.manner.processes.is_main:
                save_model(self.value, encoder, folder, notes={REWARD_FILE: self.value_notes.as_json()})
