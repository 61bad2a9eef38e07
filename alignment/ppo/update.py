"""The optimiser steps of PPO: passes of minibatches over one step's episodes, for the policy and, where there is one, for the value
model."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from alignment.ppo.actors import Actors
from alignment.ppo.estimators import ESTIMATORS, token_weights
from alignment.ppo.experience import Experience, Targets
from alignment.ppo.importance import importance_weights
from alignment.ppo.losses import kl_k2, kl_k3, policy_terms, value_terms
from alignment.ppo.options import PPOOptions
from alignment.ppo.voices import Said
from training.errors import TrainingFailed
from training.gradients import free_memory, ran_out_of_memory
from training.optimiser import Optimiser, Update
from training.processes import Sums, add_sums
from training.sharding import backward, keeps_step


def minibatch_order(episodes: int, options: PPOOptions, *, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Episode indices of each minibatch of one pass; depends on its arguments alone.

    A prompt's samples stay together where there are prompts enough, so that its encoding is shared. Sizes differ by at most one prompt."""
    samples = options.samples_per_prompt
    together = samples if episodes % samples == 0 and episodes // samples >= options.minibatches else 1
    order = np.random.default_rng([seed, step, epoch]).permutation(episodes // together)
    parts = np.array_split(order, options.minibatches)
    return [[int(unit) * together + sample for unit in part for sample in range(together)] for part in parts if len(part)]


@dataclass(slots=True)
class Tally:
    """What the updates of a step have come to so far: part of a checkpoint in the middle of one.

    `sums` are this process's own;  `deviation` is the largest |ratio - 1| before anything was updated;  `skipped` counts this step's."""

    done: int = 0
    sums: Sums = field(default_factory=dict)
    deviation: float = 0.0
    skipped: int = 0
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Episodes of one optimiser step. `weights` (B, T): what each token counts in the policy's loss, corrected for the
    engine;  `tokens`: real ones of the whole."""

    experience: Experience
    aims: Targets
    kl_coefficient: float
    indices: list[int]
    weights: Tensor
    tokens: int


class Updates:
    """One optimiser for the policy, one for the value model, and the sums that the step event reports."""

    def __init__(self, actors: Actors, options: PPOOptions, *, steps: int, seed: int) -> None:
        self.actors = actors
        self.options = options
        self.seed = seed
        self.budget = options.tokens_per_micro_batch
        self.out_of_memory = 0
        self.per_step = options.passes * options.minibatches
        value_options = replace(options, learning_rate=options.value_learning_rate or options.learning_rate)
        self.optimisers = {
            name: Optimiser(part, value_options if name == "value" else options, steps=steps * self.per_step)
            for name, part in actors.voices.trained.items()
        }
        for optimiser in self.optimisers.values():
            optimiser.start(actors.processes)

    @property
    def skipped(self) -> int:
        return sum(optimiser.skipped for optimiser in self.optimisers.values())

    def state(self) -> dict[str, object]:
        skipped = {name: [optimiser.skipped, optimiser.skipped_in_a_row] for name, optimiser in self.optimisers.items()}
        return {"skipped": skipped, "tokens_per_micro_batch": self.budget, "out_of_memory": self.out_of_memory}

    def load_state(self, state: dict) -> None:
        for name, optimiser in self.optimisers.items():
            optimiser.skipped, optimiser.skipped_in_a_row = state["skipped"][name]
        self.budget, self.out_of_memory = state["tokens_per_micro_batch"], state["out_of_memory"]

    def update(self, experience: Experience, aims: Targets, step: int, kl_coefficient: float, tally: Tally) -> None:
        """The next minibatch of the step, `tally.done`; what it came to is added to the tally.

        Sums: `policy_loss`, `approximate_kl`, `clip_share`, `ratio`, with a value model `value_loss` and `value_clip_share` (means over
        real tokens of all passes), with a KL term in the loss `kl_loss`. Numbers, the same on every process: gradient norms of the last
        minibatch and learning rates."""
        epoch, number = divmod(tally.done, self.options.minibatches)
        order = minibatch_order(len(experience.rows), self.options, seed=self.seed, step=step, epoch=epoch)
        if number < len(order):
            deviation = self._accumulate(experience, aims, kl_coefficient, order[number], tally.sums)
            if tally.done == 0:
                tally.deviation = max(self.actors.processes.gather(deviation))
            for name, optimiser in self.optimisers.items():
                update = optimiser.step(step * self.per_step + tally.done, self.actors.processes)
                tally.skipped += update.skipped
                tally.numbers |= _numbers("" if name == "policy" else f"{name}_", update)
        tally.done += 1

    def _accumulate(self, experience: Experience, aims: Targets, kl_coefficient: float, indices: list[int], sums: Sums) -> float:
        """Gradients of both losses over the whole minibatch, whatever the micro-batches and processes; where memory runs out, in smaller
        micro-batches. Returns the largest |ratio - 1| on this process."""
        mask = experience.mask[indices]
        weights = token_weights(mask, ESTIMATORS[self.options.advantage_estimator].average, self.options.max_completion_tokens)
        ours, engines = experience.logps[indices], experience.engine_logps[indices]
        weights = weights * importance_weights(ours, engines, mask, self.options.importance_cap)
        batch = Minibatch(experience, aims, kl_coefficient, indices, weights, int(mask.sum()))
        mine = self.actors.processes.share(range(len(indices)), [float(len(experience.rows[index])) for index in indices])
        while True:
            part: Sums = {}
            deviation = self._attempt(batch, mine, part)
            (ran_out,) = self.actors.processes.any(deviation is None)
            if deviation is not None and not ran_out:
                add_sums(sums, part)
                return deviation
            self._halve()

    def _attempt(self, batch: Minibatch, mine: Sequence[int], sums: Sums) -> float | None:
        """Forward and backward of this process's part; None where memory ran out."""
        rows = [batch.experience.rows[batch.indices[place]] for place in mine]
        deviation = 0.0
        try:
            with closing(self.actors.voices.learned(rows, budget=self.budget)) as passes:  # type: ignore[type-var]
                for said in passes:
                    deviation = max(deviation, self._backward(batch, said, [mine[row] for row in said.rows], sums))
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if keeps_step(self.actors.policy):
                raise TrainingFailed(
                    "Memory ran out in an update, and a pass through sharded weights cannot be made again by one process alone.",
                    remedy=f"Set tokens_per_micro_batch below {self.budget} (the update stays the same), or start more processes.",
                ) from error
            return None
        return deviation

    def _halve(self) -> None:
        for optimiser in self.optimisers.values():
            optimiser.clear()
        free_memory()
        if self.budget == 1:
            raise TrainingFailed(
                "Memory ran out: an episode does not fit even alone.",
                remedy="Set gradient_checkpointing = true or lora_rank, lower max_prompt_tokens or max_completion_tokens.",
            )
        longest = self.options.max_prompt_tokens + self.options.max_completion_tokens
        self.budget = self.budget // 2 if self.budget > longest else 1
        self.out_of_memory += 1

    def _backward(self, batch: Minibatch, said: Said, places: list[int], sums: Sums) -> float:
        """One forward pass: `places` are its rows' places in the minibatch."""
        experience, aims = batch.experience, batch.aims
        episodes, device = [batch.indices[place] for place in places], self.actors.processes.device
        mask = experience.mask[episodes].to(device)
        loss, deviation, width = torch.zeros((), device=device), 0.0, mask.shape[1]
        if said.logps is not None:
            logps = said.logps[:, :width]
            old, advantages = experience.logps[episodes].to(device), aims.advantages[episodes].to(device)
            terms = policy_terms(logps, old, advantages, self.options.clip_range)
            losses = terms.loss
            if self.options.kl_in == "loss":
                kl = {"k2": kl_k2, "k3": kl_k3}[self.options.kl_estimator](logps, experience.reference_logps[episodes].to(device))
                losses = losses + batch.kl_coefficient * kl
                _count(sums, "kl_loss", kl, mask)
            loss = loss + (losses * batch.weights[places].to(device)).masked_fill(~mask, 0).sum()
            for name, figures in (("approximate_kl", terms.approximate_kl), ("clip_share", terms.clipped), ("ratio", terms.ratio)):
                _count(sums, name, figures, mask)
            _count(sums, "policy_loss", terms.loss, mask)
            deviation = float((terms.ratio - 1).masked_fill(~mask, 0).abs().max()) if episodes else 0.0
        if said.values is not None and aims.returns is not None:
            old_values, returns = experience.values[episodes].to(device), aims.returns[episodes].to(device)
            values = said.values[:, :width] + experience.base_values[episodes].to(device)
            errors, clipped = value_terms(values, old_values, returns, self.options.value_clip_range or None)
            loss = loss + errors.masked_fill(~mask, 0).sum() / batch.tokens
            _count(sums, "value_loss", errors, mask)
            _count(sums, "value_clip_share", clipped, mask)
        backward(said.model, loss)
        return deviation


def _count(sums: Sums, name: str, values: Tensor, mask: Tensor) -> None:
    add_sums(sums, {name: (float(values.detach()[mask].double().sum()), float(mask.sum()))})


def _numbers(prefix: str, update: Update) -> dict[str, float]:
    return {f"{prefix}gradient_norm": update.gradient_norm, f"{prefix}learning_rate": update.learning_rate}
