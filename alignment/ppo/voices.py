"""What the models of PPO say of episodes, whichever form they have: four models, or adapters over one backbone (`alignment.ppo.shared`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rewardmodel.network import head_scores
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer
from training.encode import Encoder
from training.language_model import reference, save_model
from training.pack import Row
from training.processes import Processes
from training.readings import Reading, Speech, readings


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

    def passes(self, model: Any, rows: Sequence[Row], *, budget: int, copies: int = 1, logits: bool = False) -> Iterator[Reading]:
        """`readings`, each forward pass in the run's dtype; a backward pass in between is none of autocast's business."""
        found = readings(model, rows, self.pad_id, device=self.device, budget=budget, copies=copies, logits=logits)
        while True:
            with self.processes.autocast():
                reading = next(found, None)
            if reading is None:
                return
            yield reading


@dataclass(frozen=True, slots=True)
class Judged:
    """N rows as the frozen models see them, on the CPU. Shapes: T = `Manner.width`, M members.

    reference_logps, logps, values (N, T) float32, packed to the left;  raw_scores (N, M) float32, before normalisation.
    `logps` (the policy's) and `values` are zeros where they were not asked for.
    """

    reference_logps: Tensor
    logps: Tensor
    values: Tensor
    raw_scores: Tensor


@dataclass(frozen=True, slots=True)
class Said:
    """One forward pass with gradients over rows `rows` (numbers among those given): (B, T) float32, packed to the left.

    None where this pass did not ask: where policy and value are two models, each has passes of its own."""

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
        """The value model as a standard folder."""


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
        self.trained: dict[str, nn.Module] = {"policy": policy}
        if value:
            self.trained["value"] = value[0]

    def judged(self, rows: Sequence[Row], read: Sequence[Row], *, budget: int, values: bool, logps: bool) -> Judged:
        nothing = torch.zeros((len(rows), self.manner.width))
        with torch.no_grad():
            with reference(self.policy, self.reference) as frozen:
                reference_logps = self._whole(self._logps(frozen, rows, budget), len(rows))
            own = self._whole(self._logps(self.policy, rows, budget), len(rows)) if logps else nothing
            expected = self._whole(self._values(rows, budget), len(rows)) if values and self.value is not None else nothing
        with self.manner.processes.autocast():
            return Judged(reference_logps, own, expected, self.scorer.raw_scores(read))

    def learned(self, rows: Sequence[Row], *, budget: int) -> Iterator[Said]:
        """The policy's passes, then the value model's: the graph of one is gone before the next is built."""
        for numbers, logps in self._logps(self.policy, rows, budget):
            yield Said(numbers, logps=logps)
        if self.value is not None:
            for numbers, values in self._values(rows, budget):
                yield Said(numbers, values=values)

    def _logps(self, model: Any, rows: Sequence[Row], budget: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        speech, manner = Speech(model), self.manner
        for reading in manner.passes(model, rows, budget=budget, logits=speech.needs_logits):
            yield reading.rows, reading.by_row(speech.logps(reading, temperature=manner.temperature), manner.width)

    def _values(self, rows: Sequence[Row], budget: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Expected score before each completion token, read at the token before it, in normalised reward."""
        manner = self.manner
        for reading in manner.passes(self.value, rows, budget=budget):
            raw = head_scores(self.value, reading.predicting())[:, 0]
            yield reading.rows, reading.by_row((raw - self.value_notes.means[0]) / self.value_notes.scales[0], manner.width)

    def _whole(self, parts: Iterator[tuple[tuple[int, ...], Tensor]], count: int) -> Tensor:
        whole = torch.zeros((count, self.manner.width))
        for numbers, part in parts:
            whole[list(numbers)] = part.float().cpu()
        return whole

    def save_value(self, folder: Path, encoder: Encoder) -> None:
        save_model(self.value, encoder, folder, notes={REWARD_FILE: self.value_notes.as_json()})
