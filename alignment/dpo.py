"""Preference optimisation straight from rankings, by any loss of `loss_kinds`: each completion is encoded once, and its pairs are
differences of log-ratios."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.kl import STREAM, own_kl
from alignment.loss_kinds import LOSS_KINDS
from alignment.losses import Compared, preference_losses, rewards
from alignment.mismatched import Mismatched
from alignment.options import DPOOptions
from alignment.preference_metrics import ChosenWatch, blur, preference_sums
from alignment.preferences import compare, target
from alignment.reference_logps import Reference, reference_logps
from alignment.rollout.sampling import Sampling
from rewardmodel.accuracy import Judged, accuracy
from rewardmodel.raters import rater_weights, reweighted
from rewardmodel.train import read_items
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, is_adapted, load_policy
from training.loop import Training, plan, train
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row, gather_rows, micro_batches
from training.processes import Processes, Sums
from training.rankings import EncodedRanking
from training.row_logps import measured, row_logps
from training.rundir import RunDirectory


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
    objective = Preferences(model, encoder, processes, options, items=items, run=run_directory)
    objective.keep_to_whole_steps(seed=run_directory.seed)
    reference = inputs.get("reference")
    source = Reference(
        lambda: model if reference is None else _load_reference(reference, encoder, processes), encoder.digest, encoder.pad_id
    )
    logps, reused = reference_logps(run_directory, source, objective.reference_rows(), processes)
    objective.set_reference(logps)
    all_counts = {**counts, "boundary_moves": encoder.boundary_moves, **objective.counts(), **reused}
    run_directory.event("counts", **all_counts)
    watch = ChosenWatch(run_directory, start=0.0 if reference is None else None)
    train(Training(run_directory, processes, options, model, encoder, objective, all_counts, watch), batch=options.batch_rankings)


class Preferences:
    """The preference objective: mean over rankings of what `options.loss` makes of a ranking."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        processes: Processes,
        options: DPOOptions,
        *,
        items: dict[str, list[EncodedRanking]],
        run: RunDirectory,
    ) -> None:
        self.model = model
        self.run = run
        self.encoder = encoder
        self.pad_id = encoder.pad_id
        self.processes = processes
        self.options = options
        self.kind = LOSS_KINDS[options.loss]
        self.items, self.held_out = items["train"], items["held_out"]
        self.rater_weights = dict[str, float]()
        if options.rater_weights == "agreement":
            self.rater_weights = rater_weights([(item.rankings, item.size) for item in self.items])
            self.items = reweighted(self.items, self.rater_weights)
        as_said = replace(options, strength_margin=0.0)
        self.targets = [target(item.rankings, item.size, options) for item in self.items]
        self.held_out_targets = [target(item.rankings, item.size, as_said) for item in self.held_out]
        self.keys = [item.key for item in self.items]
        self.budget, self.copies = options.tokens_per_micro_batch, 1
        self.weights = [one.weight for one in self.targets]
        self.costs = [item.tokens for item in self.items]
        self.extra: list[tuple[nn.Parameter, float]] = []
        self.mismatched = Mismatched(self.items, encoder) if options.loss == "kto" else None
        self.held_out_mismatched = Mismatched(self.held_out, encoder) if options.loss == "kto" else None
        self.whole_steps: frozenset[frozenset[int]] | None = None

    def keep_to_whole_steps(self, *, seed: int) -> None:
        """A loss of a whole step is computed in one piece or not at all: raises InputError where the step would be cut."""
        if self.kind.takes != "step":
            return
        if self.processes.world > 1:
            raise InputError(
                f"loss = {self.kind.name} takes all rankings of a step at once; {self.processes.world} processes would each see a part.",
                remedy="Run it in one process.",
            )
        batches = plan(self.weights, self.options, batch=self.options.batch_rankings, seed=seed)
        most = max(sum(self.costs[index] for index in batch) for batch in batches)
        if any(len(micro_batches([self.costs[index] for index in batch], budget=self.budget)) > 1 for batch in batches):
            raise InputError(
                f"loss = {self.kind.name} takes all rankings of a step at once, and micro-batches of {self.budget} tokens cut it.",
                remedy=f"Set tokens_per_micro_batch to at least {most}, or a smaller batch_rankings.",
            )
        self.whole_steps = frozenset(frozenset(batch) for batch in batches)

    def reference_rows(self) -> list[list[Row]]:
        """Every row whose log-probability under the reference is needed, those of one prompt together."""
        units = [[Row(item.prompt_ids, row) for row in item.rows] for item in (*self.items, *self.held_out)]
        for mismatched in (self.mismatched, self.held_out_mismatched):
            units += [[row] for row in mismatched.rows] if mismatched else []
        return units

    def set_reference(self, logps: Sequence[Tensor]) -> None:
        """Args: logps: (rows,) float32 for each unit of `reference_rows`, in its order."""
        items = [*self.items, *self.held_out]
        by_item = [logps[number][torch.tensor(item.places)] for number, item in enumerate(items)]
        self.reference_logps, self.held_out_reference = by_item[: len(self.items)], by_item[len(self.items) :]
        rest = torch.cat([*logps[len(items) :], torch.zeros(0)])
        for mismatched in (self.mismatched, self.held_out_mismatched):
            if mismatched:
                mismatched.reference, rest = rest[: len(mismatched.rows)], rest[len(mismatched.rows) :]

    def counts(self) -> dict[str, Any]:
        tied = sum(one.tied for one in self.targets)
        counts: dict[str, Any] = {"pairs": sum(one.pairs for one in self.targets), "ties": tied}
        if self.options.ties == "drop":
            counts["ties_left_out"] = tied
        if self.rater_weights:
            counts["rater_weights"] = {rater: round(weight, 4) for rater, weight in self.rater_weights.items()}
        return counts

    def denominator(self, indices: Sequence[int]) -> float:
        return sum(self.weights[index] for index in indices)

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        if self.whole_steps is not None and frozenset(indices) not in self.whole_steps:
            raise InputError(f"loss = {self.kind.name} needs its whole step in one micro-batch.", remedy="Set a smaller batch_rankings.")
        items, targets = [self.items[index] for index in indices], [self.targets[index] for index in indices]
        rows, places = gather_rows(items)
        logps = self._logps(rows)[places.to(self.processes.device)]
        reference = _fill([self.reference_logps[index] for index in indices], logps)
        shift = self.mismatched.shift(indices, self._logps) if self.mismatched else 0.0
        batch = compare(targets, logps, reference, _lengths(items, places.shape[1]), shift=shift)
        losses = preference_losses(batch, self.options)
        sums = preference_sums(batch, self.options, dtype=self.processes.dtype)
        sums["loss"] = (losses.detach().sum(), self.denominator(indices))
        if self.mismatched:
            sums["kl_mismatched_nats"] = (float(shift) * len(indices), len(indices))
        return losses.sum(), sums

    def evaluate(self) -> dict[str, float]:
        """On held-out rankings: loss, implicit-reward accuracy with its 95 % interval (bootstrap over prompts), log-ratios.

        `reference_above_policy_nats` is the mean of log reference - log policy over completions: KL(reference || policy) of a whole
        completion only as far as the reference wrote them. KL(policy || reference) needs samples of the policy: `evaluate_at_end`.
        """
        weight = sum(one.weight for one in self.held_out_targets)
        if not weight:
            return {}
        rows, places = gather_rows(self.held_out)
        size = places.shape[1]
        shift = 0.0
        if self.held_out_mismatched:
            numbers = range(len(self.held_out))
            shift = float(self.held_out_mismatched.shift(numbers, lambda some: measured(some, self.processes, self._logps)))
        logps = measured(rows, self.processes, self._logps)[places]
        reference, lengths = _fill(self.held_out_reference, logps), _lengths(self.held_out, size, missing=0)
        batch = compare(self.held_out_targets, logps, reference, lengths.clamp(min=1), shift=shift)
        sums = preference_sums(batch, self.options, dtype=self.processes.dtype)
        metrics = {name: float(top) / float(bottom) for name, (top, bottom) in sums.items() if float(bottom)}
        real = lengths > 0
        metrics["loss"] = float(preference_losses(batch, self.options).sum()) / weight
        metrics["reference_above_policy_nats"] = float(((reference - logps) * real).sum() / real.sum())
        return {**metrics, **self._held_out_accuracy(batch)}

    def _held_out_accuracy(self, batch: Compared) -> dict[str, float]:
        points, rough = rewards(batch, self.options).tolist(), blur(batch, self.options, dtype=self.processes.dtype).tolist()
        owners = [item for item, one in zip(self.held_out, self.held_out_targets, strict=True) for _ in one.layers]
        judged = [
            Judged(item.digest, point[: item.size], item.rankings, blur=around[: item.size])
            for item, point, around in zip(owners, points, rough, strict=True)
        ]
        share = accuracy(judged)
        if share is None:
            return {}
        return {"accuracy": share.share, "accuracy_low": share.low, "accuracy_high": share.high, "pairs": share.pairs}

    def evaluate_at_end(self) -> dict[str, float]:
        """KL(policy || reference) on the policy's own answers to held-out prompts."""
        prompts = list({item.digest: item.prompt_ids for item in self.held_out}.values())[: self.options.kl_prompts]
        if not prompts:
            return {}
        most = self.encoder.max_positions
        room = self.options.max_completion_tokens if most is None else most - max(map(len, prompts))
        sampling = Sampling(max(1, min(room, self.options.max_completion_tokens)), seed=self.run.seed, step=STREAM)
        try:
            adapter_off = is_adapted(self.model) and not self.run.inputs.get("reference")
            load = (lambda: None) if adapter_off else self._load_reference
            return own_kl(self.model, load, self.encoder, prompts, sampling=sampling, budget=self.budget, processes=self.processes)
        except InputError as error:  # a figure that is missing must not cost the trained model
            self.run.event("warning", text=f"the KL to the reference was not measured: {error}")
            return {}

    def _load_reference(self) -> Any:
        name = self.run.inputs.get("reference") or self.run.inputs["model"]
        return _load_reference(name, self.encoder, self.processes)

    def notes(self) -> dict[str, Any]:
        return {}

    def load(self, folder: Path, device: torch.device) -> Any:
        return load_policy(folder, device=device)

    def probe(self, model: Any) -> Tensor:
        with torch.no_grad():
            return row_logps(model, gather_rows(self.items[:2])[0][:PROBED_ROWS], self.pad_id, device=model.device, budget=self.budget)

    def _logps(self, rows: Sequence[Row]) -> Tensor:
        return row_logps(self.model, rows, self.pad_id, device=self.processes.device, budget=self.budget)


