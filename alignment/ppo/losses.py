"""PPO's two clipped losses, the estimators of KL, and the controller of the KL coefficient. Pure functions of tensors and numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# A ratio beyond e^20 is a broken run; the bound keeps it finite, so that it is seen in the metrics rather than as a NaN in the weights.
MAX_LOG_RATIO = 20.0


def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimator k1 of KL(policy || reference) at each sampled token: unbiased, may be negative, high variance.

    Shapes: any, equal.   Units: nats.
    Args:    logps, reference_logps float32: log-probability of the sampled token under the policy that sampled it, and the reference.
    Returns: logps - reference_logps. Its sum over a completion is an unbiased estimate of the KL of whole completions.
    Raises:  ValueError if shapes differ.
    Source:  J. Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html."""
    if logps.shape != reference_logps.shape:
        raise ValueError(f"Shapes differ: {tuple(logps.shape)} and {tuple(reference_logps.shape)}.")
    return logps.float() - reference_logps.float()


def kl_k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimator k2: half the square of k1. Biased, low variance, never negative. Shapes, units, errors and source as `kl_k1`."""
    return 0.5 * kl_k1(logps, reference_logps).square()


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Estimator k3: exp(-k1) - 1 + k1. Unbiased and never negative. Shapes, units, errors and source as `kl_k1`."""
    # expm1 keeps its digits where policy and reference nearly agree: exp(-x) - 1 + x would be rounding noise there.
    difference = kl_k1(logps, reference_logps)
    return torch.expm1(-difference.clamp(min=-MAX_LOG_RATIO)) + difference


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Per token, not averaged; all (B, T) float32 except `clipped` (bool)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approximate_kl: Tensor


def policy_terms(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip_range: float) -> PolicyTerms:
    """PPO's clipped objective: gains count only while the new policy stays within `clip_range` of the one that sampled.

    loss_t = -min(ratio_t * A_t, clip(ratio_t, 1 - c, 1 + c) * A_t),  ratio_t = exp(logp_t - old_logp_t).

    Shapes: B completions of at most T tokens.   Units: nats.
    Args:    logps (B, T) with gradient;  old_logps, advantages (B, T) constants;  clip_range c > 0, dimensionless.
    Returns: PolicyTerms. `clipped` marks the tokens where the clipped term is the larger loss; `approximate_kl` is k3 of
             KL(old || new), 0 when nothing has changed.
    Raises:  ValueError if shapes differ or clip_range <= 0.
    Source:  Schulman et al. 2017, arXiv:1707.06347, eq. 7."""
    if not logps.shape == old_logps.shape == advantages.shape:
        raise ValueError(f"Shapes differ: {tuple(logps.shape)}, {tuple(old_logps.shape)}, {tuple(advantages.shape)}.")
    if clip_range <= 0:
        raise ValueError(f"clip_range must be > 0; got {clip_range}.")
    log_ratio = (logps.float() - old_logps.float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        approximate_kl = torch.expm1(log_ratio) - log_ratio
    return PolicyTerms(torch.maximum(plain, bounded), ratio.detach(), (bounded > plain).detach(), approximate_kl)


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> tuple[Tensor, Tensor]:
    """PPO's value loss: half the squared error, the worse of the plain one and of the one that moved at most `clip_range`.

    Shapes: B completions of at most T tokens.   Units: normalised reward.
    Args:    values (B, T) with gradient;  old_values, returns (B, T) constants;  clip_range > 0, or None for the plain squared error.
    Returns: losses (B, T), not averaged; clipped (B, T) bool.
    Raises:  ValueError if shapes differ or clip_range <= 0.
    Source:  arXiv:1909.08593 (lm-human-preferences, `vf_losses`); arXiv:2403.17031, detail 19."""
    if not values.shape == old_values.shape == returns.shape:
        raise ValueError(f"Shapes differ: {tuple(values.shape)}, {tuple(old_values.shape)}, {tuple(returns.shape)}.")
    plain = (values - returns).square()
    if clip_range is None:
        return 0.5 * plain, torch.zeros_like(plain, dtype=torch.bool)
    if clip_range <= 0:
        raise ValueError(f"clip_range must be > 0 or None; got {clip_range}.")
    bounded = (old_values + (values - old_values).clamp(-clip_range, clip_range) - returns).square()
    return 0.5 * torch.maximum(plain, bounded), (bounded > plain).detach()


def next_kl_coefficient(coefficient: float, kl_nats: float, target_nats: float | None, episodes: int, horizon_episodes: int) -> float:
    """The KL coefficient of the next step: raised when the policy drifts further than `target_nats`, lowered when it stays nearer.

    Units: kl_nats and target_nats are KL of whole completions (k1), in nats; the coefficient is reward per nat.
    Args:    target_nats: None keeps the coefficient fixed;  episodes: completions seen in this step;
             horizon_episodes: larger moves slower (10,000 in the source).
    Returns: coefficient * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon), kept above a quarter of itself. A KL that is not
             finite leaves it as it was.
    Raises:  ValueError if target or horizon is not positive.
    Source:  Ziegler et al. 2019, arXiv:1909.08593, section 2.2."""
    if target_nats is None or not math.isfinite(kl_nats):
        return coefficient
    if target_nats <= 0 or horizon_episodes <= 0:
        raise ValueError(f"KL target and horizon must be > 0; got {target_nats} and {horizon_episodes}.")
    error = min(max(kl_nats / target_nats - 1, -0.2), 0.2)
    # The bound matters only if a step is longer than the horizon; without it the coefficient could change its sign.
    return coefficient * max(1 + error * episodes / horizon_episodes, 0.25)
