"""Losses of scores against rankings: pure functions, without state.

A ranking of K completions is one element of a batch: the mean over its pairs (Ouyang et al. 2022, arXiv:2203.02155, section 3.4), so
that a long ranking does not outweigh a short one. The loss is linear in its pairs, hence all rankings of the same completions add up
to one pair of (K, K) weight matrices, and each completion needs one score however many raters ranked it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardmodel.tie_models import NoTies, TieModel
from training.rankings import Bands, RaterRanking

PLAIN = NoTies()
TREATMENTS = ("davidson", "rao_kupper", "half", "drop")


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

    Args:    ties: "davidson", "rao_kupper": a tied pair is an outcome of its own;  "half": half a win each way;  "drop": no pair.
             A ranking without any pair left counts nothing.
    """
    if ties not in TREATMENTS:
        raise ValueError(f"unknown treatment of ties {ties!r}: use one of {', '.join(TREATMENTS)}")
    all_wins, all_ties = torch.zeros(size, size), torch.zeros(size, size)
    weight, pairs, tied = 0.0, 0, 0
    for ranking in rankings:
        if not ranking.weight > 0:
            continue
        wins, tie = band_matrices(ranking.bands, size)
        pairs += int(wins.sum())
        tied += int(tie.sum())
        if ties == "half":
            wins, tie = wins + 0.5 * (tie + tie.T), torch.zeros_like(tie)
        elif ties == "drop":
            tie = torch.zeros_like(tie)
        count = float(wins.sum() + tie.sum())
        if count:
            all_wins += wins * (ranking.weight / count)
            all_ties += tie * (ranking.weight / count)
            weight += ranking.weight
    return PairWeights(all_wins, all_ties, weight, pairs, tied)


def ranking_losses(
    scores: Tensor, wins: Tensor, ties: Tensor | None = None, *, model: TieModel = PLAIN, margins: Tensor | None = None
) -> Tensor:
    """Minus the log-likelihood of weighted pairs: a linear sum of -log P(i before j) and -log P(i and j tied).

    Shapes:  B prompts of K completions.
    Args:    scores (B, K) float32;  wins (B, K, K), ties (B, K, K) weights >= 0;  model: of ties; Bradley-Terry if there are none;
             margins (B, K, K) >= 0, in units of scores: how much i must be better than j before their difference counts as one.
    Returns: losses (B,) float32, not averaged.
    Raises:  ValueError for tied pairs under Bradley-Terry.
    Source:  Bradley and Terry 1952; `tie_models`; margins: Touvron et al. 2023, arXiv:2307.09288, eq. 2."""
    differences = scores[:, :, None] - scores[:, None, :]
    won = differences if margins is None else differences - margins
    losses = -(wins * model.log_win(won)).sum((-1, -2))
    if ties is not None and (not isinstance(model, NoTies) or bool(ties.any())):
        losses = losses - (ties * model.log_tie(differences)).sum((-1, -2))
    return losses


def centring_losses(scores: Tensor, pairs: Tensor) -> Tensor:
    """Weighted sum of (s_i + s_j)^2: keeps scores near 0.

    Args:    scores (B, K) float32;  pairs (B, K, K): weights of wins and ties.
    Returns: (B,).
    Source:  Eisenstein et al. 2023, arXiv:2312.09244, in the form of TRL's RewardTrainer."""
    sums = scores[:, :, None] + scores[:, None, :]
    return (pairs * sums.square()).sum((-1, -2))


def stack(matrices: Sequence[Tensor], size: int) -> Tensor:
    """(B, K, K) from matrices of up to K x K; the rest is 0, so it weighs nothing."""
    stacked = torch.zeros(len(matrices), size, size)
    for place, matrix in enumerate(matrices):
        stacked[place, : matrix.shape[0], : matrix.shape[1]] = matrix
    return stacked
