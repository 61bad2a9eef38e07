"""Training a reward model from rankings, and measuring it on held-out ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rewardmodel.accuracy import pair_counts
from rewardmodel.counts import encode_counted
from rewardmodel.curve import curve_row, learn_shares, prompts_of_share
from rewardmodel.ensemble import bootstrap_weights, member_losses, spread_report
from rewardmodel.likelihood import Likelihood, likelihood_of, training_losses
from rewardmodel.network import Ensemble, load_reward_model
from rewardmodel.options import RewardOptions
from rewardmodel.raters import rater_weights, reweighted
from rewardmodel.report import REPORT_FILE, REPORT_FORMAT, Report, held_out_report
from rewardmodel.score import REWARD_FILE, RewardNotes, model_copies, normalisation, row_scores
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora
from training.ledger import Ledger
from training.loop import Training, train
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row, gather_rows
from training.processes import Processes, Sums
from training.rankings import EncodedRanking, read_rankings
from training.row_logps import measured
from training.rundir import RunDirectory, file_digest, finite

# Scores of this many training completions give the mean and scale that normalise rewards.
NORMALISED_ON = 1000


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model` (a policy, or a reward model to go on with) and `data` (a snapshot's rankings.jsonl)."""
    options = parse_options(RewardOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    _learn(run_directory, processes, learn_shares(run_directory, processes, options, lambda part: _learn(part, processes, [])))


def _learn(run_directory: RunDirectory, processes: Processes, curve: list[dict[str, Any]]) -> None:
    """One training. `curve`: what smaller shares of the rankings taught."""
    options = parse_options(RewardOptions, run_directory.options)
    torch.manual_seed(run_directory.seed)  # dropout must not depend on whether the shares were trained in this process
    encoder = Encoder.of(run_directory.inputs["model"], options)
    data = run_directory.data_file()
    items, counts = read_items(data, encoder, options, share=options.train_share, seed=run_directory.seed)
    objective_counts = {**counts, "boundary_moves": encoder.boundary_moves}
    model = load_reward_model(
        run_directory.inputs["model"],
        device=processes.device,
        lora=Lora.of(options),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=run_directory.seed,
        ensemble=Ensemble.of(options.ensemble_size, options.ensemble),
    )
    objective = Scores(model, encoder, processes, options, items=items, digest=file_digest(data), seed=run_directory.seed)
    objective.curve = curve
    objective_counts["pairs"], objective_counts["ties"] = objective.pairs, objective.tied
    if objective.rater_weights:
        objective_counts["rater_weights"] = {rater: round(weight, 4) for rater, weight in objective.rater_weights.items()}
    run_directory.event("counts", **objective_counts)
    train(Training(run_directory, processes, options, model, encoder, objective, objective_counts), batch=options.batch_rankings)


def read_items(
    data: Any, encoder: Encoder, options: Any, *, share: float = 1.0, seed: int = 0
) -> tuple[dict[str, list[EncodedRanking]], dict[str, Any]]:
    """Encoded rankings by split, and what was counted.

    Args:    options: anything with `max_dropped_share`, `ties` and `strength_margin`;  share: of the training prompts, chosen by `seed`.
    Raises:  InputError for a margin by strength where no training ranking states any.
    """
    items, counts = {}, {}
    prompts = read_rankings(data)
    if options.strength_margin and not any(any(said.strengths) for one in prompts if one.split == "train" for said in one.rankings):
        raise InputError(
            f"strength_margin = {options.strength_margin:g} would change nothing: no training ranking of {data} states strengths.",
            remedy="Leave strength_margin out, or give the rankings `strengths` (docs/data-flow.md, section 1).",
        )
    for split in ("train", "held_out"):
        chosen = [prompt for prompt in prompts if prompt.split == split]
        ledger = Ledger(f"completions of {split} prompts")
        chosen = prompts_of_share(chosen, share, seed) if split == "train" and share < 1 else chosen
        items[split], ranked = encode_counted(chosen, encoder, ledger, ties=options.ties)
        if split == "train" or ledger.read:
            ledger.enforce(options.max_dropped_share)
        counts[split] = {**ledger.counts(), **ranked}
    return items, counts


class Scores:
    """The reward objective: mean over rankings of the mean over a ranking's pairs, or choices."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        processes: Processes,
        options: RewardOptions,
        *,
        items: dict[str, list[EncodedRanking]],
        digest: str,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.processes = processes
        self.options = options
        self.digest = digest
        self.curve: list[dict[str, Any]] = []  # of smaller shares
        self.report, self.figures = Report(), dict[str, float]()
        self.normalisation: dict[str, Any] = {}
        self.items = items["train"]
        self.held_out = items["held_out"]
        self.rater_weights = dict[str, float]()
        if options.rater_weights == "agreement":
            self.rater_weights = rater_weights([(item.rankings, item.size) for item in self.items])
            self.items = reweighted(self.items, self.rater_weights)
        self.likelihood, self.constant = self._likelihood_at_start(), self._likelihood_at_start()
        self.targets = [self.likelihood.target(item.rankings, item.size) for item in self.items]
        self.keys = [item.key for item in self.items]
        self.budget, self.copies = options.tokens_per_micro_batch, model_copies(model)
        self.weights = [target.pairs.weight for target in self.targets]
        self.costs = [item.tokens for item in self.items]
        self.member_weights = bootstrap_weights([item.digest for item in self.items], options.ensemble_size, seed=seed)
        self.pairs = sum(target.pairs.pairs for target in self.targets)
        self.tied = sum(target.pairs.tied for target in self.targets)
        self.extra = [(parameter, options.tie_learning_rate) for parameter in self.likelihood.parameters]

    def _likelihood_at_start(self) -> Likelihood:
        """Scores know nothing, and ties are as frequent as among the training rankings."""
        largest = max((len(band) for item in [*self.items, *self.held_out] for said in item.rankings for band in said.bands), default=1)
        rankings = [(item.rankings, item.size) for item in self.items]
        return likelihood_of(self.options, rankings, largest_band=largest, device=self.processes.device)

    def denominator(self, indices: Sequence[int]) -> float:
        return sum(self.weights[index] for index in indices)

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        rows, places = gather_rows([self.items[index] for index in indices])
        targets = [self.targets[index] for index in indices]
        device = self.processes.device
        by_row = self._scores(rows)
        by_member = by_row[places.to(device)]
        points = by_member.mean(-1)
        batch = self.likelihood.stack(targets, places.shape[1], device)
        losses = member_losses(
            by_member,
            self.member_weights[list(indices)].to(device),
            lambda scores: training_losses(self.likelihood, scores, batch, centring=self.options.centring),
        )
        with torch.no_grad():
            margins = points[:, :, None] - points[:, None, :]
            sums: Sums = {
                "loss": (losses.detach().sum(), self.denominator(indices)),
                "accuracy": ((batch.wins * (margins.sign() + 1) / 2).sum(), batch.wins.sum()),
                "margin": ((batch.wins * margins).sum(), batch.wins.sum()),
                "score": (by_row.mean(-1).sum(), len(rows)),
            }
            if self.likelihood.parameters:
                sums["tie_nu"] = (self.likelihood.tie_strength * len(indices), len(indices))
        return losses.sum(), sums

    def evaluate(self) -> dict[str, float]:
        """Held-out figures with their 95 % intervals (over prompts), {} without held-out rankings; the tables are kept for `notes`."""
        # Every process takes part, and the report is about the very score that users of the model see.
        train_rows = _rows_of(self.items)[0]
        self.normalisation = normalisation(measured(train_rows[:: -(-len(train_rows) // NORMALISED_ON)], self.processes, self._scores))
        rows, places = _rows_of(self.held_out)
        by_member = measured(rows, self.processes, self._scores)
        notes = RewardNotes(**self.normalisation)
        points = notes.in_log_odds(by_member)
        samples = self.options.bootstrap_samples
        scores = [points[place].tolist() for place in places]
        self.report = held_out_report(self.held_out, scores, log_odds=self._log_odds, samples=samples)
        if not self.report.metrics:
            return {}
        odds, normalised = ([values[place] for place in places] for values in (by_member, notes.normalise(by_member)))
        spread = spread_report(odds, normalised, [pair_counts(item.rankings, item.size) for item in self.held_out])
        self.figures = {**self.report.metrics, **spread, **self._likelihood(points, places)}
        return self.figures

    def _likelihood(self, points: Tensor, places: list[Tensor]) -> dict[str, float]:
        """Minus the mean log-likelihood of a held-out ranking (mean over its pairs, or choices) under the trained model, beside a model to
        which all completions are equal (ties as often as in training), and how many ties there are."""
        trained, equal = self.likelihood.as_said(), self.constant.as_said()
        device = self.processes.device
        total, constant, weight, tied = 0.0, 0.0, 0.0, 0
        for item, place in zip(self.held_out, places, strict=True):
            target = trained.target(item.rankings, item.size)
            batch, scores = trained.stack([target], item.size, device), points[place][None].to(device)
            with torch.no_grad():
                total += float(trained.losses(scores, batch).sum())
                constant += float(equal.losses(torch.zeros_like(scores), batch).sum())
            weight += target.pairs.weight
            tied += target.pairs.tied
        return {
            "log_loss": total / weight if weight else math.nan,
            "log_loss_constant": constant / weight if weight else math.nan,
            "ties": tied,
            "held_out_prompts": len({i.digest for i in self.held_out}),
        }

    def _log_odds(self, differences: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.likelihood.log_odds(torch.from_numpy(differences).to(self.processes.device)).cpu().numpy()

    def evaluate_at_end(self) -> dict[str, float]:
        return {}

    def notes(self) -> dict[str, Any]:
        notes = RewardNotes(
            **self.normalisation,
            temperature=self.report.temperature,
            ties=self.options.ties,
            nu=float(self.likelihood.tie_strength),
            encoder_digest=self.encoder.digest,
            snapshot_digest=self.digest,
        )
        told = {"metrics": self.figures, "counts": {"train": {"rankings": sum(len(item.rankings) for item in self.items)}}}
        curve = [*self.curve, curve_row(self.options.train_share, told)] if self.figures else []
        tables = {"format": REPORT_FORMAT, **self.report.tables, "learning_curve": curve}
        return {REWARD_FILE: notes.as_json(), REPORT_FILE: finite(tables)}

    def load(self, folder: Path, device: torch.device) -> Any:
        return load_reward_model(folder, device=device)

    def probe(self, model: Any) -> Tensor:
        rows = gather_rows(self.items[:2])[0][:PROBED_ROWS]
        with torch.no_grad():
            return row_scores(model, rows, self.encoder.pad_id, device=next(model.parameters()).device, budget=self.budget)

    def _scores(self, rows: Sequence[Row]) -> Tensor:
        return row_scores(self.model, rows, self.encoder.pad_id, device=self.processes.device, budget=self.budget)


def _rows_of(items: Sequence[EncodedRanking]) -> tuple[list[Row], list[Tensor]]:
    """All rows of all items, and for each item the row of each of its completions."""
    rows, places = gather_rows(items)
    return rows, [place[: item.size] for place, item in zip(places, items, strict=True)]
