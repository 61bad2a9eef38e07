"""The one loop that SFT, the reward model and DPO share: batches, steps, events, evaluation, checkpoints, and the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from training.checkpoint import (
    State,
    load_optimiser_state,
    load_trained,
    optimiser_state,
    random_state,
    restore_newest,
    set_random_state,
    trained_tensors,
    write_checkpoint,
)
from training.encode import Encoder
from training.errors import InputError, Stopped
from training.language_model import save_model
from training.optimiser import Optimiser, Update
from training.options import TrainingOptions
from training.pack import epoch_batches, micro_batches
from training.processes import Processes, Sums, add_sums
from training.progress import Progress, stop_requested
from training.rundir import RunDirectory, file_digest


class Objective(Protocol):
    """What a method adds to the loop. Items are known by index; each process knows all of them."""

    @property
    def weights(self) -> Sequence[float]:
        """How much of a batch each item is: its rankings, or 1."""

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each item."""

    @property
    def extra(self) -> Sequence[tuple[nn.Parameter, float]]:
        """Trained parameters outside the model, with their learning rates."""

    def denominator(self, indices: Sequence[int]) -> float:
        """What the summed loss of a whole batch is divided by. Depends on the items alone, so every process knows it."""

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        """Summed loss of these items, and sums for metrics (detached)."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out items; the same on every process."""

    def notes(self) -> dict[str, Any]:
        """JSON files that belong beside the model."""


@dataclass(slots=True)
class Training:
    """One run of the loop."""

    run: RunDirectory
    processes: Processes
    options: TrainingOptions
    model: Any
    encoder: Encoder
    objective: Objective
    counts: dict[str, Any] = field(default_factory=dict)


