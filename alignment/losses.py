"""Losses of a policy's log-probabilities against rankings: pure functions, without state."""

import torch.nn.functional as F
from torch import Tensor


def dpo_losses(policy_logps: Tensor, reference_logps: Tensor, wins: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of each ranking: small once the policy prefers better completions more than the reference does.

    Each completion's log-probability enters once; the pairs are differences of its log-ratios.

    Shapes:  B rankings of K completions.   Units: log-probabilities in nats, over completion tokens only.
    Args:    policy_logps, reference_logps (B, K) float32;  wins (B, K, K): weight of "i is preferred to j", for example 1 / pairs;
             beta: > 0, dimensionless, usually 0.1;  label_smoothing: in [0, 0.5), the share of preferences that are the wrong way round.
    Returns: losses (B,), weighted sums over pairs, not averaged over rankings.
    Raises:  ValueError if shapes differ, or beta or label_smoothing are out of range.
    Source:  Rafailov et al. 2023, arXiv:2305.18290, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO)."""
    if policy_logps.shape != reference_logps.shape or wins.shape != (*policy_logps.shape, policy_logps.shape[-1]):
        raise ValueError(f"shapes do not fit: {policy_logps.shape}, {reference_logps.shape}, {wins.shape}")
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}")
    margins = beta * implicit_margins(policy_logps, reference_logps)
    losses = -F.logsigmoid(margins)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)
    return (wins * losses).sum((-1, -2))


def implicit_margins(policy_logps: Tensor, reference_logps: Tensor) -> Tensor:
    """(B, K, K): log-ratio of i minus log-ratio of j, in nats; beta times this is the margin of implicit rewards."""
    ratios = policy_logps - reference_logps
    return ratios[:, :, None] - ratios[:, None, :]
