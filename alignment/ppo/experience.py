"""What one PPO step learns from: episodes with their log-probabilities, values and scores. Never logits.

Completions are packed to the left: entry (n, t) of a tensor belongs to token t of completion n, whatever the length of its prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from alignment.ppo.advantages import episode_rewards, masked_mean, whiten
from alignment.ppo.estimators import ESTIMATORS
from alignment.ppo.losses import kl_k1, kl_k3
from alignment.ppo.options import PPOOptions
from alignment.rollout.sampling import Sample
from training.pack import Row


@dataclass(slots=True)
class Experience:
    """Episodes of one step, on the CPU, equal on every process.

    Shapes: N episodes, T tokens in the longest completion.   Units: log-probabilities and entropies in nats, scores in normalised reward.
    mask (N, T) bool: real completion tokens, the stop token among them;  logps: under the policy that sampled, at its temperature,
    as the trainer computes them;  engine_logps: as the engine that wrote them did;
    reference_logps: of the same tokens at the same temperature;  values: the value model's expectation before each token, base_values
    the part of it that is not trained;
    scores (N,): the reward model's, before any penalty, as `reward_view` has it;  means, spreads (N,): mean and standard deviation over its
    members, whatever the view;
    finished (N,) bool: ended by a stop token.
    """

    rows: list[Row]
    mask: Tensor
    logps: Tensor
    engine_logps: Tensor
    entropies: Tensor
    reference_logps: Tensor
    values: Tensor
    base_values: Tensor
    scores: Tensor
    means: Tensor
    spreads: Tensor
    finished: Tensor

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses aim at: advantages and returns (N, T) float32, and the rewards (N, T) that they come from.

    `returns` is None where there is no value model."""

    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None


def padded_samples(samples: Sequence[Sample], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, logps, entropies), each (N, width), of samples that keep their own lengths."""
    mask = torch.zeros((len(samples), width), dtype=torch.bool)
    logps, entropies = torch.zeros((len(samples), width)), torch.zeros((len(samples), width))
    for place, sample in enumerate(samples):
        length = len(sample.completion_ids)
        mask[place, :length] = True
        logps[place, :length] = sample.logps
        entropies[place, :length] = sample.entropies
    return mask, logps, entropies


def join(parts: Sequence[Experience], order: Sequence[int]) -> Experience:
    """The episodes of all processes as one, put into the order of the step: `order[i]` is the place of the i-th in the parts' row."""
    rows = [row for part in parts for row in part.rows]
    index = torch.tensor(order)
    tensors = {
        field.name: torch.cat([getattr(part, field.name) for part in parts])[index] for field in fields(Experience) if field.name != "rows"
    }
    width = int(tensors["mask"].sum(1).max())
    trimmed = {name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    return Experience(rows=[rows[place] for place in order], **trimmed)


def targets(experience: Experience, options: PPOOptions, kl_coefficient: float) -> Targets:
    """Rewards, advantages and returns of a step, over all its episodes, so that minibatches share one whitening."""
    scores = experience.scores - options.missing_eos_penalty * (~experience.finished).float()
    kl = kl_k1(experience.logps, experience.reference_logps)
    rewards = episode_rewards(scores, kl, experience.mask, kl_coefficient if options.kl_in == "reward" else 0.0)
    if options.whiten_rewards:
        rewards = whiten(rewards, experience.mask, shift_mean=False)
    estimator = ESTIMATORS[options.advantage_estimator]
    advantages, returns = estimator.estimate(rewards, experience.values, experience.mask, options)
    return Targets(rewards, advantages, returns)


def experience_metrics(experience: Experience, spread_weight: float) -> dict[str, float]:
    """`reward` (mean of the scores), `reward_spread` (their mean spread over the reward model's members; 0 for one), `kl_k1_nats` and
    `kl_k3_nats` (of whole completions), `entropy_nats` (a token; where the engine tells it), `length_tokens`, `unfinished_share`; of an
    ensemble, whatever view pays,
    `reward_mean` (of its members) and `reward_pessimistic` (that minus spread_weight x spread)."""
    members = {}
    if bool((experience.spreads > 0).any()):
        pessimistic = experience.means.double() - spread_weight * experience.spreads.double()
        members = {"reward_mean": float(experience.means.double().mean()), "reward_pessimistic": float(pessimistic.mean())}
    mask = experience.mask
    logps, reference_logps = (tensor.masked_fill(~mask, 0) for tensor in (experience.logps, experience.reference_logps))
    known = bool(experience.entropies[mask].isfinite().all())
    entropy = {"entropy_nats": float(masked_mean(experience.entropies.double(), mask))} if known else {}
    return {
        "reward": float(experience.scores.double().mean()),
        "reward_spread": float(experience.spreads.double().mean()),
        **members,
        "kl_k1_nats": float(kl_k1(logps, reference_logps).double().sum(1).mean()),
        "kl_k3_nats": float(kl_k3(logps, reference_logps).double().sum(1).mean()),
        **entropy,
        "length_tokens": float(mask.sum(1).double().mean()),
        "unfinished_share": float((~experience.finished).double().mean()),
    }


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the value model foresaw: 1 is all, 0 is no better than the mean, below 0 is worse."""
    residual, known = (returns - values)[mask].double(), returns[mask].double()
    variance = float(known.var(correction=0))
    return 1 - float(residual.var(correction=0)) / variance if variance > 0 else 0.0
