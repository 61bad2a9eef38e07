"""PPO against a reward model: sample, score, update, in steps that can be stopped, killed and resumed.

One step: prompts in an order that follows from the seed; completions sampled from the policy at one temperature; each scored by the reward
model at its last real token; the KL to the reference taken from the reward token by token; generalised advantages from a value model that
starts as the reward model (with several members as their mean; with adapters as the first); then some passes of minibatches with clipped
losses. Between steps there is nothing but weights, optimiser states, the KL coefficient and counters, so a checkpoint there is the whole
state, and on a CPU a resumed run is the run, bit for bit.

Sources: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155;
Huang et al. 2024, arXiv:2403.17031 (the details that matter).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.ppo.actors import Actors, load_actors
from alignment.ppo.experience import Experience, Targets, experience_metrics, explained_variance, targets
from alignment.ppo.losses import next_kl_coefficient
from alignment.ppo.options import PPOOptions
from alignment.ppo.samples import SampleFile
from alignment.ppo.update import Updates
from alignment.prompts import EncodedPrompt, check_room, choose_split, encode_prompts, prompt_rows
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
from training.errors import Stopped, TrainingFailed
from training.language_model import load_policy, save_model
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row, epoch_order
from training.processes import Processes
from training.progress import Progress, stop_requested
from training.row_logps import row_logps
from training.rundir import RunDirectory, file_digest
from training.sharding import gathered

# Evaluations draw the same uniform numbers each time, apart from those of every step: what differs between two of them is the policy.
EVALUATION_STREAM = 2**31 - 1


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model`, `reward_model`, `data` (a snapshot or a prompts file; its training split is used), and, if wanted, `reference`.

    Makes `model/` (the policy), `value_model/`, `samples.jsonl`, and `result.json` with the metrics of the last evaluation, those of the
    first as `start_*`, and `episodes`, `steps`, `tokens`, `kl_coefficient`, `skipped_steps`.
    """
    options = parse_options(PPOOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    encoder = Encoder.of(run_directory.inputs["model"], options)
    prompts, watched, counts = read_inputs(run_directory, encoder, options)
    run_directory.event("counts", **counts)
    actors = load_actors(run_directory, encoder, options, processes)
    check_room(actors.policy, [*prompts, *watched], options.max_completion_tokens)
    PPO(run_directory, options, actors, prompts, watched).train(counts)


def read_inputs(
    run_directory: RunDirectory, encoder: Encoder, options: PPOOptions
) -> tuple[list[EncodedPrompt], list[EncodedPrompt], dict[str, Any]]:
    """(training prompts, prompts of the evaluations, counts). Evaluations use held-out prompts, or training ones where there are none."""
    rows = prompt_rows(run_directory.data_file())
    train_rows, _ = choose_split(rows, "train")
    held_out = [row for row in rows if row.split == "held_out"]
    prompts, counts = encode_prompts(train_rows, encoder, max_dropped_share=options.max_dropped_share)
    watched_rows = (held_out or train_rows)[: options.evaluation_prompts]
    watched, watched_counts = encode_prompts(watched_rows, encoder, max_dropped_share=options.max_dropped_share)
    return prompts, watched, {"train": counts, "evaluation": {**watched_counts, "split": "held_out" if held_out else "train"}}


def step_prompts(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of the prompts of a step: epoch after epoch, each in an order of its own. Depends on its arguments alone."""
    first = step * per_step
    epochs = range(first // count, (first + per_step - 1) // count + 1)
    order = [index for epoch in epochs for index in epoch_order(count, seed=seed, epoch=epoch)]
    start = first - epochs[0] * count
    return order[start : start + per_step]


def step_count(count: int, options: PPOOptions) -> int:
    return options.max_steps or max(1, -int(-options.epochs * count // options.prompts_per_step))


class PPO:
    """One run: the loop, its evaluations and its checkpoints."""

    def __init__(
        self,
        run_directory: RunDirectory,
        options: PPOOptions,
        actors: Actors,
        prompts: Sequence[EncodedPrompt],
        watched: Sequence[EncodedPrompt],
    ) -> None:
        self.run = run_directory
        self.options = options
        self.actors = actors
        self.processes = actors.processes
        self.prompts = prompts
        self.watched = watched
        self.steps = step_count(len(prompts), options)
        self.updates = Updates(actors, options, steps=self.steps, seed=run_directory.seed)
        self.progress = Progress(run_directory, self.processes, steps=self.steps)
        self.samples = SampleFile(run_directory)
        self.kl_coefficient = options.kl_coefficient
        self.episodes = 0
        self.start_metrics: dict[str, float] = {}

    def train(self, counts: dict[str, Any]) -> dict[str, float]:
        """All steps, the evaluations, the models, `result.json`.

        Raises: Stopped after a checkpoint when SIGTERM asked for it;  TrainingFailed when rewards or steps stay non-finite.
        """
        self.processes.same_start([self.actors.policy, self.actors.value])
        first = self.resume()
        self.run.event(
            "start",
            steps=self.steps,
            processes=self.processes.world,
            device=str(self.processes.device),
            dtype=self.processes.dtype,
            sharding=self.processes.sharding,
            first_step=first,
        )
        if first == 0:
            self.start_metrics = self.evaluate(0)
        self.progress.mark(first)
        saved_at = time.monotonic()
        metrics = self.evaluate(first) if first == self.steps else self.start_metrics
        for step in range(first, self.steps):
            self.step(step)
            done = step + 1
            if done == self.steps or (self.options.evaluate_steps and done % self.options.evaluate_steps == 0):
                metrics = self.evaluate(done)
            due = bool(self.options.checkpoint_seconds) and time.monotonic() - saved_at >= self.options.checkpoint_seconds
            stop, due = self.processes.any(stop_requested(), due)
            every = self.options.checkpoint_steps
            if done < self.steps and (stop or due or (every and done % every == 0)):
                self.save_checkpoint(done)
                saved_at = time.monotonic()
            if stop and done < self.steps:
                self.run.event("end", status="stopped", step=done)
                raise Stopped(f"stopped at step {done} of {self.steps}")
        return self.finish(metrics, counts)

    def step(self, step: int) -> None:
        """Sample, score, update, report."""
        options, started = self.options, time.monotonic()
        chosen = step_prompts(len(self.prompts), step, options.prompts_per_step, self.run.seed)
        experience, seconds = self.actors.experience(
            [self.prompts[index].prompt_ids for index in chosen], options.samples_per_prompt, seed=self.run.seed, step=step
        )
        if not bool(experience.scores.isfinite().all()):
            raise TrainingFailed(f"Step {step + 1}: a score is not finite.", remedy="Train the reward model again.")
        aims = targets(experience, options, self.kl_coefficient)
        updating = time.monotonic()
        sums, more = self.updates.update(experience, aims, step)
        ended = time.monotonic()
        self.episodes += len(experience.rows)
        metrics = experience_metrics(experience)
        self._warn(step, more)
        self.progress.report(
            step + 1,
            sums,
            tokens=float(sum(experience.lengths)) / self.processes.world,
            **metrics,
            **self._step_metrics(experience, aims),
            **more,
            **seconds,
            seconds_update=ended - updating,
            episodes=float(self.episodes),
            episodes_per_second=len(experience.rows) / (ended - started),
        )
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient,
            metrics["kl_k1_nats"],
            options.kl_target_nats or None,
            len(experience.rows),
            options.kl_horizon_episodes,
        )

    def _step_metrics(self, experience: Experience, aims: Targets) -> dict[str, float]:
        mask = experience.mask
        return {
            "kl_coefficient": self.kl_coefficient,
            "penalised_reward": float(aims.rewards.double().sum(1).mean()),
            "value": float(experience.values[mask].double().mean()),
            "return": float(aims.returns[mask].double().mean()),
            "explained_variance": explained_variance(experience.values, aims.returns, mask),
        }

    def _warn(self, step: int, more: dict[str, float]) -> None:
        if more["skipped_now"]:
            text = f"step {step + 1}: {more['skipped_now']:.0f} updates were skipped, their gradients are not finite"
            self.run.event("warning", text=f"{text} ({more['skipped_steps']:.0f} so far)")
        limit = 1e-3 if self.processes.dtype == "float32" else 0.1
        if more["first_ratio_deviation"] > limit:
            text = f"step {step + 1}: the first minibatch has ratios up to {more['first_ratio_deviation']:.2g} away from 1 (expected 0)"
            self.run.event("warning", text=f"{text}: sampling and training do not compute the same distribution")

    def evaluate(self, step: int) -> dict[str, float]:
        """One completion for each watched prompt, scored: an `evaluation` event, and the texts in `samples.jsonl`."""
        experience, _ = self.actors.experience(
            [prompt.prompt_ids for prompt in self.watched], 1, seed=self.run.seed, step=EVALUATION_STREAM, with_values=False
        )
        metrics = experience_metrics(experience)
        self.run.event("evaluation", step=step, metrics=metrics)
        if self.processes.is_main:
            self.samples.append(step, self.watched, experience, self.actors.encoder)
        return metrics

    def save_checkpoint(self, step: int) -> None:
        """Every process comes here; the first one writes."""
        tensors = {
            "policy": trained_tensors(self.actors.policy),
            "value": trained_tensors(self.actors.value),
            "policy_optimiser": self.updates.policy.state(),
            "value_optimiser": self.updates.value.state(),
            "random": random_state(),
        }
        if self.processes.is_main:
            values = {
                "kl_coefficient": self.kl_coefficient,
                "episodes": self.episodes,
                "tokens": self.progress.tokens,
                "seconds": self.progress.seconds,
                "start_metrics": self.start_metrics,
                "skipped": self.updates.skipped_state(),
            }
            folder = write_checkpoint(self.run.checkpoints, step, State(tensors, values), keep=self.options.keep_checkpoints)
            self.run.event("checkpoint", step=step, path=str(folder))
        self.processes.barrier()

    def resume(self) -> int:
        """The first step to do, with everything put back as the newest good checkpoint has it; 0 without one."""
        found = restore_newest(self.run.checkpoints, lambda text: self.run.event("warning", text=text))
        self.processes.barrier()
        step, state = found if found else (0, State())
        if self.processes.is_main:
            self.samples.cut(step if found else -1)
        if found is None:
            return 0
        load_trained(self.actors.policy, state.tensors["policy"])
        load_trained(self.actors.value, state.tensors["value"])
        self.updates.policy.load_state(state.tensors["policy_optimiser"])
        self.updates.value.load_state(state.tensors["value_optimiser"])
        set_random_state(state.tensors["random"])
        self.kl_coefficient, self.episodes = state.values["kl_coefficient"], state.values["episodes"]
        self.progress.tokens, self.progress.seconds_before = state.values["tokens"], state.values["seconds"]
        self.start_metrics = state.values["start_metrics"]
        self.updates.load_skipped_state(state.values["skipped"])
        self.run.event("resume", step=step)
        return step

    def load(self, folder: Path, device: torch.device) -> Any:
        return load_policy(folder, device=device)

    def probe(self, model: Any) -> Tensor:
        """Log-probabilities of the second halves of a few prompts."""
        halves = [(prompt.prompt_ids, max(1, len(prompt.prompt_ids) // 2)) for prompt in self.watched[:PROBED_ROWS]]
        rows = [Row(ids[:half], ids[half:]) for ids, half in halves]
        with torch.no_grad():
            budget = self.options.tokens_per_micro_batch
            return row_logps(model, rows, self.actors.encoder.pad_id, device=next(model.parameters()).device, budget=budget)

    def finish(self, metrics: dict[str, float], counts: dict[str, Any]) -> dict[str, float]:
        """Save both models and, last, say that it went well."""
        metrics = {
            **metrics,
            **{f"start_{name}": value for name, value in self.start_metrics.items()},
            "steps": float(self.steps),
            "episodes": float(self.episodes),
            "tokens": self.progress.tokens,
            "kl_coefficient": self.kl_coefficient,
            "skipped_steps": float(self.updates.skipped),
        }
        actors, verify = self.actors, self.options.verify_saved
        with gathered(actors.policy):
            refusal = (
                save_verified(self, actors.policy, actors.encoder, self.run.model_folder, verify=verify) if self.processes.is_main else None
            )
        if (told := self.processes.gather(refusal)[0]) is not None:  # every process ends alike
            self.save_checkpoint(self.steps)
            error, remedy = told
            raise TrainingFailed(error, remedy=remedy)
        value_folder = self.run.path / "value_model"
        with gathered(actors.value):
            if self.processes.is_main:
                save_model(actors.value, actors.encoder, value_folder, notes=actors.value_files())
        if self.processes.is_main:
            artefacts = {
                "model": str(self.run.model_folder),
                "weights": {file.name: file_digest(file) for file in sorted(self.run.model_folder.glob("*.safetensors"))},
                "encoder_digest": self.actors.encoder.digest,
                "value_model": str(value_folder),
                "samples": str(self.samples.path),
            }
            self.run.write_result(metrics=metrics, artefacts=artefacts, seconds=self.progress.seconds, counts=counts)
        self.run.event("end", status="done", step=self.steps)
        self.processes.barrier()
        return metrics
