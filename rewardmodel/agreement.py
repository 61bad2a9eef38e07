"""What raters' agreement among themselves says about a judge: accuracy by how united they were, and the ceiling that they allow.

A judge's accuracy on single raters' pairs cannot be 1 where raters differ. For a pair of completions of which a share p of all possible
raters prefers the first, the best judge is right with m = max(p, 1 - p), and two raters agree with A = p^2 + (1 - p)^2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewardmodel.accuracy import Judged, clustered_interval, pair_counts
from rewardmodel.calibration import LogOdds, as_they_are, sigmoid
from training.rankings import RaterRanking

# (name, least margin, most margin) of a pair that at least two raters ordered or tied; the margin is a share of its raters.
BANDS = (("split", 0.0, 0.0), ("up to one third", 0.0, 1 / 3), ("up to two thirds", 1 / 3, 2 / 3), ("nearly all", 2 / 3, 1.0))
UNANIMOUS, ONE_RATER = "unanimous", "one rater"
NEAR = 1e-9


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt: how many raters put the majority's winner first, the loser first, or tied them."""

    prompt: str
    won: float
    lost: float
    tied: float
    difference: float  # score of the winner minus score of the loser

    @property
    def margin(self) -> float:
        return (self.won - self.lost) / (self.won + self.lost + self.tied)

    @property
    def band(self) -> str:
        if self.won + self.lost + self.tied == 1:
            return ONE_RATER
        if self.margin > 1 - NEAR:
            return UNANIMOUS
        return next(name for name, low, high in BANDS if self.margin <= high + NEAR)


def pairs_of(judged: Sequence[Judged]) -> Iterator[Pair]:
    """Each unordered pair of completions that at least one rater ordered, the majority's winner first; items of one prompt stay apart."""
    for item in judged:
        size = len(item.scores)
        counted = [replace(ranking, weight=1.0) for ranking in item.rankings if ranking.weight > 0]  # agreement is of people
        wins, tied = pair_counts(counted, size), tie_counts(counted, size)
        for first in range(size):
            for second in range(first + 1, size):
                better, worse = (first, second) if wins[first, second] >= wins[second, first] else (second, first)
                if wins[better, worse]:
                    difference = float(item.scores[better]) - float(item.scores[worse])
                    yield Pair(item.prompt, wins[better, worse], wins[worse, better], tied[first, second], difference)


def tie_counts(rankings: Sequence[RaterRanking], size: int) -> np.ndarray:
    """(K, K), symmetric: how many rankings put i and j in one band, each counted by its weight."""
    counts = np.zeros((size, size))
    for ranking in rankings:
        for band in ranking.bands:
            for one in band:
                for other in band:
                    counts[one, other] += ranking.weight * (one != other)
    return counts


def accuracy_by_agreement(
    judged: Sequence[Judged], *, log_odds: LogOdds = as_they_are, temperature: float = 1.0, samples: int = 1000, seed: int = 0
) -> list[dict]:
    """A judge's accuracy on majority pairs, by how united the raters were; each pair of completions counts once.

    Args:    log_odds, temperature > 0: of the probabilities that `confidence` is the mean of.
    Returns: for each band with a pair, most united first: name, margin_from and margin_to (margin: raters for the winner minus raters for
             the loser, over all raters of the pair, ties among them), pairs, accuracy with its 95 % interval over prompts (None where the
             raters are split, since neither order is right), confidence (mean probability of the order that the judge favours).
    """
    found: dict[str, list[Pair]] = {}
    for pair in pairs_of(judged):
        found.setdefault(pair.band, []).append(pair)
    limits = {ONE_RATER: (1.0, 1.0), UNANIMOUS: (1.0, 1.0), **{name: (low, high) for name, low, high in BANDS}}
    order = [UNANIMOUS, *(name for name, _, _ in reversed(BANDS)), ONE_RATER]
    rows = []
    for name in (name for name in order if name in found):
        pairs = found[name]
        row = {"band": name, "margin_from": limits[name][0], "margin_to": limits[name][1], "pairs": len(pairs)}
        row |= {"accuracy": None, "accuracy_low": None, "accuracy_high": None}
        if name != BANDS[0][0]:
            tops, bottoms = clustered([pair.prompt for pair in pairs], [(np.sign(pair.difference) + 1) / 2 for pair in pairs])
            low, high = clustered_interval(tops, bottoms, samples=samples, seed=seed)
            row |= {"accuracy": float(tops.sum() / bottoms.sum()), "accuracy_low": low, "accuracy_high": high}
        sure = sigmoid(np.abs(log_odds(np.array([pair.difference for pair in pairs]))) / temperature)
        rows.append({**row, "confidence": float(sure.mean())})
    return rows


