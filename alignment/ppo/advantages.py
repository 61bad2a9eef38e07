"""Advantages, returns and whitening: pure sums over the real tokens of sampled completions.

Every function takes a mask that is true on real completion tokens. What stands under the padding changes nothing, whatever it is: each
function clears it first, so that a NaN there cannot leak through a multiplication by zero.
"""

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of a batch: every token weighs the same, whatever completion it stands in.

    Shapes: B completions of at most T tokens.
    Args:    values (B, T) float;  mask (B, T) bool, true on real tokens.
    Returns: a scalar, 0 if no token is real."""
    _same_shape(values=values, mask=mask)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1, and shift to mean 0, over real tokens only: padding is in neither statistic.

    Shapes: B completions of at most T tokens; all of a step, so that the statistics are those of the step, whatever the minibatches.
    Args:    values (B, T) float;  mask (B, T) bool;  shift_mean: False keeps the mean (used for rewards, whose zero means something).
    Returns: (B, T) float32, 0 under the padding. With a single real token the variance is 0 and the result stays finite.
    Raises:  ValueError if shapes differ.
    Source:  arXiv:1909.08593 (lm-human-preferences, `whiten`); arXiv:2403.17031, detail 17."""
    _same_shape(values=values, mask=mask)
    # float64, and the variance from the centred values: a difference of large sums would lose it.
    kept = values.masked_fill(~mask, 0).double()
    count = mask.sum().clamp(min=1)
    mean = kept.sum() / count
    centred = (kept - mean).masked_fill(~mask, 0)
    scaled = centred * torch.rsqrt(centred.square().sum() / count + 1e-8)
    return (scaled if shift_mean else scaled + mean).float().masked_fill(~mask, 0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: how much better each token did than the value model expected, discounted by gamma * lam.

    advantage_t = sum_k (gamma * lam)^k * delta_{t+k},  delta_t = reward_t + gamma * value_{t+1} - value_t,
    where the value after the last real token is 0: an episode ends there, whether by a stop token or by the length limit.

    Shapes: B completions of at most T tokens; `mask` is a run of true from the left (completions are packed to the left).
    Args:    rewards (B, T), values (B, T) float32: value_t is the expectation *before* token t is written;  gamma, lam in [0, 1].
    Returns: advantages (B, T), returns (B, T) = advantages + values; both float32, 0 under the padding.
    Raises:  ValueError if shapes differ, a coefficient is out of range, or the mask has a hole.
    Source:  Schulman et al. 2015, arXiv:1506.02438, eq. 16."""
    _same_shape(rewards=rewards, values=values, mask=mask)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1]; got gamma={gamma}, lam={lam}.")
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("The mask has a hole: completion tokens must be packed to the left.")
    rewards = rewards.masked_fill(~mask, 0).float()
    values = values.masked_fill(~mask, 0).float()
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        # Under the padding reward, value and running sum are all 0, so the sum starts afresh at each row's last real token.
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
        advantages[:, t] = running
        following = values[:, t]
    return advantages, (advantages + values).masked_fill(~mask, 0)


def episode_rewards(scores: Tensor, kl_tokens: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Reward of each token: minus the KL penalty everywhere, plus the score of the whole completion at its last real token.

    Shapes: B completions of at most T tokens.   Units: kl_tokens in nats (estimator k1), scores in normalised reward.
    Args:    scores (B,) float32;  kl_tokens (B, T) float32;  mask (B, T) bool;  kl_coefficient >= 0, reward per nat.
    Returns: rewards (B, T) float32, 0 under the padding. The last real token is found by the mask, never by a token id.
    Raises:  ValueError if shapes differ, the coefficient is negative, or a completion has no token (it has nowhere to put its score).
    Source:  arXiv:1909.08593, eq. 2; arXiv:2203.02155, eq. 2."""
    _same_shape(kl_tokens=kl_tokens, mask=mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores must have one number per completion: {tuple(scores.shape)} against {mask.shape[0]} completions.")
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient must be >= 0; got {kl_coefficient}. A negative one would pay the policy for drifting away.")
    lengths = mask.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError("A completion has no token; sample at least one token for each prompt.")
    rewards = (-kl_coefficient * kl_tokens.float()).masked_fill(~mask, 0)
    last = (lengths - 1).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.float().unsqueeze(1))


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Shapes differ: {shapes}.")
