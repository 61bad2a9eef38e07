"""Scores of texts by a trained reward model: for evaluation, PPO and best-of-n."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardmodel.ensemble import Views, views
from rewardmodel.members import AdapterEnsemble
from rewardmodel.network import head_scores, load_reward_model
from training.encode import Encoder, Message
from training.errors import InputError
from training.language_model import unwrap
from training.options import parse_options
from training.pack import Row
from training.row_logps import row_last_states
from training.sharding import one_pass

REWARD_FILE = "rankloop_reward.json"
REWARD_FORMAT = "rankloop.reward/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardNotes:
    """What a reward model's folder says about itself (`rankloop_reward.json`). `mean` and `scale` are one number, or one a member."""

    format: str = REWARD_FORMAT
    mean: float | tuple[float, ...] = 0.0  # of the scores of training completions
    scale: float | tuple[float, ...] = 1.0  # their standard deviation
    ties: str = "drop"
    temperature: float = 1.0  # score differences in log-odds are divided by it; fitted on held-out pairs
    nu: float = 0.0  # the tie parameter: Davidson's nu, Rao-Kupper's theta, Plackett-Luce's delta of two; 0: the model knows no ties
    encoder_digest: str = ""
    snapshot_digest: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def means(self) -> tuple[float, ...]:
        """By member."""
        return self.mean if isinstance(self.mean, tuple) else (self.mean,)

    @property
    def scales(self) -> tuple[float, ...]:
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    def normalise(self, scores: Tensor) -> Tensor:
        """(..., M) scores -> the same, each member at mean 0 and standard deviation 1 on the training completions."""
        return (scores - torch.tensor(self.means)) / torch.tensor(self.scales)

    def in_log_odds(self, scores: Tensor) -> Tensor:
        """(N, M) scores of the members, before normalisation -> (N,): the mean of the normalised ones, in the members' usual scale, so
        that differences are log-odds before `temperature`."""
        return self.normalise(scores).mean(-1) * fmean(self.scales)

    def win_probability(self, difference: Tensor) -> Tensor:
        """Probability that people put the first of two completions before the second, if they do not tie them.

        Args:    difference: of their normalised scores (members' mean), any shape.   Returns: the same shape, 0 to 1."""
        odds = difference * fmean(self.scales)
        if self.ties == "rao_kupper" and self.nu > 1:
            odds = F.logsigmoid(odds - math.log(self.nu)) - F.logsigmoid(-odds - math.log(self.nu))
        return torch.sigmoid(odds / self.temperature)


def normalisation(scores: Tensor) -> dict[str, Any]:
    """`mean` and `scale` for the notes: one number for one member, else one each.

    Args:    scores (N, M) of training completions."""
    means = scores.double().mean(0).tolist()
    scales = scores.double().std(0).nan_to_num(1.0).clamp(min=1e-6).tolist()  # of one completion there is no deviation
    if len(means) == 1:
        return {"mean": means[0], "scale": scales[0]}
    return {"mean": tuple(means), "scale": tuple(scales)}


def read_notes(folder: str | Path) -> RewardNotes:
    """Raises InputError if the folder is not a reward model of Rankloop."""
    file = Path(folder) / REWARD_FILE
    try:
        return parse_options(RewardNotes, json.loads(file.read_text(encoding="utf-8")), where=str(file))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}", remedy="Name the model folder of a reward run.") from error


def require_members(notes: RewardNotes, why: str) -> None:
    """Raises InputError for a reward model of one member."""
    if len(notes.means) == 1:
        raise InputError(
            f"The reward model has one member, but {why}.", remedy="Train it with ensemble_size = 4 or more, or leave that option out."
        )


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
        members = unwrap(model).config.num_labels
        if not len(notes.means) == len(notes.scales) == members:
            raise InputError(
                f"{folder}: {REWARD_FILE} normalises {len(notes.means)} members, the model has {members}.",
                remedy="Put the folder's files back as they were.",
            )
        return cls(model, encoder, notes, device=torch.device(device), budget=tokens_per_batch)

    @property
    def members(self) -> int:
        return len(self.notes.means)

    def score(self, answers: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """Normalised score of each (messages, completion text), the mean over members; higher is better."""
        return self.views(self.raw_scores(self.rows(answers))).mean.tolist()

    def rows(self, answers: Sequence[tuple[Sequence[Message], str]]) -> list[Row]:
        """(messages, completion text) as a person reads it: a special token that a policy spelt out, letter by letter, is no text."""
        special = self.encoder.tokenizer.all_special_tokens
        rows = []
        for messages, text in answers:
            for token in special:
                text = text.replace(token, "")  # noqa: PLW2901
            rows.append(Row(self.encoder.prompt_ids(messages), self.encoder.completion_ids(text)))
        return rows

    def raw_scores(self, rows: Sequence[Row]) -> Tensor:
        """(B, M) float32 scores of encoded rows (completions end in EOS) by each member, before normalisation, without gradients."""
        with torch.no_grad():
            return row_scores(self.model, rows, self.encoder.pad_id, device=self.device, budget=self.budget).cpu()

    def normalise(self, raw: Tensor) -> Tensor:
        return self.notes.normalise(raw)

    def views(self, raw: Tensor) -> Views:
        """What the members say together of (B, M) scores: mean, spread and worst, in normalised reward."""
        return views(self.normalise(raw))


@one_pass
def row_scores(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B, M) float32 score of each row by each member, read at its last token. Keeps gradients.

    Args:    budget: tokens of one forward pass; M adapters read each token M times."""
    budget = max(1, budget // model_copies(model))
    return head_scores(model, row_last_states(model, rows, pad_id, device=device, budget=budget))


def model_copies(model: Any) -> int:
    """How often each token is computed: once, or once for each adapter."""
    return model.members if isinstance(model, AdapterEnsemble) else 1