def clustered(prompts: Sequence[str], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(C,) sums of the values of each prompt, and how many there are, prompts in the order in which they appear."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    tops, bottoms = np.zeros(len(places)), np.zeros(len(places))
    for prompt, value in zip(prompts, values, strict=True):
        tops[places[prompt]] += value
        bottoms[places[prompt]] += 1
    return tops, bottoms


@dataclass(frozen=True, slots=True)
class Share:
    """A ratio of sums with its 95 % interval over prompts."""

    value: float
    low: float
    high: float
    count: float  # its denominator


@dataclass(frozen=True, slots=True)
class Ceiling:
    """How far raters agree, and so how far a judge can agree with single raters. See `ceiling`."""

    rater_agreement: Share
    lower: Share
    upper: float
    accuracy: Share
    reached: Share


def ceiling(judged: Sequence[Judged], *, samples: int = 1000, seed: int = 0) -> Ceiling | None:
    """Bounds of the accuracy on single raters' preference pairs that a judge who knows the true shares p would have, E[max(p, 1 - p)].

    Estimators, over pairs of completions that at least two raters ordered (ties left out), raters taken to be drawn independently:
    `rater_agreement`  A: chance that two of a pair's raters order it alike, unbiased for E[p^2 + (1 - p)^2] and so a lower bound. Like
                       an accuracy on single raters' pairs it weighs each pair of completions by its raters.
    `lower`            each rater's pair against the majority of the pair's other raters, one half where those are even. The majority of
                       few raters is a noisy judge: biased downward as a ceiling, less so with more raters. With two or three it is A.
    `upper`            (1 + sqrt(2 A - 1)) / 2: exact if all pairs are equally contested, else too high (Jensen's inequality, since
                       2 m - 1 = |2 p - 1| and 2 A - 1 = E[(2 p - 1)^2]); 1/2 where A < 1/2.
    `accuracy`         the judge's, on the very pairs that `lower` is counted on;  `reached`: accuracy / lower, above 1 where the judge
                       knows the crowd better than a few of its raters do.

    Returns: None where no two raters ordered the same pair.
    Source:  pairwise agreement: Fleiss 1971, Psychological Bulletin 76(5); raters as each other's judges:
             Stiennon et al. 2020, arXiv:2009.01325, appendix C.2.
    """
    agreed: dict[str, np.ndarray] = {}
    for pair in pairs_of(judged):
        ordered = pair.won + pair.lost
        if ordered < 2:
            continue
        alike = (pair.won * (pair.won - 1) + pair.lost * (pair.lost - 1)) / (ordered - 1)
        # A rater of the winning side leaves won - 1 against lost; one of the losing side leaves won against lost - 1, and is never right.
        others = pair.won * (np.sign(pair.won - 1 - pair.lost) + 1) / 2 + pair.lost * (np.sign(pair.lost - 1 - pair.won) + 1) / 2
        right = pair.won * (np.sign(pair.difference) + 1) / 2 + pair.lost * (np.sign(-pair.difference) + 1) / 2
        agreed[pair.prompt] = agreed.get(pair.prompt, np.zeros(4)) + np.array([alike, others, right, ordered])
    if not agreed:
        return None
    alike, others, right, ordered = np.array(list(agreed.values())).T

    def share(tops: np.ndarray, bottoms: np.ndarray) -> Share:
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = clustered_interval(tops, bottoms, samples=samples, seed=seed)
            return Share(float(tops.sum() / bottoms.sum()), low, high, float(bottoms.sum()))

    agreement = share(alike, ordered)
    upper = (1 + math.sqrt(max(0.0, 2 * agreement.value - 1))) / 2
    return Ceiling(agreement, share(others, ordered), upper, share(right, ordered), share(right, others))
