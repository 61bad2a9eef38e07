"""Scores of texts by a trained reward model: for evaluation, PPO and best-of-n."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from rewardmodel.network import head_scores, load_reward_model
from training.encode import Encoder, Message
from training.errors import InputError
from training.options import parse_options
from training.pack import Row
from training.row_logps import row_last_states

REWARD_FILE = "rankloop_reward.json"
REWARD_FORMAT = "rankloop.reward/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardNotes:
    """What a reward model's folder says about itself (`rankloop_reward.json`)."""

    format: str = REWARD_FORMAT
    mean: float = 0.0  # of the scores of training completions
    scale: float = 1.0  # their standard deviation
    ties: str = "drop"
    nu: float = 0.0  # Davidson's tie parameter; 0: the model knows no ties
    encoder_digest: str = ""
    snapshot_digest: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_notes(folder: str | Path) -> RewardNotes:
    """Raises InputError if the folder is not a reward model of Rankloop."""
    file = Path(folder) / REWARD_FILE
    try:
        return parse_options(RewardNotes, json.loads(file.read_text(encoding="utf-8")), where=str(file))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", remedy="Name the model folder of a reward run.") from error


class Scorer:
    """A reward model, its encoder, and how its scores are normalised: mean 0 and standard deviation 1 on the training completions."""

    def __init__(self, model: Any, encoder: Encoder, notes: RewardNotes, *, device: torch.device, budget: int) -> None:
        self.model = model
        self.encoder = encoder
        self.notes = notes
        self.device = device
        self.budget = budget

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu", tokens_per_batch: int = 16384) -> Self:
        """Raises InputError if the folder is no reward model, or its encoder is not the one it was trained with."""
        notes = read_notes(folder)
        encoder = Encoder.load(folder, max_prompt_tokens=1 << 30, max_completion_tokens=1 << 30)
        if notes.encoder_digest and notes.encoder_digest != encoder.digest:
            raise InputError(f"{folder}: the encoder is not the one of {REWARD_FILE}.", remedy="Put the folder's files back as they were.")
        model = load_reward_model(folder, device=device).eval().requires_grad_(False)
        return cls(model, encoder, notes, device=torch.device(device), budget=tokens_per_batch)

    def score(self, answers: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """Normalised score of each (messages, completion text); higher is better."""
        rows = [Row(self.encoder.prompt_ids(messages), self.encoder.completion_ids(text)) for messages, text in answers]
        return self.normalise(self.raw_scores(rows)).tolist()

    def raw_scores(self, rows: Sequence[Row]) -> Tensor:
        """(B,) float32 scores of encoded rows (completions end in EOS), before normalisation, without gradients."""
        with torch.no_grad():
            return row_scores(self.model, rows, self.encoder.pad_id, device=self.device, budget=self.budget).cpu()

    def normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.notes.mean) / self.notes.scale


def row_scores(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B,) float32 score of each row, read at its last token. Keeps gradients."""
    return head_scores(model, row_last_states(model, rows, pad_id, device=device, budget=budget))
