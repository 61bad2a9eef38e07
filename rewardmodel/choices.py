"""Rankings as choices, stage by stage: Plackett-Luce, and Davidson-Luce where bands tie. Pure functions.

A ranking of n completions is n - 1 choices at most: the best band of all, then the best of what is left, and so on.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from training.errors import InputError
from training.rankings import RaterRanking

# A band of m tied completions has 2^m - 1 subsets; above this, ties = half is refused.
LARGEST_BAND = 10
# Stands for log 0: finite, so that no gradient is 0 x infinity.
IMPOSSIBLE = -1e30


@dataclass(frozen=True, slots=True)
class Choices:
    """S choices from K completions, of one prompt (S, ...) or of several (B, S, ...). What has weight 0 is no choice."""

    chosen: Tensor  # (..., S, K) float32: sums to 1 over those chosen, who share alike
    among: Tensor  # (..., S, K) bool: those chosen, and those they were chosen before
    margins: Tensor  # (..., S, K) float32: what each rival's score is raised by
    orders: Tensor  # (..., S) int64: how many were chosen as tied; 1 for a single choice
    weights: Tensor  # (..., S) float32

    def to(self, device: torch.device | str) -> "Choices":
        return Choices(*(part.to(device) for part in (self.chosen, self.among, self.margins, self.orders, self.weights)))


@dataclass(frozen=True, slots=True)
class _Choice:
    chosen: tuple[int, ...]
    among: tuple[int, ...]
    order: int
    share: float


def choices(rankings: Iterable[RaterRanking], size: int, *, ties: str, strength_margin: float = 0.0) -> Choices:
    """The choices of all rankings of one prompt.

    Args:    rankings: each spreads its weight over its choices;  size: K;  ties: how a band of several is read:
             "davidson": chosen together, a tie of that order, an outcome of its own; also the last band, of which nothing is worse.
             "half": the mean over all orders of the band (for two completions, half a win each way);
             "drop": each of them alone is chosen before all worse ones, and nothing is said about the band.
             strength_margin: >= 0, score units per unit of stated strength.
    Weights: under "davidson" and "half" a choice of a ranking of n completions weighs 1 / (n - 1), whatever it came to: were it one over
             the number of stages, ties would weigh more than strict orders and the estimates would be biased. Under "drop", the mean.
    Raises:  InputError for a band of more than LARGEST_BAND under "half"; ValueError for another treatment.
    """
    if ties not in ("davidson", "half", "drop"):
        raise ValueError(f"unknown treatment of ties {ties!r} under Plackett-Luce: use davidson, half or drop")
    rows: list[tuple[_Choice, float, list[float]]] = []
    for ranking in rankings:
        if ties == "half" and (largest := max(map(len, ranking.bands), default=0)) > LARGEST_BAND:
            raise InputError(
                f"{largest} completions are tied in ranking {ranking.uid or 'without a name'} of rater {ranking.rater or 'unknown'}; "
                f"Plackett-Luce with ties = half goes over all orders of up to {LARGEST_BAND}.",
                remedy="Use ties = davidson or drop.",
            )
        found = [choice for choice in _stages(ranking.bands, ties) if len(choice.among) > 1]
        total = sum(choice.share for choice in found) if ties == "drop" else sum(map(len, ranking.bands)) - 1
        if found and ranking.weight > 0:
            heights = band_heights(ranking, size)
            rows += [(choice, ranking.weight * choice.share / total, heights) for choice in found]
    chosen, margins = torch.zeros(len(rows), size), torch.zeros(len(rows), size)
    among = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, (choice, _, heights) in enumerate(rows):
        chosen[row, list(choice.chosen)] = 1 / len(choice.chosen)
        among[row, list(choice.among)] = True
        top = heights[choice.chosen[0]]
        for index in choice.among:
            margins[row, index] = strength_margin * (top - heights[index])
    orders = torch.tensor([choice.order for choice, _, _ in rows], dtype=torch.long)
    return Choices(chosen, among, margins, orders, torch.tensor([weight for _, weight, _ in rows]))


def band_heights(ranking: RaterRanking, size: int) -> list[float]:
    """For each of K completions, how far it stands below the best band in stated strength, as a number <= 0; all 0 where none is stated."""
    heights, below = [0.0] * size, 0.0
    steps = ranking.strengths or (0.0,) * len(ranking.bands)
    for place, band in enumerate(ranking.bands):
        below -= steps[place - 1] if place else 0.0
        for index in band:
            heights[index] = below
    return heights


def _stages(bands: Sequence[Sequence[int]], ties: str) -> Iterator[_Choice]:
    for place, members in enumerate(bands):
        band = tuple(members)
        worse = tuple(index for later in bands[place + 1 :] for index in later)
        if not band:
            continue
        if ties == "davidson":
            yield _Choice(band, (*band, *worse), len(band), 1.0)
        elif ties == "drop":
            yield from (_Choice((index,), (index, *worse), 1, 1.0) for index in band)
        else:
            yield from _all_orders(band, worse)


def _all_orders(band: tuple[int, ...], worse: tuple[int, ...]) -> Iterator[_Choice]:
    """Over all orders of m tied ones, a subset of r is what is left with probability 1 / C(m, r), and each of it comes first alike."""
    for left in range(1, len(band) + 1):
        for subset in combinations(band, left):
            yield _Choice(subset, (*subset, *worse), 1, 1 / math.comb(len(band), left))


def stack_choices(parts: Sequence[Choices], size: int) -> Choices:
    """B prompts with up to S choices among up to K completions; what is added weighs 0."""
    most = max((len(part.weights) for part in parts), default=0)
    chosen, margins = torch.zeros(len(parts), most, size), torch.zeros(len(parts), most, size)
    among = torch.zeros(len(parts), most, size, dtype=torch.bool)
    orders, weights = torch.ones(len(parts), most, dtype=torch.long), torch.zeros(len(parts), most)
    for place, part in enumerate(parts):
        count, width = part.among.shape
        chosen[place, :count, :width] = part.chosen
        among[place, :count, :width] = part.among
        margins[place, :count, :width] = part.margins
        orders[place, :count], weights[place, :count] = part.orders, part.weights
    return Choices(chosen, among, margins, orders, weights)


def choice_losses(scores: Tensor, asked: Choices, log_delta: Tensor | None = None) -> Tensor:
    """Minus the log-likelihood of weighted choices under Davidson-Luce, which is Plackett-Luce where nothing can tie.

    Among the set A, with a_i = e^s_i:  P(T is chosen) = delta_t (prod of a_i in T)^(1/t) / sum over all subsets U of A, up to D large, of
    delta_u (prod of a_i in U)^(1/u), where t and u are the sizes of T and U, and delta_1 = 1. Two completions: Davidson's model.

    Shapes:  B prompts of K completions, S choices; D - 1 tie parameters.
    Args:    scores (B, K) float32;  asked: (B, S, ...), orders up to D;  log_delta (D - 1,): of ties of 2 ... D; None: no tie is possible.
    Returns: losses (B,) float32, not averaged.
    Source:  Plackett 1975, J. R. Stat. Soc. C 24(2); Luce 1959; Firth, Kosmidis and Turner 2019, arXiv:1909.07123, eq. 1.
    """
    largest = 1 if log_delta is None else 1 + len(log_delta)
    raised = (scores[:, None, :] + asked.margins).masked_fill(~asked.among, IMPOSSIBLE)
    log_norm = raised.logsumexp(-1)
    log_odds = (asked.chosen * scores[:, None, :]).sum(-1)
    if log_delta is not None:
        for order in range(2, largest + 1):
            log_norm = torch.logaddexp(log_norm, log_delta[order - 2] + log_symmetric_sum(raised / order, order))
        log_odds = log_odds + torch.cat([log_delta.new_zeros(1), log_delta])[asked.orders - 1]
    return (asked.weights * (log_norm - log_odds)).sum(-1)


def log_symmetric_sum(logs: Tensor, order: int) -> Tensor:
    """log of the sum, over all subsets of `order` of the K numbers, of the product of the subset: K steps rather than C(K, order) terms.

    Args:    logs (..., K): logarithms of the numbers.   Returns: (...).
    """
    sums = [torch.zeros_like(logs[..., 0]), *(torch.full_like(logs[..., 0], IMPOSSIBLE) for _ in range(order))]
    for index in range(logs.shape[-1]):
        one = logs[..., index]
        sums = [sums[0], *(torch.logaddexp(sums[t], (sums[t - 1] + one).clamp(min=IMPOSSIBLE)) for t in range(1, order + 1))]
    return sums[order]


def start_of_log_delta(parts: Iterable[Choices], largest: int) -> list[float]:
    """Logarithms of delta_2 ... delta_D that give the observed share of ties of each size between equals.

    Of a choice among n there are C(n, t) subsets of t, equally likely: delta_t = (chosen_t / subsets_t) / (chosen_1 / subsets_1). Half a
    choice is added to each, so that sizes nobody used stay finite.
    """
    seen, possible = [0.5] * largest, [0.0] * largest
    for part in parts:
        for order, among, weight in zip(part.orders.tolist(), part.among.sum(-1).tolist(), part.weights.tolist(), strict=True):
            seen[order - 1] += weight
            for size in range(1, largest + 1):
                possible[size - 1] += weight * math.comb(among, size)
    return [math.log(seen[t] * possible[0] / (max(possible[t], 1.0) * seen[0])) for t in range(1, largest)]
