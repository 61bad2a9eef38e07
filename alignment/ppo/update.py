"""The optimiser steps of PPO: passes of minibatches over one step's episodes, for the policy and for the value model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from alignment.ppo.actors import Actors
from alignment.ppo.experience import Experience, Targets
from alignment.ppo.losses import policy_terms, value_terms
from alignment.ppo.options import PPOOptions
from training.optimiser import Optimiser
from training.pack import length_groups, pad_rows
from training.processes import Sums, add_sums
from training.row_logps import spare_rows
from training.sharding import backward, in_step


def minibatch_order(episodes: int, options: PPOOptions, *, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Episode indices of each minibatch of one pass; depends on its arguments alone. Sizes differ by at most one."""
    order = np.random.default_rng([seed, step, epoch]).permutation(episodes)
    return [part.tolist() for part in np.array_split(order, options.minibatches) if len(part)]


class Updates:
    """Two optimisers, and the sums that the step event reports."""

    def __init__(self, actors: Actors, options: PPOOptions, *, steps: int, seed: int) -> None:
        self.actors = actors
        self.options = options
        self.seed = seed
        per_step = options.passes * options.minibatches
        value_options = replace(options, learning_rate=options.value_learning_rate or options.learning_rate)
        self.per_step = per_step
        self.policy = Optimiser(actors.policy, options, steps=steps * per_step)
        self.value = Optimiser(actors.value, value_options, steps=steps * per_step)
        for optimiser in (self.policy, self.value):
            optimiser.start(actors.processes)

    @property
    def skipped(self) -> int:
        return self.policy.skipped + self.value.skipped

    def skipped_state(self) -> list[int]:
        return [self.policy.skipped, self.policy.skipped_in_a_row, self.value.skipped, self.value.skipped_in_a_row]

    def load_skipped_state(self, state: Sequence[int]) -> None:
        self.policy.skipped, self.policy.skipped_in_a_row, self.value.skipped, self.value.skipped_in_a_row = state

    def update(self, experience: Experience, aims: Targets, step: int) -> tuple[Sums, dict[str, float]]:
        """All passes of one step.

        Returns: this process's sums for `policy_loss`, `value_loss`, `approximate_kl`, `clip_share`, `value_clip_share`, `ratio`
                 (means over real tokens of all passes), and numbers that are the same on every process: gradient norms of the last
                 minibatch, learning rates, `first_ratio_deviation` (largest |ratio - 1| before anything was updated: 0 but for rounding).
        """
        sums: Sums = {}
        skipped_before = self.skipped
        done = step * self.per_step
        deviation = 0.0
        for epoch in range(self.options.passes):
            for number, indices in enumerate(minibatch_order(len(experience.rows), self.options, seed=self.seed, step=step, epoch=epoch)):
                found = self._minibatch(experience, aims, indices, sums)
                if epoch == 0 and number == 0:
                    deviation = max(self.actors.processes.gather(found))
                policy_update = self.policy.step(done, self.actors.processes)
                value_update = self.value.step(done, self.actors.processes)
                done += 1
        return sums, {
            "first_ratio_deviation": deviation,
            "gradient_norm": policy_update.gradient_norm,
            "value_gradient_norm": value_update.gradient_norm,
            "learning_rate": policy_update.learning_rate,
            "value_learning_rate": value_update.learning_rate,
            "skipped_steps": float(self.skipped),
            "skipped_now": float(self.skipped - skipped_before),
        }

    def _minibatch(self, experience: Experience, aims: Targets, indices: Sequence[int], sums: Sums) -> float:
        """Gradients of both losses, each the mean over the real tokens of the whole minibatch, whatever the micro-batches and processes."""
        lengths = [len(experience.rows[index]) for index in indices]
        tokens = int(experience.mask[list(indices)].sum())
        mine = self.actors.processes.share(indices, [float(length) for length in lengths])
        deviation = 0.0
        groups = length_groups([len(experience.rows[index]) for index in mine], budget=self.options.tokens_per_micro_batch)
        for group in in_step(self.actors.policy, groups):
            if group is None:
                self._keep_step()
                continue
            found, part = self._backward(experience, aims, [mine[place] for place in group], tokens)
            deviation = max(deviation, found)
            add_sums(sums, part)
        return deviation

    def _keep_step(self) -> None:
        """A pass forth and back that teaches nothing: another process has one more micro-batch, and sharded weights are gathered by all."""
        padded = spare_rows(self.actors.encoder.pad_id, self.actors.processes.device)
        with self.actors.processes.autocast():
            backward(self.actors.policy, 0.0 * self.actors.logps(self.actors.policy, padded).sum())
            backward(self.actors.value, 0.0 * self.actors.values(padded).sum())

    def _backward(self, experience: Experience, aims: Targets, indices: list[int], tokens: int) -> tuple[float, Sums]:
        """One micro-batch. Policy and value are two models: the graph of the first is gone before the second is built."""
        actors, device = self.actors, self.actors.processes.device
        padded = pad_rows([experience.rows[index] for index in indices], actors.encoder.pad_id).to(device)
        width = experience.mask.shape[1]
        places = torch.tensor(indices)
        mask, old_logps, old_values, advantages, returns = (
            tensor[places].to(device) for tensor in (experience.mask, experience.logps, experience.values, aims.advantages, aims.returns)
        )
        with actors.processes.autocast():
            logps = actors.logps(actors.policy, padded)[:, :width]
        terms = policy_terms(logps, old_logps, advantages, self.options.clip_range)
        policy_loss = terms.loss.masked_fill(~mask, 0).sum()
        backward(actors.policy, policy_loss / tokens)
        with actors.processes.autocast():
            values = actors.values(padded)[:, :width]
        losses, value_clipped = value_terms(values, old_values, returns, self.options.value_clip_range or None)
        value_loss = losses.masked_fill(~mask, 0).sum()
        backward(actors.value, value_loss / tokens)
        here = float(mask.sum())
        sums: Sums = {
            "policy_loss": (float(policy_loss.detach()), here),
            "value_loss": (float(value_loss.detach()), here),
            "approximate_kl": (float(terms.approximate_kl[mask].sum()), here),
            "clip_share": (float((terms.clipped & mask).sum()), here),
            "value_clip_share": (float((value_clipped & mask).sum()), here),
            "ratio": (float(terms.ratio[mask].sum()), here),
        }
        return float((terms.ratio[mask] - 1).abs().max()), sums
