"""Whether a probability of 0.8 is right 8 times in 10: reliability of P(i before j) on held-out pairs, and the temperature that mends it.

P(i before j, if not tied) = sigmoid(log-odds / T). The log-odds are s_i - s_j under Bradley-Terry, for Plackett-Luce's pairs, and under
Davidson's model once ties are set aside; Rao and Kupper's are steeper: log P(win) - log P(loss).
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewardmodel.accuracy import Judged, clustered_interval, pair_counts

LEAST_PAIRS_IN_A_BIN = 10
COLDEST, HOTTEST = 0.01, 100.0  # limits of a temperature
NEWTON_STEPS = 50


LogOdds = Callable[[np.ndarray], np.ndarray]  # of a pair that is not tied, from its differences of scores


def as_they_are(differences: np.ndarray) -> np.ndarray:
    return differences


@dataclass(frozen=True, slots=True)
class Pairs:
    """Held-out preference pairs of single raters, N of them: `differences` = log-odds of the preferred one; `weights` > 0; `prompts`."""

    differences: np.ndarray
    weights: np.ndarray
    prompts: np.ndarray

    def of(self, mask: np.ndarray) -> "Pairs":
        return Pairs(self.differences[mask], self.weights[mask], self.prompts[mask])


def preference_pairs(judged: Sequence[Judged], log_odds: LogOdds = as_they_are) -> Pairs:
    """Every rater's preference pairs; equal ones of several raters are one entry with their number as weight. Ties make none."""
    differences, weights, prompts = [], [], []
    for item in judged:
        wins = pair_counts(item.rankings, len(item.scores))
        better, worse = np.nonzero(wins)
        scores = np.asarray(item.scores, dtype=np.float64)
        differences.append(scores[better] - scores[worse])
        weights.append(wins[better, worse])
        prompts += [item.prompt] * len(better)
    if not prompts:
        return Pairs(np.zeros(0), np.zeros(0), np.zeros(0, dtype=str))
    return Pairs(log_odds(np.concatenate(differences)), np.concatenate(weights), np.array(prompts))


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))


def log_loss(pairs: Pairs, temperature: float | np.ndarray = 1.0) -> float:
    """Minus the mean log-probability of a rater's preference, in nats; log 2 = 0.693 knows nothing."""
    losses = np.logaddexp(0.0, -pairs.differences / temperature)
    return float((pairs.weights * losses).sum() / pairs.weights.sum())


@dataclass(frozen=True, slots=True)
class Temperature:
    """`value` with its 95 % interval; `high` is infinite where scores without any meaning are not ruled out."""

    value: float
    low: float
    high: float


def fit_temperature(pairs: Pairs) -> Temperature:
    """The temperature of greatest likelihood. Above 1: the scores were too sure of themselves.

    Solved for a = 1/T, in which the loss sum w log(1 + e^(-a d)) is convex, by Newton's method. The interval is of a, with a variance
    that respects prompts, var = sum_c g_c^2 / H^2 (g_c: gradient of cluster c), then turned over. Kept within 0.01 and 100: scores
    that say the opposite have no likelihood above 0. Without any error among the pairs the likelihood grows for ever as T falls, and
    nothing can be fitted: T stays 1, and the interval says so.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2; clustered variance: Liang and Zeger 1986, Biometrika 73(1).
    """
    differences, weights = pairs.differences, pairs.weights
    if not differences.any() or bool((differences[weights > 0] >= 0).all()):
        return Temperature(1.0, COLDEST, math.inf)
    sharpness = 1.0 / float(np.abs(differences).mean())
    for _ in range(NEWTON_STEPS):
        doubt = sigmoid(-sharpness * differences)
        slope = float((weights * differences * doubt).sum())
        curvature = float((weights * differences**2 * doubt * (1 - doubt)).sum())
        # A step never more than halves or doubles a positive sharpness, so that Newton cannot run away.
        step = slope / max(curvature, 1e-300)
        new = min(max(sharpness + step, sharpness / 2, 1 / HOTTEST), sharpness * 2, 1 / COLDEST)
        if abs(new - sharpness) <= 1e-10 * sharpness:
            break
        sharpness = new
    doubt = sigmoid(-sharpness * differences)
    curvature = float((weights * differences**2 * doubt * (1 - doubt)).sum())
    gradients = _sums_by_prompt(pairs, weights * differences * doubt)
    error = math.sqrt(float((gradients**2).sum())) / max(curvature, 1e-300)
    low = 1 / (sharpness + 1.96 * error)
    high = 1 / (sharpness - 1.96 * error) if sharpness > 1.96 * error else math.inf
    return Temperature(1 / sharpness, low, high)


