"""What besides quality goes with a score or a preference: partial rank correlations over pairs, with intervals over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata


@dataclass(frozen=True, slots=True)
class Correlation:
    """`value` in -1 to 1 with its 95 % interval over prompts, of `pairs` pairs."""

    value: float
    low: float
    high: float
    pairs: int


def signed_ranks(differences: np.ndarray) -> np.ndarray:
    """(N,) mid-ranks of differences among all differences and their negatives, less the middle: swapping a pair only turns the sign.

    A pair of completions has no first and second by nature; so each is looked at from both sides, and the ranks' mean is 0.
    By hand: (2, -1, 0) -> with the negatives (2, 1, 0, 0, -1, -2), ranks (6, 5, 3.5, 3.5, 2, 1), less 3.5: (2.5, -1.5, 0).
    """
    return rankdata(np.concatenate([differences, -differences]))[: len(differences)] - (2 * len(differences) + 1) / 2


def partial_correlation(
    one: np.ndarray, other: np.ndarray, given: np.ndarray, prompts: Sequence[str] | np.ndarray, *, samples: int = 1000, seed: int = 0
) -> Correlation | None:
    """Rank correlation of `one` and `other` over pairs with `given` held fixed:

    r_12.3 = (r_12 - r_13 r_23) / sqrt((1 - r_13^2) (1 - r_23^2)),  r: Spearman's over both orders of each pair.

    Shapes:  N pairs of completions (i, j).
    Args:    one, other, given: (N,) differences (of i less of j);  prompts: (N,) the cluster of each.
             The interval resamples prompts with the ranks held as they are (percentile bootstrap).
    Returns: None where one of them never differs, or `given` says everything about one of the others.
    Source:  partial correlation: Fisher 1924, Metron 3; on ranks: Conover 1999, Practical Nonparametric Statistics, section 5.4.
    """
    if not len(one):
        return None
    ranks = np.stack([signed_ranks(values) for values in (one, other, given)])
    products = np.stack([ranks[a] * ranks[b] for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))], axis=1)
    _, places = np.unique(np.asarray(prompts), return_inverse=True)
    by_prompt = np.stack([np.bincount(places, weights=column) for column in products.T], axis=1)
    value = float(_partial(by_prompt.sum(0)))
    if not np.isfinite(value):
        return None
    clusters = len(by_prompt)
    drawn = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=samples)
    values = _partial(drawn @ by_prompt)
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return Correlation(value, float(low), float(high), len(one))


def _partial(moments: np.ndarray) -> np.ndarray:
    """From sums of products (..., 6): 11, 22, 33, 12, 13, 23."""
    v1, v2, v3, c12, c13, c23 = np.moveaxis(moments, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r12, r13, r23 = c12 / np.sqrt(v1 * v2), c13 / np.sqrt(v1 * v3), c23 / np.sqrt(v2 * v3)
        left = (1 - r13**2) * (1 - r23**2)
        return np.where(left > 1e-12, (r12 - r13 * r23) / np.sqrt(np.maximum(left, 1e-300)), np.nan)
