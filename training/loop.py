"""The one loop that SFT, the reward model and DPO share: batches, steps, events, evaluation, checkpoints, and the end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.artefact import save_verified
from training.checkpoint import (
    State,
    load_trained,
    random_state,
    restore_newest,
    set_random_state,
    trained_tensors,
    write_checkpoint,
)
from training.encode import Encoder
from training.errors import InputError, Stopped, TrainingFailed
from training.gradients import Gradients
from training.language_model import unwrap
from training.objective import Objective
from training.optimiser import Optimiser, Update
from training.options import TrainingOptions
from training.pack import epoch_batches
from training.packed_model import unpacked_reason
from training.processes import Processes, Sums, add_sums
from training.progress import Progress, stop_requested
from training.rundir import RunDirectory, file_digest
from training.sharding import gathered, shard


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
    watch: Callable[[int, dict[str, float]], None] | None = None  # told each report: the step, and metrics over all processes


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

    Raises: Stopped after a checkpoint when SIGTERM asked for it;  TrainingFailed when steps stay non-finite, when a single item does not
            fit into memory, or when the saved model is not the trained one.
    """
    run, processes, options, objective = training.run, training.processes, training.options, training.objective
    batches = plan(objective.weights, options, batch=batch, seed=run.seed)
    steps = len(batches)
    processes.same_start([training.model])
    shard(training.model, processes)
    optimiser = Optimiser(training.model, options, steps=steps, extra=objective.extra)
    optimiser.start(processes)
    objective.budget = options.tokens_per_micro_batch
    loop = Loop(training, optimiser, Gradients(training.model, objective, processes, optimiser, run), Progress(run, processes, steps=steps))
    first = loop.resume()
    where = {"processes": processes.world, "device": str(processes.device), "dtype": processes.dtype, "sharding": processes.sharding}
    run.event("start", steps=steps, **where, first_step=first)
    with gathered(training.model):
        reason = unpacked_reason(unwrap(training.model).base_model)
    if reason:
        run.event("warning", text=reason)
    if first == 0:
        loop.gradients.rehearse(batches)
    loop.progress.mark(first)
    saved_at = time.monotonic()
    for step in range(first, steps):
        update = loop.step(batches[step], step)
        done = step + 1
        if done % options.log_steps == 0 or done == steps:
            loop.report(done, update)
        if options.evaluate_steps and done % options.evaluate_steps == 0 and done < steps:
            with gathered(training.model):
                run.event("evaluation", step=done, metrics=objective.evaluate())
        due = bool(options.checkpoint_seconds) and time.monotonic() - saved_at >= options.checkpoint_seconds
        stop, due = processes.any(stop_requested(), due)
        if done < steps and (stop or due or (options.checkpoint_steps and done % options.checkpoint_steps == 0)):
            loop.save(done)
            saved_at = time.monotonic()
        if stop and done < steps:
            run.event("end", status="stopped", step=done)
            raise Stopped(f"stopped at step {done} of {steps}")
    return loop.finish()


