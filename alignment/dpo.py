"""Direct preference optimisation, straight from rankings: each completion is encoded once, and its pairs are differences of log-ratios."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from alignment.losses import dpo_losses, implicit_margins
from alignment.options import DPOOptions
from rewardmodel.accuracy import Judged, accuracy
from rewardmodel.losses import pair_weights, stack
from rewardmodel.train import read_items
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, load_policy
from training.loop import Training, train
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row, gather_rows
from training.processes import Processes, Sums
from training.rankings import EncodedRanking
from training.row_logps import measured, row_logps
from training.rundir import RunDirectory

REFERENCE_FILE = "reference_logps.safetensors"


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model` (the policy to train), `data` (a snapshot's rankings.jsonl), and, if it is not `model` itself, `reference`."""
    options = parse_options(DPOOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    inputs = run_directory.inputs
    encoder = Encoder.of(inputs["model"], options)
    items, counts = read_items(run_directory.data_file(), encoder, options)
    model = load_policy(
        inputs["model"],
        device=processes.device,
        lora=Lora.of(options),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=run_directory.seed,
    )
    reference_logps = _reference_logps(run_directory, model, encoder, processes, options=options, items=items)
    objective = Preferences(model, encoder, processes, options, items=items, reference_logps=reference_logps)
    all_counts = {**counts, "boundary_moves": encoder.boundary_moves, "pairs": objective.pairs, "ties_left_out": objective.tied}
    run_directory.event("counts", **all_counts)
    train(Training(run_directory, processes, options, model, encoder, objective, all_counts), batch=options.batch_rankings)


class Preferences:
    """The DPO objective: mean over rankings of the mean over a ranking's preference pairs; ties make no pair."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        processes: Processes,
        options: DPOOptions,
        *,
        items: dict[str, list[EncodedRanking]],
        reference_logps: dict[str, list[Tensor]],
    ) -> None:
        """Args: reference_logps: for each split and item, (K,) float32 summed log-probabilities under the reference."""
        self.model = model
        self.pad_id = encoder.pad_id
        self.processes = processes
        self.options = options
        self.items, self.held_out = items["train"], items["held_out"]
        self.reference_logps = reference_logps
        self.targets = [pair_weights(item.rankings, item.size, ties="drop") for item in self.items]
        self.keys = [item.key for item in self.items]
        self.budget = options.tokens_per_micro_batch
        self.weights = [target.weight for target in self.targets]
        self.costs = [item.tokens for item in self.items]
        self.pairs = sum(target.pairs for target in self.targets)
        self.tied = sum(target.tied for target in self.targets)
        self.extra: list[tuple[nn.Parameter, float]] = []

    def denominator(self, indices: Sequence[int]) -> float:
        return sum(self.weights[index] for index in indices)

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        items = [self.items[index] for index in indices]
        rows, places = gather_rows(items)
        device, size = self.processes.device, places.shape[1]
        policy = self._logps(rows)[places.to(device)]
        reference = _fill([self.reference_logps["train"][index] for index in indices], size).to(device)
        wins = stack([self.targets[index].wins for index in indices], size).to(device)
        if self.options.length_normalised:
            lengths = _lengths(items, size).to(device)
            policy, reference = policy / lengths, reference / lengths
        losses = dpo_losses(policy, reference, wins, beta=self.options.beta, label_smoothing=self.options.label_smoothing)
        sums = self._sums(policy.detach(), reference, wins)
        sums["loss"] = (losses.detach().sum(), self.denominator(indices))
        return losses.sum(), sums

    def _sums(self, policy: Tensor, reference: Tensor, wins: Tensor) -> Sums:
        """Chosen and rejected apart: when both fall, a growing margin hides it."""
        weight = wins.sum()
        margins = implicit_margins(policy, reference)
        ratios = policy - reference
        chosen, rejected = wins.sum(2), wins.sum(1)
        return {
            "accuracy": ((wins * (margins.sign() + 1) / 2).sum(), weight),
            "margin": (self.options.beta * (wins * margins).sum(), weight),
            "chosen_logps": ((chosen * policy).sum(), weight),
            "rejected_logps": ((rejected * policy).sum(), weight),
            "chosen_log_ratio": ((chosen * ratios).sum(), weight),
            "rejected_log_ratio": ((rejected * ratios).sum(), weight),
        }

    def evaluate(self) -> dict[str, float]:
        """On held-out rankings: loss, implicit-reward accuracy with its 95 % interval (bootstrap over prompts), log-ratios.

        `kl_reference_policy_k1_nats` is the mean of log reference - log policy over completions: an estimate of KL(reference || policy)
        for a whole completion as far as the reference wrote them. KL(policy || reference) needs samples of the policy: see `evaluate`.
        """
        if not self.held_out:
            return {}
        rows, places = gather_rows(self.held_out)
        points = measured(rows, self.processes, self._logps)[places]
        size = places.shape[1]
        reference = _fill(self.reference_logps["held_out"], size)
        real = _lengths(self.held_out, size, missing=0) > 0
        kl = float(((reference - points) * real).sum() / real.sum())
        if self.options.length_normalised:
            lengths = _lengths(self.held_out, size)
            points, reference = points / lengths, reference / lengths
        targets = [pair_weights(item.rankings, item.size, ties="drop") for item in self.held_out]
        wins = stack([target.wins for target in targets], size)
        losses = dpo_losses(points, reference, wins, beta=self.options.beta, label_smoothing=self.options.label_smoothing)
        weight = sum(target.weight for target in targets)
        if not weight:
            return {}
        metrics = {name: float(top) / float(bottom) for name, (top, bottom) in self._sums(points, reference, wins).items()}
        ratios = points - reference
        judged = [
            Judged(item.digest, ratio[: item.size].tolist(), item.rankings) for item, ratio in zip(self.held_out, ratios, strict=True)
        ]
        share = accuracy(judged)
        assert share is not None
        metrics |= {"accuracy": share.share, "accuracy_low": share.low, "accuracy_high": share.high, "pairs": share.pairs}
        return {**metrics, "loss": float(losses.sum()) / weight, "kl_reference_policy_k1_nats": kl}

    def notes(self) -> dict[str, Any]:
        return {}

    def load(self, folder: Path, device: torch.device) -> Any:
        return load_policy(folder, device=device)

    def probe(self, model: Any) -> Tensor:
        with torch.no_grad():
            return row_logps(model, gather_rows(self.items[:2])[0][:PROBED_ROWS], self.pad_id, device=model.device, budget=self.budget)

    def _logps(self, rows: Sequence[Row]) -> Tensor:
        return row_logps(self.model, rows, self.pad_id, device=self.processes.device, budget=self.budget)


def _fill(values: Sequence[Tensor], size: int) -> Tensor:
    filled = torch.zeros(len(values), size)
    for place, value in enumerate(values):
        filled[place, : len(value)] = value
    return filled


def _lengths(items: Sequence[EncodedRanking], size: int, *, missing: float = 1) -> Tensor:
    """(B, K) float32: tokens of each completion; `missing` where an item has fewer than K."""
    lengths = torch.full((len(items), size), float(missing))
    for place, item in enumerate(items):
        lengths[place, : item.size] = torch.tensor([float(len(item.rows[row])) for row in item.places])
    return lengths


def _reference_logps(
    run_directory: RunDirectory,
    model: Any,
    encoder: Encoder,
    processes: Processes,
    *,
    options: DPOOptions,
    items: dict[str, list[EncodedRanking]],
) -> dict[str, list[Tensor]]:
    """Log-probabilities under the reference, once for each distinct completion, kept in the run directory for when the run resumes.

    Without `inputs.reference` the reference is the policy as it stands now, before any step.
    """
    name = run_directory.inputs.get("reference")
    rows, places = gather_rows([*items["train"], *items["held_out"]])
    key = json.dumps({"encoder": encoder.digest, "rows": len(rows), "reference": name or run_directory.inputs["model"]}, sort_keys=True)
    file = run_directory.path / REFERENCE_FILE
    logps = _read_logps(file, key)
    if logps is None:
        reference = model if name is None else _load_reference(name, encoder, processes)

        def compute(some: Sequence[Row]) -> Tensor:
            return row_logps(reference, some, encoder.pad_id, device=processes.device, budget=options.tokens_per_micro_batch)

        logps = measured(rows, processes, compute)
        if processes.is_main:
            beside = file.with_name(f".{file.name}.new")
            save_file({"logps": logps}, beside, metadata={"key": key})
            beside.replace(file)
        processes.barrier()
    of_item = [logps[place[: item.size]] for place, item in zip(places, [*items["train"], *items["held_out"]], strict=True)]
    return {"train": of_item[: len(items["train"])], "held_out": of_item[len(items["train"]) :]}


def _load_reference(name: str, encoder: Encoder, processes: Processes) -> Any:
    if Encoder.load(name, template=encoder.template).digest != encoder.digest:
        raise InputError(f"The reference {name} encodes text differently from the policy.", remedy="Use a reference of the same tokenizer.")
    return load_policy(name, device=processes.device).eval().requires_grad_(False)


def _read_logps(file: Path, key: str) -> Tensor | None:
    if not file.exists():
        return None
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor("logps") if (opened.metadata() or {}).get("key") == key else None
