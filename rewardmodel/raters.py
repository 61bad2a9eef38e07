"""How much each rater's rankings should count, from how far he agrees with others who ranked the same completions. No torch here.

A rater whose word is right with probability q, and otherwise the opposite, should move an estimate in proportion to 2q - 1 (the one-coin
model: Dawid and Skene 1979, J. R. Stat. Soc. C 28(1)). His agreement p with raters of mean quality m obeys 2p - 1 = (2q - 1)(2m - 1), so
weights in proportion to 2p - 1 are right whatever m is. Agreement is estimated by empirical Bayes: raters of few rankings are drawn
towards the mean, and all are equal where their differences are no larger than chance makes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from training.rankings import EncodedRanking, RaterRanking


@dataclass(frozen=True, slots=True)
class Agreement:
    """`shrunk`: each rater's estimated agreement, 1/2 is chance; `mean`: what raters without any overlap are taken for."""

    shrunk: dict[str, float]
    mean: float


def agreements(prompts: Iterable[tuple[Sequence[RaterRanking], int]]) -> dict[str, list[float]]:
    """For each named rater and each ranking of his: the mean over pairs that others ranked too of the share of them who say the same.

    Strict against tie is half an agreement. Rankings without a name speak as others, each for somebody else, but are judged by nobody.

    Args:    prompts: the rankings of one prompt's K completions, and K.
    """
    found: dict[str, list[float]] = {}
    for rankings, size in prompts:
        said = [_signs(ranking, size) for ranking in rankings]
        for ranking, mine in zip(rankings, said, strict=True):
            others = [signs for other, signs in zip(rankings, said, strict=True) if other.rater != ranking.rater]
            if not ranking.rater or not others:
                continue
            stacked = np.stack(others)
            alike = 1 - np.abs(stacked - mine) / 2  # opposite 0, tie against strict 1/2, the same 1; nan where either is silent
            heard = np.isfinite(alike)
            count = heard.sum(0)
            if count.any():
                shares = np.where(heard, alike, 0).sum(0)[count > 0] / count[count > 0]
                found.setdefault(ranking.rater, []).append(float(shares.mean()))
    return found


def shrink(found: dict[str, list[float]]) -> Agreement | None:
    """Each rater's mean drawn towards the mean of all, by tau^2 / (tau^2 + sigma^2 / n). None where fewer than two raters can be compared.

    sigma^2: variance of a rater's rankings about his own mean, pooled;  tau^2: variance between raters, by moments, at least 0.
    Source:  Morris 1983, J. Am. Stat. Assoc. 78(381); tau^2: DerSimonian and Laird 1986, Control. Clin. Trials 7(3), eq. 8.
    """
    freedom = sum(len(values) - 1 for values in found.values())
    if len(found) < 2 or freedom < 1:
        return None
    names = sorted(found)
    means = np.array([np.mean(found[name]) for name in names])
    counts = np.array([len(found[name]) for name in names], dtype=float)
    within = sum(float(((np.array(found[name]) - mean) ** 2).sum()) for name, mean in zip(names, means, strict=True)) / freedom
    # With no variance at all each mean is exact; the floor only keeps the division defined.
    precision = counts / max(within, 1e-12)
    centre = float((precision * means).sum() / precision.sum())
    excess = float((precision * (means - centre) ** 2).sum()) - (len(names) - 1)
    between = max(0.0, excess / float(precision.sum() - (precision**2).sum() / precision.sum()))
    weights = 1 / (between + 1 / precision)
    centre = float((weights * means).sum() / weights.sum())
    kept = between / (between + 1 / precision)
    return Agreement(dict(zip(names, (centre + kept * (means - centre)).tolist(), strict=True)), centre)


def rater_weights(prompts: Sequence[tuple[Sequence[RaterRanking], int]]) -> dict[str, float]:
    """A weight >= 0 for each rater, in proportion to agreement beyond chance; the mean over rankings (by their own weights) is 1.

    Args:    prompts: of the training split alone: the rankings of one prompt's K completions, and K.
    Returns: 1 for every rater where nobody's completions were ranked by others, where raters cannot be told apart, or where nobody agrees
             more than chance.
    """
    volume: dict[str, float] = {}
    for rankings, _ in prompts:
        for ranking in rankings:
            volume[ranking.rater] = volume.get(ranking.rater, 0.0) + ranking.weight
    agreed = shrink(agreements(prompts))
    if agreed is None:
        return dict.fromkeys(volume, 1.0)
    raw = {rater: max(0.0, 2 * agreed.shrunk.get(rater, agreed.mean) - 1) for rater in volume}
    total = sum(raw[rater] * volume[rater] for rater in volume)
    if not total > 0:
        return dict.fromkeys(volume, 1.0)
    scale = sum(volume.values()) / total
    return {rater: value * scale for rater, value in raw.items()}


def reweighted(items: Sequence[EncodedRanking], weights: dict[str, float]) -> list[EncodedRanking]:
    """The same rankings, each one's weight times its rater's."""
    return [replace(item, rankings=[replace(said, weight=said.weight * weights[said.rater]) for said in item.rankings]) for item in items]


def _signs(ranking: RaterRanking, size: int) -> np.ndarray:
    """(P,) for each pair i < j: 1 where i is better, -1 where j is, 0 tied, nan where the ranking is silent."""
    level = np.full(size, np.nan)
    for place, band in enumerate(ranking.bands):
        level[list(band)] = place
    first, second = np.triu_indices(size, 1)
    return np.sign(level[second] - level[first])
