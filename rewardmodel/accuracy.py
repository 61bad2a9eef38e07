"""How often scores order completions as people did: on held-out rankings, with an interval that respects prompts.

Only preference pairs count. Equal scores are counted as one half. Pairs of one prompt are not independent, so the interval resamples
whole prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardmodel.losses import band_matrices
from training.rankings import RaterRanking


@dataclass(frozen=True, slots=True)
class Judged:
    """One held-out prompt: the score a judge gives to each of K completions, and what people said."""

    prompt: str  # its digest: the cluster
    scores: Sequence[float]
    rankings: Sequence[RaterRanking]
    blur: Sequence[float] = ()  # scores no further apart than both of these together are equal; none: as they are


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`share` of `pairs` ordered alike; `low` and `high` are the ends of the 95 % interval."""

    share: float
    low: float
    high: float
    pairs: int


def accuracy(judged: Sequence[Judged], *, majority: bool = False, samples: int = 1000, seed: int = 0) -> Accuracy | None:
    """Share of preference pairs that the scores order as people did, None where there is no pair.

    Args:    majority: count each pair of completions once, as most raters of the prompt had it (and not at all when they are even);
             else each rater's pairs count;  samples: of the bootstrap over prompts (percentile interval).
    """
    right: dict[str, float] = {}
    counted: dict[str, float] = {}
    for item in judged:
        wins = pair_counts(item.rankings, len(item.scores))
        if majority:
            wins = (wins > wins.T).astype(np.float64)
        points = np.asarray(item.scores, dtype=np.float64)
        margins = points[:, None] - points[None, :]
        if item.blur:
            around = np.asarray(item.blur, dtype=np.float64)
            margins[np.abs(margins) <= around[:, None] + around[None, :]] = 0.0
        alike = (np.sign(margins) + 1) / 2
        right[item.prompt] = right.get(item.prompt, 0.0) + float((wins * alike).sum())
        counted[item.prompt] = counted.get(item.prompt, 0.0) + float(wins.sum())
    tops = np.array([right[prompt] for prompt in right if counted[prompt]])
    bottoms = np.array([counted[prompt] for prompt in right if counted[prompt]])
    if not len(bottoms):
        return None
    low, high = clustered_interval(tops, bottoms, samples=samples, seed=seed)
    return Accuracy(float(tops.sum() / bottoms.sum()), low, high, int(bottoms.sum()))


def clustered_interval(tops: np.ndarray, bottoms: np.ndarray, *, samples: int, seed: int) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of sum(tops) / sum(bottoms) when clusters (C,) are drawn with replacement.

    Source: Efron and Tibshirani 1993, chapters 8 and 13."""
    draws = np.random.default_rng(seed).integers(0, len(tops), size=(samples, len(tops)))
    shares = tops[draws].sum(1) / bottoms[draws].sum(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def pair_counts(rankings: Sequence[RaterRanking], size: int) -> np.ndarray:
    """(K, K): how many rankings put i before j, each counted by its weight."""
    counts = np.zeros((size, size))
    for ranking in rankings:
        counts += ranking.weight * band_matrices(ranking.bands, size)[0].numpy()
    return counts
