"""PPO against a reward model: sample, score, update, in steps that can be stopped, killed and resumed.

One step: prompts in an order that follows from the seed; completions sampled from the policy at one temperature; each scored by the reward
model at its last real token; the KL to the reference taken from the reward token by token; generalised advantages from a value model that
starts as the reward model (with several members as their mean; with adapters as the first); then some passes of minibatches with clipped
losses. (Other advantage estimators do without the value model: `alignment.ppo.estimators`.) What is random follows from seed, step and
prompt alone, so weights, optimiser states, the KL coefficient and counters are the whole state between steps, and the rollout buffer in the
middle of one: wherever a run is killed, on a CPU the resumed run is the run, bit for bit.

Sources: Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155;
Huang et al. 2024, arXiv:2403.17031 (the details that matter).
"""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.ppo.actors import Actors, load_actors
from alignment.ppo.buffer import Work, whole_work, work_from
from alignment.ppo.experience import Experience, Targets, experience_metrics, explained_variance, targets
from alignment.ppo.guards import duplicate_share
from alignment.ppo.importance import mismatch_metrics
from alignment.ppo.inputs import read_inputs, step_count, step_prompts
from alignment.ppo.losses import next_kl_coefficient
from alignment.ppo.options import PPOOptions
from alignment.ppo.samples import SampleFile
from alignment.ppo.shared import Shared
from alignment.ppo.update import Tally, Updates
from alignment.ppo.watch import STOPPED_MODEL, Watch
from alignment.prompts import EncodedPrompt, check_room
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
from training.language_model import load_policy, save_model
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row
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
    first as `start_*`, and `episodes`, `steps`, `tokens`, `kl_coefficient`, `skipped_steps`, `alarms`, `rollbacks`.
    """
    options = parse_options(PPOOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    encoder = Encoder.of(run_directory.inputs["model"], options)
    prompts, watched, counts = read_inputs(run_directory, encoder, options)
    run_directory.event("counts", **counts)
    actors = load_actors(run_directory, encoder, options, processes)
    check_room(actors.policy, [*prompts, *watched], options.max_completion_tokens)
    with closing(actors.engine):
        PPO(run_directory, options, actors, prompts, watched).train(counts)


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
        self.watch = Watch(run_directory, options, self.processes)
        self.kl_coefficient = options.kl_coefficient
        self.episodes = 0
        self.start_metrics: dict[str, float] = {}
        self.begun: Work | None = None  # of the next step, where a checkpoint was written in the middle of it
        self.saved_at = time.monotonic()

    def train(self, counts: dict[str, Any]) -> dict[str, float]:
        """All steps, the evaluations, the models, `result.json`.

        Raises: Stopped after a checkpoint when SIGTERM asked for it;  TrainingFailed when rewards or steps stay non-finite, or a guard
                stops the run.
        """
        trained = self.actors.voices.trained
        self.processes.same_start([self.actors.policy, *(part for name, part in trained.items() if name != "policy")])
        first = self.resume()
        self.run.event(
            "start",
            steps=self.steps,
            processes=self.processes.world,
            device=str(self.processes.device),
            dtype=self.processes.dtype,
            sharding=self.processes.sharding,
            first_step=first,
            models=self.actors.kind,
        )
        if not self.start_metrics:
            self.watch.warn_of_few(len(self.watched))
            self.start_metrics = self.evaluate(0)
        self.progress.mark(first)
        self.saved_at = time.monotonic()
        metrics = self.evaluate(first) if first == self.steps else self.start_metrics
        if first == self.steps:
            self.watch.stop_again()
        metrics = self.heed(first, metrics)
        for step in range(first, self.steps):
            self.step(step)
            done = step + 1
            if done == self.steps or (self.options.evaluate_steps and done % self.options.evaluate_steps == 0):
                metrics = self.evaluate(done)
            metrics = self.heed(done, metrics)
            if done < self.steps:
                every = self.options.checkpoint_steps
                self.pause(done, always=bool(every) and done % every == 0)
        return self.finish(metrics, counts)

    def pause(self, step: int, work: Work | None = None, *, always: bool = False) -> None:
        """A checkpoint, where one is due or a stop was asked for. Every process comes here.

        Raises: Stopped, once it is written, where a stop was asked for."""
        stop, due = self.processes.any(stop_requested(), always or self._due())
        if stop or due:
            self.save_checkpoint(step, work)
            self.saved_at = time.monotonic()
        if stop:
            self.run.event("end", status="stopped", step=step)
            raise Stopped(f"stopped at step {step} of {self.steps}" + (f", in the middle of step {step + 1}" if work else ""))

    def _due(self) -> bool:
        return bool(self.options.checkpoint_seconds) and time.monotonic() - self.saved_at >= self.options.checkpoint_seconds

    def step(self, step: int) -> None:
        """Sample, score, update, report; or go on where a checkpoint in the middle of the step was written."""
        options, work = self.options, self.begun or Work()
        self.begun = None
        experience = work.experience or self._sampled(step, work)
        if not bool(experience.scores.isfinite().all()):
            raise TrainingFailed(f"Step {step + 1}: a score is not finite.", remedy="Train the reward model again.")
        aims = targets(experience, options, self.kl_coefficient)
        clock = time.monotonic()
        while work.tally.done < self.updates.per_step:
            self.pause(step, work)
            self.updates.update(experience, aims, step, self.kl_coefficient, work.tally)
            clock = work.timed("update", clock)
        self.episodes += len(experience.rows)
        metrics = experience_metrics(experience, options.spread_weight)
        self._warn(step, work.tally)
        self.progress.report(
            step + 1,
            work.tally.sums,
            tokens=float(sum(experience.lengths)) / self.processes.world,
            **metrics,
            **self._step_metrics(experience, aims, work),
        )
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient,
            metrics["kl_k1_nats"],
            options.kl_target_nats or None,
            len(experience.rows),
            options.kl_horizon_episodes,
        )
        told = {"skipped_now": float(work.tally.skipped), "updates_now": float(self.updates.per_step * len(self.updates.optimisers))}
        self.watch.saw_step(step + 1, {**metrics, **told})

    def heed(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Do what the alarms of this step ask for.

        Returns: `metrics`, or, after a rollback, those of the evaluation whose weights came back.
        Raises:  TrainingFailed after a checkpoint where they stop the run."""
        action = self.watch.answer(step)
        if action == "stop":
            self.save_checkpoint(step)
            with gathered(self.actors.policy):
                if self.processes.is_main:
                    save_model(self.actors.policy, self.actors.encoder, self.run.path / STOPPED_MODEL)
            self.processes.barrier()
            raise self.watch.error(step)
        if action == "rollback":
            good, coefficient = self.watch.go_back(step), self.kl_coefficient
            self._load_trained(good)
            # The larger of the two: a second rollback to one state must not come back with the coefficient of the first.
            self.kl_coefficient = 2 * max(coefficient, self.kl_coefficient)
            self.watch.went_back(step, self.kl_coefficient)
            return good.values["metrics"]
        return metrics

    def _sampled(self, step: int, work: Work) -> Experience:
        """The episodes of a step; what was drawn before an interruption is not drawn again."""
        prompts, samples = self._prompts(step), self.options.samples_per_prompt
        while True:
            found = self.actors.rollout(
                prompts, samples, seed=self.run.seed, step=step, drawn=work.drawn, pause=lambda: stop_requested() or self._due()
            )
            work.drawn, work.experience = found.drawn, found.experience
            work.seconds["generate"] += found.seconds_generate
            work.seconds["score"] += found.seconds_score
            if found.experience is not None:
                return found.experience
            self.pause(step, work, always=True)

    def _prompts(self, step: int) -> list[list[int]]:
        chosen = step_prompts(len(self.prompts), step, self.options.prompts_per_step, self.run.seed)
        return [self.prompts[index].prompt_ids for index in chosen]

    def _step_metrics(self, experience: Experience, aims: Targets, work: Work) -> dict[str, float]:
        mask, tally = experience.mask, work.tally
        found = {
            "kl_coefficient": self.kl_coefficient,
            "penalised_reward": float(aims.rewards.double().sum(1).mean()),
            "first_ratio_deviation": tally.deviation,
            **tally.numbers,
            "skipped_steps": float(self.updates.skipped),
            "skipped_now": float(tally.skipped),
            "out_of_memory": float(self.updates.out_of_memory),
            **{f"seconds_{part}": seconds for part, seconds in work.seconds.items()},
            "episodes": float(self.episodes),
            "episodes_per_second": len(experience.rows) / max(sum(work.seconds.values()), 1e-9),
        }
        if not self.actors.engine.exact:
            found |= mismatch_metrics(experience.logps, experience.engine_logps, mask, self.options.importance_cap)
        if aims.returns is not None:
            found["value"] = float(experience.values[mask].double().mean())
            found["return"] = float(aims.returns[mask].double().mean())
            found["explained_variance"] = explained_variance(experience.values, aims.returns, mask)
        return found

    def _warn(self, step: int, tally: Tally) -> None:
        if tally.skipped:
            text = f"step {step + 1}: {tally.skipped} updates were skipped, their gradients are not finite"
            self.run.event("warning", text=f"{text} ({self.updates.skipped} so far)")
        limit = 1e-3 if self.processes.dtype == "float32" else 0.1
        if tally.deviation > limit:
            text = f"step {step + 1}: the first minibatch has ratios up to {tally.deviation:.2g} away from 1 (expected 0)"
            self.run.event("warning", text=f"{text}: sampling and training do not compute the same distribution")

    def evaluate(self, step: int) -> dict[str, float]:
        """One completion for each watched prompt, scored: an `evaluation` event, and the texts in `samples.jsonl`."""
        experience = self.actors.experience(
            [prompt.prompt_ids for prompt in self.watched], 1, seed=self.run.seed, step=EVALUATION_STREAM, with_values=False
        )
        texts = [self.actors.encoder.decode(row.completion_ids) for row in experience.rows]
        metrics = {**experience_metrics(experience, self.options.spread_weight), "duplicate_share": duplicate_share(texts)}
        self.run.event("evaluation", step=step, metrics=metrics)
        if self.processes.is_main:
            self.samples.append(step, self.watched, experience, self.actors.encoder)
        self.watch.saw_evaluation(step, metrics, self._trained)
        return metrics

    def _trained(self) -> State:
        """What training changes: weights, optimisers, KL coefficient. Every process comes here."""
        tensors = {name: trained_tensors(part) for name, part in self.actors.voices.trained.items()}
        tensors |= {f"{name}_optimiser": optimiser.state() for name, optimiser in self.updates.optimisers.items()}
        return State(tensors, {"kl_coefficient": self.kl_coefficient})

    def _load_trained(self, state: State) -> None:
        for name, part in self.actors.voices.trained.items():
            load_trained(part, state.tensors[name])
            self.updates.optimisers[name].load_state(state.tensors[f"{name}_optimiser"])
        self.kl_coefficient = state.values["kl_coefficient"]

    def save_checkpoint(self, step: int, work: Work | None = None) -> None:
        """Every process comes here; the first one writes. `work` is the next step's, where that has begun."""
        buffer = whole_work(work, self.processes) if work else State()
        trained = self._trained()
        if self.processes.is_main:
            values = {
                **trained.values,
                **buffer.values,
                "episodes": self.episodes,
                "tokens": self.progress.tokens,
                "seconds": self.progress.seconds,
                "start_metrics": self.start_metrics,
                "updates": self.updates.state(),
                "form": "shared" if isinstance(self.actors.voices, Shared) else "separate",
                "watch": self.watch.values(),
            }
            tensors = {**trained.tensors, **buffer.tensors, "random": random_state()}
            folder = write_checkpoint(self.run.checkpoints, step, State(tensors, values), keep=self.options.keep_checkpoints)
            self.watch.prune()
            self.run.event("checkpoint", step=step, path=str(folder))
        self.processes.barrier()

    def resume(self) -> int:
        """The first step to do, with everything put back as the newest good checkpoint has it; 0 without one."""
        found = restore_newest(self.run.checkpoints, lambda text: self.run.event("warning", text=text))
        self.processes.barrier()
        step, state = found if found else (0, State())
        if self.processes.is_main:
            self.samples.cut(step - 1 if found is None or step == self.steps else step)  # what is evaluated again
        if found is None:
            return 0
        if "updates" not in state.values:
            raise InputError("The checkpoint was written by an earlier version.", remedy="Start a new run from the same inputs.")
        self._load_trained(state)
        set_random_state(state.tensors["random"])
        self.episodes = state.values["episodes"]
        self.progress.tokens, self.progress.seconds_before = state.values["tokens"], state.values["seconds"]
        self.start_metrics = state.values["start_metrics"]
        self.updates.load_state(state.values["updates"])
        self.watch.load(state.values.get("watch"))
        if "tally" in state.values:
            self.begun = work_from(state, self._prompts(step), self.options.samples_per_prompt, self.processes)
        self.run.event("resume", step=step, update=self.begun.tally.done if self.begun else 0)
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
            "alarms": float(self.watch.alarms),
            "rollbacks": float(self.watch.rollbacks),
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
        if "value" in actors.voices.trained:
            actors.voices.save_value(self.run.path / "value_model", actors.encoder)
        if self.processes.is_main:
            artefacts: dict[str, Any] = {
                "model": str(self.run.model_folder),
                "weights": {file.name: file_digest(file) for file in sorted(self.run.model_folder.glob("*.safetensors"))},
                "encoder_digest": self.actors.encoder.digest,
                "samples": str(self.samples.path),
            }
            if "value" in actors.voices.trained:
                artefacts["value_model"] = str(self.run.path / "value_model")
            self.run.write_result(metrics=metrics, artefacts=artefacts, seconds=self.progress.seconds, counts=counts)
        self.run.event("end", status="done", step=self.steps)
        self.processes.barrier()
        return metrics
