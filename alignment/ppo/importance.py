"""Where another engine wrote the completions: how far its log-probabilities are from the trainer's, and the weights that correct for it.

The ratio of PPO is between the trainer before and after its updates; the engine's policy is a third one. Without a correction each
gradient is an expectation under a distribution that is never trained.
"""

import torch
from torch import Tensor

from alignment.ppo.losses import MAX_LOG_RATIO, kl_k3


def importance_weights(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Truncated importance weight of each token: min(trainer's probability / engine's probability, cap).

    Without the cap the mean of weight * f under the engine is the mean of f under the trainer; the cap trades a bias towards 0 for a
    bounded variance. Multiply onto the policy's loss of each token; no gradient flows through them.

    Shapes: B completions of at most T tokens.   Units: log-probabilities in nats; weights and cap dimensionless.
    Args:    trainer_logps, engine_logps (B, T): of the sampled tokens, by the same weights;  mask (B, T) bool: real tokens;  cap: >= 1.
    Returns: (B, T) float32, between 0 and cap; 0 beyond each completion's end.
    Raises:  ValueError if shapes differ or cap < 1 (tokens on which both agree would be cut).
    Source:  Ionides 2008, "Truncated importance sampling"; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
             RL training" (per token, cap 2)."""
    if cap < 1:
        raise ValueError(f"The cap of importance weights must be at least 1; got {cap}.")
    return _log_ratio(trainer_logps, engine_logps, mask).exp().clamp(max=cap).masked_fill(~mask, 0)


def mismatch_metrics(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor, cap: float) -> dict[str, float]:
    """How far the engine is from the trainer, over the real tokens.

    Shapes: as `importance_weights`.
    Returns: `mismatch_nats`: mean |trainer - engine|;  `mismatch_largest_nats`;  `mismatch_kl_k3_nats`: k3 of KL(engine || trainer), a
             token;  `importance_capped_share`: tokens whose weight was cut;  `importance_sample_share`: effective sample size of the
             capped weights, (sum w)^2 / (n sum w^2): 1 where both agree, 1 / n where one token has all the weight.  {} without tokens.
    Source:  Kong 1992, "A note on importance sampling using standardized weights" (effective sample size)."""
    if not bool(mask.any()):
        return {}
    difference = _log_ratio(trainer_logps, engine_logps, mask)[mask].double()
    weights = importance_weights(trainer_logps, engine_logps, mask, cap)[mask].double()
    k3 = kl_k3(engine_logps.masked_fill(~mask, 0), trainer_logps.masked_fill(~mask, 0))[mask].double()
    return {
        "mismatch_nats": float(difference.abs().mean()),
        "mismatch_largest_nats": float(difference.abs().max()),
        "mismatch_kl_k3_nats": float(k3.mean()),
        "importance_capped_share": float((difference.exp() > cap).double().mean()),
        "importance_sample_share": float(weights.sum().square() / (len(weights) * weights.square().sum())),
    }


def _log_ratio(trainer_logps: Tensor, engine_logps: Tensor, mask: Tensor) -> Tensor:
    if not trainer_logps.shape == engine_logps.shape == mask.shape:
        raise ValueError(f"Shapes differ: {tuple(trainer_logps.shape)}, {tuple(engine_logps.shape)}, {tuple(mask.shape)}.")
    with torch.no_grad():
        difference = trainer_logps.detach().float() - engine_logps.detach().float()
        return difference.masked_fill(~mask, 0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
