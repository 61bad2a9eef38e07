"""Losses of scores against rankings: pure functions, without state.

A ranking of K completions is one element of a batch: the mean over its pairs (Ouyang et al. 2022, arXiv:2203.02155, section 3.4), so
that a long ranking does not outweigh a short one. The loss is linear in its pairs, hence all rankings of the same completions add up
to one pair of (K, K) weight matrices, and each completion needs one score however many raters ranked it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.rankings import Bands, RaterRanking


def band_matrices(bands: Bands, size: int) -> tuple[Tensor, Tensor]:
    """Pairs of one ranking.

    Args:    bands: completion indices, best first;  size: K.
    Returns: wins (K, K) float32: 1 at [i, j] where i stands in a better band than j;
             ties (K, K) float32: 1 at [i, j], i < j, where both stand in one band. Completions in no band make no pair.
    """
    level = torch.full((size,), -1)
    for place, band in enumerate(bands):
        level[list(band)] = place
    ranked = (level >= 0)[:, None] & (level >= 0)[None, :]
    wins = ranked & (level[:, None] < level[None, :])
    ties = ranked & (level[:, None] == level[None, :]) & torch.ones(size, size, dtype=torch.bool).triu(1)
    return wins.float(), ties.float()


@dataclass(frozen=True, slots=True)
class PairWeights:
    """All rankings of one prompt's K completions, as weights of pairs. `weight` is the sum of the weights of rankings that count."""

    wins: Tensor  # (K, K) float32
    ties: Tensor  # (K, K) float32, upper triangle
    weight: float
    pairs: int  # preference pairs, over all rankings
    tied: int  # tied pairs, over all rankings


def pair_weights(rankings: Sequence[RaterRanking], size: int, *, ties: str) -> PairWeights:
    """Each ranking spreads its weight evenly over its pairs.

    Args:    ties: "davidson": a tied pair is an outcome of its own;  "half": half a win each way;  "drop": no pair.
             A ranking without any pair left counts nothing.
    """
    if ties not in ("davidson", "half", "drop"):
        raise ValueError(f"unknown treatment of ties {ties!r}: use davidson, half or drop")
    all_wins, all_ties = torch.zeros(size, size), torch.zeros(size, size)
    weight, pairs, tied = 0.0, 0, 0
    for ranking in rankings:
        wins, tie = band_matrices(ranking.bands, size)
        pairs += int(wins.sum())
        tied += int(tie.sum())
        if ties == "half":
            wins, tie = wins + 0.5 * (tie + tie.T), torch.zeros_like(tie)
        elif ties == "drop":
            tie = torch.zeros_like(tie)
        count = float(wins.sum() + tie.sum())
        if count and ranking.weight > 0:
            all_wins += wins * (ranking.weight / count)
            all_ties += tie * (ranking.weight / count)
            weight += ranking.weight
    return PairWeights(all_wins, all_ties, weight, pairs, tied)


def ranking_losses(
    scores: Tensor, wins: Tensor, ties: Tensor | None = None, *, log_nu: Tensor | None = None, centring: float = 0.0
) -> Tensor:
    """Minus the log-likelihood of weighted pairs under Bradley-Terry, or under Davidson's model where `log_nu` is given.

    With d = s_i - s_j:  P(i before j) = e^(d/2) / (e^(d/2) + e^(-d/2) + nu),  P(tie) = nu / (e^(d/2) + e^(-d/2) + nu).

    Shapes:  B prompts of K completions.
    Args:    scores (B, K) float32;  wins (B, K, K), ties (B, K, K) weights >= 0;  log_nu: scalar, log of Davidson's tie parameter;
             None: nu = 0, plain Bradley-Terry;  centring: >= 0, weight of (s_i + s_j)^2 in each pair, which keeps scores near 0.
    Returns: losses (B,) float32, not averaged.
    Raises:  ValueError for tied pairs without log_nu.
    Source:  Bradley and Terry 1952; Davidson 1970, J. Am. Stat. Assoc. 65(329), eq. 2.3; centring: Eisenstein et al. 2023,
             arXiv:2312.09244, in the form of TRL's RewardTrainer."""
    margins = scores[:, :, None] - scores[:, None, :]
    if log_nu is None:
        if ties is not None and bool(ties.any()):
            raise ValueError("tied pairs need log_nu (Davidson's model); or derive the pairs with ties = half or drop")
        losses = -(wins * F.logsigmoid(margins)).sum((-1, -2))
    else:
        log_norm = torch.logaddexp(torch.logaddexp(margins / 2, -margins / 2), log_nu)
        losses = (wins * (log_norm - margins / 2)).sum((-1, -2))
        if ties is not None:
            losses = losses + (ties * (log_norm - log_nu)).sum((-1, -2))
    if centring:
        weights = wins if ties is None else wins + ties
        sums = scores[:, :, None] + scores[:, None, :]
        losses = losses + centring * (weights * sums.square()).sum((-1, -2))
    return losses


def start_of_log_nu(pairs: float, tied: float) -> float | None:
    """Log of the nu that gives the observed share of ties between equals, nu / (2 + nu); None where nothing is tied (nu = 0)."""
    if not tied:
        return None
    share = min(tied / (pairs + tied), 0.99)
    return math.log(2 * share / (1 - share))


def stack(matrices: Sequence[Tensor], size: int) -> Tensor:
    """(B, K, K) from matrices of up to K x K; the rest is 0, so it weighs nothing."""
    stacked = torch.zeros(len(matrices), size, size)
    for place, matrix in enumerate(matrices):
        stacked[place, : matrix.shape[0], : matrix.shape[1]] = matrix
    return stacked