def plan(weights: Sequence[float], options: TrainingOptions, *, batch: float, seed: int) -> list[list[int]]:
    """The batches of the whole run, in order: `max_steps` of them, or as many as `epochs` hold (a fraction is rounded up)."""
    if not any(weight > 0 for weight in weights):
        raise InputError("Nothing to train on: no item has anything to teach.", remedy="Check the data and the split.")
    batches: list[list[int]] = []
    epoch = 0
    while True:
        this = epoch_batches(weights, batch=batch, seed=seed, epoch=epoch)
        if options.max_steps:
            batches += this
            if len(batches) >= options.max_steps:
                return batches[: options.max_steps]
        else:
            left = options.epochs - epoch
            batches += this if left >= 1 else this[: max(1, -int(-left * len(this) // 1))]
            if left <= 1:
                return batches
        epoch += 1


def train(training: Training, *, batch: float) -> dict[str, float]:
    """Run every step, evaluate, save the model, write `result.json`. Resumes from the newest good checkpoint.

    Raises: Stopped after a checkpoint when SIGTERM asked for it;  TrainingFailed when steps stay non-finite.
    """
    run, processes, options, objective = training.run, training.processes, training.options, training.objective
    batches = plan(objective.weights, options, batch=batch, seed=run.seed)
    steps = len(batches)
    processes.same_start([training.model])
    optimiser = Optimiser(training.model, options, steps=steps, extra=objective.extra)
    progress = Progress(run, processes, steps=steps)
    first, sums = _resume(training, optimiser, progress)
    run.event("start", steps=steps, processes=processes.world, device=str(processes.device), dtype=processes.dtype, first_step=first)
    progress.mark(first)
    tokens, saved_at = 0.0, time.monotonic()
    for step in range(first, steps):
        step_tokens, update = _step(training, optimiser, batches[step], step, sums)
        tokens += step_tokens
        done = step + 1
        if done % options.log_steps == 0 or done == steps:
            _report(progress, done, sums=sums, tokens=tokens, update=update, optimiser=optimiser)
            sums, tokens = {}, 0.0
        if options.evaluate_steps and done % options.evaluate_steps == 0 and done < steps:
            run.event("evaluation", step=done, metrics=objective.evaluate())
        due = bool(options.checkpoint_seconds) and time.monotonic() - saved_at >= options.checkpoint_seconds
        stop, due = processes.any(stop_requested(), due)
        if done < steps and (stop or due or (options.checkpoint_steps and done % options.checkpoint_steps == 0)):
            _save(training, optimiser, progress, done, sums=sums, tokens=tokens)
            saved_at = time.monotonic()
        if stop and done < steps:
            run.event("end", status="stopped", step=done)
            raise Stopped(f"stopped at step {done} of {steps}")
    return _finish(training, optimiser, progress)


def _step(training: Training, optimiser: Optimiser, indices: list[int], step: int, sums: Sums) -> tuple[float, Update]:
    """Gradients of one batch, a micro-batch at a time, and the optimiser's step. Returns this process's tokens and the update."""
    objective, processes = training.objective, training.processes
    costs = [objective.costs[index] for index in indices]
    denominator = objective.denominator(indices)
    mine = processes.share(indices, costs)
    my_costs = [objective.costs[index] for index in mine]
    for places in micro_batches(my_costs, budget=training.options.tokens_per_micro_batch):
        with processes.autocast():
            loss, part = objective.forward([mine[place] for place in places])
        (loss / denominator).backward()
        add_sums(sums, part)
    return float(sum(my_costs)), optimiser.step(step, processes)


def _report(progress: Progress, done: int, *, sums: Sums, tokens: float, update: Update, optimiser: Optimiser) -> None:
    progress.report(
        done,
        sums,
        tokens=tokens,
        learning_rate=update.learning_rate,
        gradient_norm=update.gradient_norm,
        skipped_steps=float(optimiser.skipped),
    )
    if update.skipped:
        progress.run.event("warning", text=f"step {done} was skipped: its gradients are not finite ({optimiser.skipped} so far)")


def _save(training: Training, optimiser: Optimiser, progress: Progress, step: int, *, sums: Sums, tokens: float) -> None:
    """Every process comes here; the first one writes. Sums of the steps since the last report are kept, so that no metric has a hole."""
    all_sums = training.processes.gather({name: [float(top), float(bottom)] for name, (top, bottom) in sums.items()})
    all_tokens = training.processes.gather(tokens)
    if training.processes.is_main:
        merged: Sums = {}
        for part in all_sums:
            add_sums(merged, {name: (top, bottom) for name, (top, bottom) in part.items()})
        extra: dict[str, Tensor] = {str(index): parameter for index, (parameter, _) in enumerate(training.objective.extra)}
        tensors = {"model": trained_tensors(training.model), "optimiser": optimiser_state(optimiser.adamw), "random": random_state()}
        values = {
            "sums": merged,
            "tokens": progress.tokens,
            "tokens_since_report": sum(all_tokens),
            "seconds": progress.seconds,
            "skipped": optimiser.skipped,
            "skipped_in_a_row": optimiser.skipped_in_a_row,
        }
        state = State({**tensors, **({"extra": extra} if extra else {})}, values)
        folder = write_checkpoint(training.run.checkpoints, step, state, keep=training.options.keep_checkpoints)
        training.run.event("checkpoint", step=step, path=str(folder))
    training.processes.barrier()


def _resume(training: Training, optimiser: Optimiser, progress: Progress) -> tuple[int, Sums]:
    """(first step to do, sums since the last report), from the newest checkpoint that holds; (0, {}) without one."""
    found = restore_newest(training.run.checkpoints, lambda text: training.run.event("warning", text=text))
    if found is None:
        return 0, {}
    step, state = found
    load_trained(training.model, state.tensors["model"])
    load_optimiser_state(optimiser.adamw, state.tensors["optimiser"])
    for index, (parameter, _) in enumerate(training.objective.extra):
        parameter.data.copy_(state.tensors["extra"][str(index)])
    set_random_state(state.tensors["random"])
    values = state.values
    progress.tokens = values["tokens"] + values["tokens_since_report"]
    progress.seconds_before = values["seconds"]
    optimiser.skipped, optimiser.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]
    training.run.event("resume", step=step)
    sums = {name: (top, bottom) for name, (top, bottom) in values["sums"].items()} if training.processes.is_main else {}
    return step, sums


def _finish(training: Training, optimiser: Optimiser, progress: Progress) -> dict[str, float]:
    """Evaluate, save the model, and, last, say that it went well."""
    run, processes = training.run, training.processes
    metrics = training.objective.evaluate()
    run.event("evaluation", step=progress.steps, metrics=metrics)
    metrics = {**metrics, "steps": progress.steps, "tokens": progress.tokens, "skipped_steps": optimiser.skipped}
    if processes.is_main:
        save_model(training.model, training.encoder, run.model_folder, notes=training.objective.notes())
        weights = {file.name: file_digest(file) for file in sorted(run.model_folder.glob("*.safetensors"))}
        artefacts = {"model": str(run.model_folder), "weights": weights, "encoder_digest": training.encoder.digest}
        run.write_result(metrics=metrics, artefacts=artefacts, seconds=progress.seconds, counts=training.counts)
    run.event("end", status="done", step=progress.steps)
    processes.barrier()
    return metrics
