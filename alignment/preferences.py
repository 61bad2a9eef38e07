"""What raters said of one prompt's completions, as the weights that preference losses take: derived once, before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.losses import Compared
from alignment.options import DPOOptions
from alignment.ranking_losses import Stages, join_stages, stack_stages, stages
from rewardmodel.losses import band_matrices, pair_weights, stack
from training.rankings import EncodedRanking, RaterRanking

LISTED_TIES = 5  # prompts named in the counts


@dataclass(frozen=True, slots=True)
class Target:
    """All rankings of one prompt's K completions. Each ranking that says anything spreads its weight over its pairs (or stages).

    wins, ties, margins, best, stages: as in `Compared`, of one prompt;  strict (K, K): the preference pairs alone, for metrics;
    weight: sum of the weights of rankings that count;  pairs, tied: preference pairs and tied pairs, over all rankings;
    silent: rankings that leave nothing to learn from (under ties = drop, those of one band).
    """

    wins: Tensor
    ties: Tensor
    strict: Tensor
    best: Tensor
    margins: Tensor
    stages: Stages
    weight: float
    pairs: int
    tied: int
    silent: int


def target(rankings: Sequence[RaterRanking], size: int, options: DPOOptions) -> Target:
    """Weights of one prompt's completions under the run's treatment of ties.

    Args:    rankings: with the weight each one has;  size: K;  options: ties, loss, strength_margin.
    Returns: a Target; a tie is no pair ("drop"), half a win each way ("half"), or an outcome ("rao_kupper", "davidson").
    """
    as_outcome = options.ties in ("rao_kupper", "davidson")
    weights = pair_weights(rankings, size, ties="davidson" if as_outcome else options.ties)
    strict = pair_weights(rankings, size, ties="drop")
    parts = []
    if options.loss == "plackett_luce":
        parts = [stages(ranking.bands, size, ties=options.ties, weight=ranking.weight) for ranking in rankings if ranking.weight > 0]
    silent = sum(1 for ranking in rankings if not pair_weights([ranking], size, ties="davidson" if as_outcome else options.ties).weight)
    return Target(
        wins=weights.wins,
        ties=weights.ties,
        strict=strict.wins,
        best=best_weights(rankings, size),
        margins=options.strength_margin * mean_strengths(rankings, size),
        stages=join_stages(parts, size),
        weight=weights.weight,
        pairs=weights.pairs,
        tied=weights.tied,
        silent=silent,
    )


def best_weights(rankings: Sequence[RaterRanking], size: int) -> Tensor:
    """(K,): each ranking's weight, spread evenly over its best band. A ranking of one band calls nothing better than anything else: 0."""
    best = torch.zeros(size)
    for ranking in rankings:
        if len(ranking.bands) > 1:
            best[list(ranking.bands[0])] += ranking.weight / len(ranking.bands[0])
    return best


def mean_strengths(rankings: Sequence[RaterRanking], size: int) -> Tensor:
    """(K, K): how much better i is than j, in units of stated strength, the mean over the rankings that put i before j; 0 where none says.

    The strength between two bands is the sum of those of the steps between them. Pairs of several raters share one margin, because their
    loss is taken once, with the sum of their weights.
    """
    total, weight = torch.zeros(size, size), torch.zeros(size, size)
    for ranking in rankings:
        wins = ranking.weight * band_matrices(ranking.bands, size)[0]
        weight += wins
        height = torch.zeros(size)
        above = 0.0
        for band, strength in zip(ranking.bands[1:], getattr(ranking, "strengths", ()), strict=False):
            above += strength
            height[list(band)] = above
        total += wins * (height[None, :] - height[:, None])
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


def compare(targets: Sequence[Target], logps: Tensor, reference: Tensor, tokens: Tensor, *, shift: Tensor | float = 0.0) -> Compared:
    """The batch that `preference_losses` takes, on the device of the log-probabilities (B, K)."""
    device, size = logps.device, logps.shape[1]
    best = torch.zeros(logps.shape)
    for place, one in enumerate(targets):
        best[place, : len(one.best)] = one.best
    return Compared(
        logps=logps,
        reference=reference.to(device),
        tokens=tokens.to(device),
        wins=stack([one.wins for one in targets], size).to(device),
        ties=stack([one.ties for one in targets], size).to(device),
        best=best.to(device),
        margins=stack([one.margins for one in targets], size).to(device),
        stages=stack_stages([one.stages for one in targets], size).to(device),
        shift=shift,
    )


def tied_keys(items: Sequence[EncodedRanking]) -> list[str]:
    """The first prompts in which somebody tied completions."""
    return [item.key for item in items if any(len(band) > 1 for ranking in item.rankings for band in ranking.bands)][:LISTED_TIES]
