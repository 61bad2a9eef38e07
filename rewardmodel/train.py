"""Training a reward model from rankings, and measuring it on held-out ones."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardmodel.accuracy import Judged, accuracy
from rewardmodel.losses import pair_weights, ranking_losses, stack, start_of_log_nu
from rewardmodel.network import load_reward_model
from rewardmodel.options import RewardOptions
from rewardmodel.score import REWARD_FILE, RewardNotes, row_scores
from training.encode import Encoder
from training.language_model import Lora
from training.ledger import Ledger
from training.loop import Training, train
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row, gather_rows
from training.processes import Processes, Sums
from training.rankings import EncodedRanking, encode_rankings, read_rankings
from training.row_logps import measured
from training.rundir import RunDirectory, file_digest

# Scores of this many training completions give the mean and scale that normalise rewards.
NORMALISED_ON = 1000


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model` (a policy, or a reward model to go on with) and `data` (a snapshot's rankings.jsonl)."""
    options = parse_options(RewardOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    encoder = Encoder.of(run_directory.inputs["model"], options)
    data = run_directory.data_file()
    items, counts = read_items(data, encoder, options)
    objective_counts = {**counts, "boundary_moves": encoder.boundary_moves}
    model = load_reward_model(
        run_directory.inputs["model"],
        device=processes.device,
        lora=Lora.of(options),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=run_directory.seed,
    )
    objective = Scores(model, encoder, processes, options, items=items, digest=file_digest(data))
    objective_counts["pairs"], objective_counts["ties"] = objective.pairs, objective.tied
    run_directory.event("counts", **objective_counts)
    train(Training(run_directory, processes, options, model, encoder, objective, objective_counts), batch=options.batch_rankings)


def read_items(data: Any, encoder: Encoder, options: Any) -> tuple[dict[str, list[EncodedRanking]], dict[str, Any]]:
    """Encoded rankings by split, and what was counted. `options`: anything with `max_dropped_share`."""
    items, counts = {}, {}
    prompts = read_rankings(data)
    for split in ("train", "held_out"):
        ledger = Ledger(f"completions of {split} prompts")
        items[split] = encode_rankings([prompt for prompt in prompts if prompt.split == split], encoder, ledger)
        if split == "train" or ledger.read:
            ledger.enforce(options.max_dropped_share)
        counts[split] = {**ledger.counts(), "prompts": len(items[split]), "rankings": sum(len(item.rankings) for item in items[split])}
    return items, counts


class Scores:
    """The reward objective: mean over rankings of the mean over a ranking's pairs."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        processes: Processes,
        options: RewardOptions,
        *,
        items: dict[str, list[EncodedRanking]],
        digest: str,
    ) -> None:
        self.model = model
        self.encoder = encoder
        self.processes = processes
        self.options = options
        self.digest = digest
        self.items = items["train"]
        self.held_out = items["held_out"]
        self.targets = [pair_weights(item.rankings, item.size, ties=options.ties) for item in self.items]
        self.keys = [item.key for item in self.items]
        self.budget = options.tokens_per_micro_batch
        self.weights = [target.weight for target in self.targets]
        self.costs = [item.tokens for item in self.items]
        self.pairs = sum(target.pairs for target in self.targets)
        self.tied = sum(target.tied for target in self.targets)
        start = start_of_log_nu(self.pairs, self.tied) if options.ties == "davidson" else None
        self.log_nu = None if start is None else nn.Parameter(torch.tensor(start, device=processes.device))
        self.extra = [] if self.log_nu is None else [(self.log_nu, options.tie_learning_rate)]

    def denominator(self, indices: Sequence[int]) -> float:
        return sum(self.weights[index] for index in indices)

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        rows, places = gather_rows([self.items[index] for index in indices])
        targets = [self.targets[index] for index in indices]
        device = self.processes.device
        points = self._scores(rows)[places.to(device)]
        wins = stack([target.wins for target in targets], places.shape[1]).to(device)
        ties = stack([target.ties for target in targets], places.shape[1]).to(device)
        losses = ranking_losses(points, wins, ties, log_nu=self.log_nu, centring=self.options.centring)
        with torch.no_grad():
            margins = points[:, :, None] - points[:, None, :]
            sums: Sums = {
                "loss": (losses.detach().sum(), self.denominator(indices)),
                "accuracy": ((wins * (margins.sign() + 1) / 2).sum(), wins.sum()),
                "margin": ((wins * margins).sum(), wins.sum()),
                "score": (points.sum(), points.numel()),
            }
            if self.log_nu is not None:
                sums["tie_nu"] = (self.log_nu.detach().exp() * len(indices), len(indices))
        return losses.sum(), sums

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy with its 95 % interval (bootstrap over prompts), beside "longer wins"; {} without held-out rankings."""
        rows, places = _rows_of(self.held_out)
        points = measured(rows, self.processes, self._scores)
        judged = [Judged(item.digest, points[place].tolist(), item.rankings) for item, place in zip(self.held_out, places, strict=True)]
        longer = [Judged(item.digest, [float(len(text)) for text in item.texts], item.rankings) for item in self.held_out]
        metrics: dict[str, float] = {}
        for prefix, majority in (("", False), ("majority_", True)):
            measured_here = accuracy(judged, majority=majority, samples=self.options.bootstrap_samples)
            beside = accuracy(longer, majority=majority, samples=self.options.bootstrap_samples)
            if measured_here is None or beside is None:
                continue
            metrics |= {
                f"{prefix}accuracy": measured_here.share,
                f"{prefix}accuracy_low": measured_here.low,
                f"{prefix}accuracy_high": measured_here.high,
                f"{prefix}pairs": measured_here.pairs,
                f"{prefix}baseline_longer": beside.share,
                f"{prefix}baseline_longer_low": beside.low,
                f"{prefix}baseline_longer_high": beside.high,
            }
        return {**metrics, "baseline_chance": 0.5, **self._likelihood(points, places)} if metrics else {}

    def _likelihood(self, points: Tensor, places: list[Tensor]) -> dict[str, float]:
        """Minus the mean log-likelihood of a held-out ranking's pairs under the trained model, and how many ties there are."""
        log_nu = None if self.log_nu is None else self.log_nu.detach().cpu()
        ties = "drop" if log_nu is None and self.options.ties == "davidson" else self.options.ties
        total, weight, tied = 0.0, 0.0, 0
        for item, place in zip(self.held_out, places, strict=True):
            target = pair_weights(item.rankings, item.size, ties=ties)
            total += float(ranking_losses(points[place][None], target.wins[None], target.ties[None], log_nu=log_nu).sum())
            weight += target.weight
            tied += target.tied
        return {
            "log_loss": total / weight if weight else math.nan,
            "ties": tied,
            "held_out_prompts": len({i.digest for i in self.held_out}),
        }

    def notes(self) -> dict[str, Any]:
        rows, _ = _rows_of(self.items)
        rows = rows[:: -(-len(rows) // NORMALISED_ON)]
        with torch.no_grad(), self.processes.autocast():
            points = self._scores(rows).cpu().double()
        notes = RewardNotes(
            mean=float(points.mean()),
            scale=max(float(points.std()), 1e-6),
            ties=self.options.ties,
            nu=0.0 if self.log_nu is None else float(self.log_nu.detach().exp()),
            encoder_digest=self.encoder.digest,
            snapshot_digest=self.digest,
        )
        return {REWARD_FILE: notes.as_json()}

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