def halves(prompts: np.ndarray) -> np.ndarray:
    """(N,) True for the prompts of one half, by a hash of the prompt: the same on every machine and in every run."""
    known = {prompt: hashlib.sha256(f"half {prompt}".encode()).digest()[0] % 2 == 0 for prompt in np.unique(prompts)}
    return np.array([known[prompt] for prompt in prompts], dtype=bool)


def cross_fitted(pairs: Pairs) -> np.ndarray | None:
    """(N,) a temperature for each pair, fitted on the other half of the prompts, so that no pair judges a number that it helped to choose.

    None where one of the halves is empty."""
    first = halves(pairs.prompts)
    if first.all() or not first.any():
        return None
    return np.where(first, fit_temperature(pairs.of(~first)).value, fit_temperature(pairs.of(first)).value)


def reliability(pairs: Pairs, temperature: float | np.ndarray = 1.0, *, bins: int = 10, samples: int = 1000, seed: int = 0) -> list[dict]:
    """The reliability curve, in bins of (nearly) equal count by predicted probability.

    A pair is looked at in the order that the scores favour, so predictions lie in 1/2 to 1; the curve below 1/2 is its mirror image.
    Equal scores are a prediction of 1/2 and an observation of 1/2.

    Returns: for each bin: predicted (mean), observed (share), observed_low and observed_high (95 %, over prompts), pairs.
    """
    scaled = pairs.differences / temperature
    predicted, observed = sigmoid(np.abs(scaled)), (np.sign(scaled) + 1) / 2
    total = pairs.weights.sum()
    bins = int(min(bins, max(1, total // LEAST_PAIRS_IN_A_BIN)))
    order = np.lexsort((pairs.prompts, predicted))
    middles = (np.cumsum(pairs.weights[order]) - pairs.weights[order] / 2) / total if len(order) else np.zeros(0)
    place = np.empty(len(order), dtype=int)
    place[order] = np.minimum((middles * bins).astype(int), bins - 1)
    rows = []
    for number in range(bins):
        inside = place == number
        if not inside.any():
            continue
        part, weight = pairs.of(inside), pairs.weights[inside].sum()
        tops = _sums_by_prompt(part, part.weights * observed[inside])
        low, high = clustered_interval(tops, _sums_by_prompt(part, part.weights), samples=samples, seed=seed)
        rows.append(
            {
                "predicted": float((part.weights * predicted[inside]).sum() / weight),
                "observed": float(tops.sum() / weight),
                "observed_low": low,
                "observed_high": high,
                "pairs": int(weight),
            }
        )
    return rows


def calibration_error(rows: Sequence[dict]) -> float:
    """Expected calibration error: mean over pairs of |predicted - observed| of their bin.

    Never below 0, so a perfect judge's is above it too: by up to 0.4 sqrt(bins / pairs) with independent pairs.
    Source: Naeini et al. 2015, AAAI 29(1); equal-count bins: Nixon et al. 2019, arXiv:1904.01685."""
    total = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in rows) / total


def _sums_by_prompt(pairs: Pairs, values: np.ndarray) -> np.ndarray:
    _, places = np.unique(pairs.prompts, return_inverse=True)
    return np.bincount(places, weights=values)
