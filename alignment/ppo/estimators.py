"""Advantage estimators behind one interface: how much better a token, or a whole completion, did than expected.

| name | baseline | advantage of a token | losses are averaged over |
|---|---|---|---|
| `gae` | a value model | its own (lambda-weighted) | tokens |
| `rloo` | mean of the prompt's other samples | that of its completion | tokens |
| `grpo` | mean of the prompt's samples | that of its completion, over their standard deviation | tokens of a completion, then completions |
| `dr_grpo` | mean of the prompt's samples | that of its completion | completions, each divided by the same number |

Everything else of the trainer is shared. Only `gae` has a value model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from alignment.ppo.advantages import gae, whiten
from alignment.ppo.options import PPOOptions

# Added to the deviation of a group, in normalised reward: completions that differ by rounding alone must not be told apart.
SMALLEST_DEVIATION = 1e-4

Average = Literal["tokens", "completions", "constant"]


@dataclass(frozen=True, slots=True)
class Estimator:
    """`estimate(rewards, values, mask, options)` -> (advantages (N, T), returns (N, T) or None without a value model)."""

    estimate: Callable[[Tensor, Tensor, Tensor, PPOOptions], tuple[Tensor, Tensor | None]]
    average: Average
    source: str


def by_value_model(rewards: Tensor, values: Tensor, mask: Tensor, options: PPOOptions) -> tuple[Tensor, Tensor | None]:
    """Generalised advantages, whitened over all real tokens of the step unless the options say otherwise."""
    advantages, returns = gae(rewards, values, mask, options.gamma, options.lam)
    return (whiten(advantages, mask) if options.whiten_advantages else advantages), returns


def leave_one_out(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """Advantage of each completion over the mean of the other samples of its prompt: an unbiased baseline without a model.

    Shapes: N completions of at most T tokens, `samples` of one prompt side by side.   Units: normalised reward.
    Args:    rewards (N, T) float32, the KL penalty among them;  mask (N, T) bool;  samples >= 2 divides N.
    Returns: (N, T) float32: the completion's advantage at each of its tokens, 0 under the padding. Equal rewards give 0.
    Raises:  ValueError if N is not a multiple of `samples`, or samples < 2.
    Source:  Ahmadian et al. 2024, arXiv:2402.14740, eq. 8; Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free"."""
    totals = _by_prompt(rewards, mask, samples)
    # R - (sum - R) / (n - 1) = n / (n - 1) * (R - mean), which is exactly 0 where all are equal.
    return _at_tokens(_centred(totals) * (samples / (samples - 1)), mask)


def group_normalised(rewards: Tensor, mask: Tensor, samples: int, *, scale: bool) -> Tensor:
    """Advantage of each completion over the mean of its prompt's samples; with `scale` in units of their standard deviation.

    Shapes, units, errors: as `leave_one_out`.
    Args:    scale: True is GRPO. Prompts on which all samples are nearly alike then count as much as those on which they differ: Dr. GRPO
             (False) leaves the division out.
    Returns: (N, T) float32, 0 under the padding. Equal rewards give 0.
    Source:  Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Liu et al. 2025, arXiv:2503.20783, section 3.2."""
    totals = _by_prompt(rewards, mask, samples)
    centred = _centred(totals)
    if scale:
        centred = centred / (totals.std(1, keepdim=True) + SMALLEST_DEVIATION)
    return _at_tokens(centred, mask)


def _rloo(rewards: Tensor, _values: Tensor, mask: Tensor, options: PPOOptions) -> tuple[Tensor, Tensor | None]:
    return leave_one_out(rewards, mask, options.samples_per_prompt), None


def _grpo(rewards: Tensor, _values: Tensor, mask: Tensor, options: PPOOptions) -> tuple[Tensor, Tensor | None]:
    return group_normalised(rewards, mask, options.samples_per_prompt, scale=True), None


def _dr_grpo(rewards: Tensor, _values: Tensor, mask: Tensor, options: PPOOptions) -> tuple[Tensor, Tensor | None]:
    return group_normalised(rewards, mask, options.samples_per_prompt, scale=False), None


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(by_value_model, "tokens", "Schulman et al. 2015, arXiv:1506.02438"),
    "rloo": Estimator(_rloo, "tokens", "Ahmadian et al. 2024, arXiv:2402.14740"),
    "grpo": Estimator(_grpo, "completions", "Shao et al. 2024, arXiv:2402.03300"),
    "dr_grpo": Estimator(_dr_grpo, "constant", "Liu et al. 2025, arXiv:2503.20783"),
}


def token_weights(mask: Tensor, average: Average, longest: int) -> Tensor:
    """What each token of a minibatch counts in its loss.

    Shapes: B completions of at most T tokens.
    Args:    mask (B, T) bool, of the whole minibatch;  longest: most tokens that a completion may have.
    Returns: (B, T) float32, 0 under the padding. `tokens`: each real token the same, 1 in sum (long completions count more).
             `completions`: each completion the same, and each token within it (in a long one a token counts less).
             `constant`: each token 1 / (B * longest), so that no length is favoured either way.
    """
    real = mask.float()
    if average == "tokens":
        return real / real.sum().clamp(min=1)
    if average == "completions":
        return real / (real.sum(1, keepdim=True).clamp(min=1) * len(mask))
    return real / (longest * len(mask))


def _by_prompt(rewards: Tensor, mask: Tensor, samples: int) -> Tensor:
    """(P, samples) float64: the whole reward of each completion."""
    if rewards.shape != mask.shape:
        raise ValueError(f"Shapes differ: {tuple(rewards.shape)} and {tuple(mask.shape)}.")
    if samples < 2 or len(rewards) % samples:
        raise ValueError(f"A group needs 2 samples or more of each prompt; got {len(rewards)} completions in groups of {samples}.")
    return rewards.masked_fill(~mask, 0).double().sum(1).unflatten(0, (-1, samples))


def _centred(totals: Tensor) -> Tensor:
    """Less the group's mean; exactly 0 where all are equal, which a rounded mean would miss."""
    equal = (totals == totals[:, :1]).all(1, keepdim=True)
    return (totals - totals.mean(1, keepdim=True)).masked_fill(equal, 0)


def _at_tokens(by_prompt: Tensor, mask: Tensor) -> Tensor:
    return by_prompt.flatten().float()[:, None].expand(mask.shape).masked_fill(~mask, 0)