def _fill(values: Sequence[Tensor], logps: Tensor) -> Tensor:
    """(B, K) of vectors of up to K numbers, on the device of `logps` (B, K).

    The rest are the policy's own, so that their log-ratio is 0: no pair takes it, but an infinite f-divergence there would spoil gradients.
    """
    filled, real = torch.zeros(logps.shape), torch.zeros(logps.shape, dtype=torch.bool)
    for place, value in enumerate(values):
        filled[place, : len(value)] = value
        real[place, : len(value)] = True
    return torch.where(real.to(logps.device), filled.to(logps.device), logps.detach())


def _lengths(items: Sequence[EncodedRanking], size: int, *, missing: float = 1) -> Tensor:
    """(B, K) float32: tokens of each completion; `missing` where an item has fewer than K."""
    lengths = torch.full((len(items), size), float(missing))
    for place, item in enumerate(items):
        lengths[place, : item.size] = torch.tensor([float(len(item.rows[row])) for row in item.places])
    return lengths


def _load_reference(name: str, encoder: Encoder, processes: Processes) -> Any:
    if Encoder.load(name, template=encoder.template).digest != encoder.digest:
        raise InputError(f"The reference {name} encodes text differently from the policy.", remedy="Use a reference of the same tokenizer.")
    return load_policy(name, device=processes.device).eval().requires_grad_(False)