@dataclass(slots=True)
class Loop:
    """The parts of a run that move, and its sums of metrics since the last report (this process's own)."""

    training: Training
    optimiser: Optimiser
    gradients: Gradients
    progress: Progress
    sums: Sums = field(default_factory=dict)
    tokens: float = 0.0

    def step(self, indices: list[int], step: int) -> Update:
        """One batch: gradients, then the optimiser. Where training cannot go on, the weights as they are go into a checkpoint first."""
        try:
            batch = self.gradients.accumulate(indices, step=step + 1)
            update = self.optimiser.step(step, self.training.processes, blame=batch.blame)
        except TrainingFailed:
            if step:
                self.save(step)
            raise
        add_sums(self.sums, batch.sums)
        self.tokens += batch.tokens
        if update.skipped:
            text = f"step {step + 1} was skipped: {update.reason} ({self.optimiser.skipped} so far)"
            self.training.run.event("warning", text=text)
        return update

    def report(self, done: int, update: Update) -> None:
        metrics = self.progress.report(
            done,
            self.sums,
            tokens=self.tokens,
            learning_rate=update.learning_rate,
            gradient_norm=update.gradient_norm,
            skipped_steps=float(self.optimiser.skipped),
            out_of_memory=float(self.gradients.out_of_memory),
        )
        self.sums, self.tokens = {}, 0.0
        if self.training.watch is not None:
            self.training.watch(done, metrics)

    def save(self, step: int) -> None:
        """Every process comes here; the first one writes. Sums since the last report are kept, so that no metric has a hole."""
        training, processes = self.training, self.training.processes
        all_sums = processes.gather({name: [float(top), float(bottom)] for name, (top, bottom) in self.sums.items()})
        all_tokens = processes.gather(self.tokens)
        model, optimiser = trained_tensors(training.model), self.optimiser.state()
        if processes.is_main:
            merged: Sums = {}
            for part in all_sums:
                add_sums(merged, {name: (top, bottom) for name, (top, bottom) in part.items()})
            tensors = {"model": model, "optimiser": optimiser, "random": random_state()}
            if training.objective.extra:
                tensors["extra"] = {str(index): parameter for index, (parameter, _) in enumerate(training.objective.extra)}
            values = {
                "sums": merged,
                "tokens": self.progress.tokens,
                "tokens_since_report": sum(all_tokens),
                "seconds": self.progress.seconds,
                "skipped": self.optimiser.skipped,
                "skipped_in_a_row": self.optimiser.skipped_in_a_row,
                "tokens_per_micro_batch": training.objective.budget,
                "out_of_memory": self.gradients.out_of_memory,
            }
            folder = write_checkpoint(training.run.checkpoints, step, State(tensors, values), keep=training.options.keep_checkpoints)
            training.run.event("checkpoint", step=step, path=str(folder))
        processes.barrier()

    def resume(self) -> int:
        """The first step to do: 0, or where the newest checkpoint that holds goes on."""
        training = self.training
        found = restore_newest(training.run.checkpoints, lambda text: training.run.event("warning", text=text))
        if found is None:
            return 0
        step, state = found
        load_trained(training.model, state.tensors["model"])
        self.optimiser.load_state(state.tensors["optimiser"])
        for index, (parameter, _) in enumerate(training.objective.extra):
            parameter.data.copy_(state.tensors["extra"][str(index)])
        set_random_state(state.tensors["random"])
        values = state.values
        self.progress.tokens = values["tokens"] + values["tokens_since_report"]
        self.progress.seconds_before = values["seconds"]
        self.optimiser.skipped, self.optimiser.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]
        training.objective.budget, self.gradients.out_of_memory = values["tokens_per_micro_batch"], values["out_of_memory"]
        if training.processes.is_main:
            self.sums = {name: (top, bottom) for name, (top, bottom) in values["sums"].items()}
        training.run.event("resume", step=step)
        return step

    def finish(self) -> dict[str, float]:
        """Evaluate, save the model, prove that it is the trained one, and, last, say that it went well."""
        with gathered(self.training.model):
            return self._finish()

    def _finish(self) -> dict[str, float]:
        training, run, optimiser = self.training, self.training.run, self.optimiser
        optimiser.adamw.state.clear()  # its memory is what a reference, or the saved model, is loaded into
        metrics = {**training.objective.evaluate(), **training.objective.evaluate_at_end()}
        run.event("evaluation", step=self.progress.steps, metrics=metrics)
        counted = {"skipped_steps": optimiser.skipped, "out_of_memory": self.gradients.out_of_memory}
        metrics = {**metrics, "steps": self.progress.steps, "tokens": self.progress.tokens, **counted}
        refusal = self._saved() if training.processes.is_main else None
        if (told := training.processes.gather(refusal)[0]) is not None:  # every process ends alike
            self.save(self.progress.steps)
            error, remedy = told
            raise TrainingFailed(error, remedy=remedy)
        if training.processes.is_main:
            weights = {file.name: file_digest(file) for file in sorted(run.model_folder.glob("*.safetensors"))}
            artefacts = {"model": str(run.model_folder), "weights": weights, "encoder_digest": training.encoder.digest}
            run.write_result(metrics=metrics, artefacts=artefacts, seconds=self.progress.seconds, counts=training.counts)
        run.event("end", status="done", step=self.progress.steps)
        training.processes.barrier()
        return metrics

    def _saved(self) -> tuple[str, str] | None:
        training = self.training
        return save_verified(
            training.objective,
            training.model,
            training.encoder,
            training.run.model_folder,
            notes=training.objective.notes(),
            verify=training.options.verify_saved,
        )
