"""Losses that look at more than one pair: Plackett-Luce over a ranking, and transport between all log-ratios of a step. Pure functions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from training.rankings import Bands

# All orders of a band are 2^(band - 1) * band choices: above this, ties = half under Plackett-Luce is refused.
LARGEST_BAND = 8


@dataclass(frozen=True, slots=True)
class Stages:
    """Choices of one completion among several: `chosen` (..., S) int64, `among` (..., S, K) bool, `weights` (..., S) float32."""

    chosen: Tensor
    among: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> "Stages":
        return Stages(self.chosen.to(device), self.among.to(device), self.weights.to(device))


def stages(bands: Bands, size: int, *, ties: str, weight: float = 1.0) -> Stages:
    """One ranking as a row of choices, "this one before all that are worse"; the weights of the choices add up to `weight`.

    Args:    bands: completion indices, best first;  size: K;  ties: "drop": a completion is chosen from itself and all in worse bands, so
             nothing is said about its own band;  "half": the mean over all orders of each band (two tied completions: half a win each way).
    Returns: no stage where nothing is ranked against anything.
    Raises:  ValueError for another treatment of ties, or a band of more than LARGEST_BAND completions under "half"."""
    if ties not in ("drop", "half"):
        raise ValueError(f"unknown treatment of ties {ties!r} for Plackett-Luce: use drop or half")
    found: list[tuple[int, tuple[int, ...], float]] = []
    for place, band in enumerate(bands):
        worse = tuple(index for later in bands[place + 1 :] for index in later)
        found += [(index, (index, *worse), 1.0) for index in band] if ties == "drop" else list(_all_orders(band, worse))
    found = [(index, among, share) for index, among, share in found if len(among) > 1]
    total = sum(share for _, _, share in found)
    mask = torch.zeros((len(found), size), dtype=torch.bool)
    for row, (_, among, _) in enumerate(found):
        mask[row, list(among)] = True
    chosen = torch.tensor([index for index, _, _ in found], dtype=torch.long)
    return Stages(chosen, mask, torch.tensor([weight * share / total for _, _, share in found]))


def _all_orders(band: Sequence[int], worse: tuple[int, ...]) -> Iterable[tuple[int, tuple[int, ...], float]]:
    """(chosen, among, probability) over all orders of m tied ones: a subset of r is left with 1 / C(m, r), each of it first with 1 / r."""
    if len(band) > LARGEST_BAND:
        raise ValueError(f"{len(band)} completions are tied: Plackett-Luce with ties = half goes over all orders, of up to {LARGEST_BAND}")
    for left in range(1, len(band) + 1):
        for subset in combinations(band, left):
            for index in subset:
                yield index, (*subset, *worse), 1 / (left * math.comb(len(band), left))


def join_stages(parts: Sequence[Stages], size: int) -> Stages:
    """All stages of several rankings of the same K completions, one after the other."""
    if not parts:
        return Stages(torch.zeros(0, dtype=torch.long), torch.zeros((0, size), dtype=torch.bool), torch.zeros(0))
    return Stages(torch.cat([p.chosen for p in parts]), torch.cat([p.among for p in parts]), torch.cat([p.weights for p in parts]))


def stack_stages(parts: Sequence[Stages], size: int) -> Stages:
    """(B, S), (B, S, K), (B, S) of items with up to S stages and up to K completions; what is added weighs nothing."""
    most = max((len(part.chosen) for part in parts), default=0)
    chosen = torch.zeros((len(parts), most), dtype=torch.long)
    among = torch.zeros((len(parts), most, size), dtype=torch.bool)
    among[..., 0] = True  # an empty choice would have no finite probability
    weights = torch.zeros((len(parts), most))
    for place, part in enumerate(parts):
        count, width = part.among.shape
        chosen[place, :count] = part.chosen
        among[place, :count] = False
        among[place, :count, :width] = part.among
        weights[place, :count] = part.weights
    return Stages(chosen, among, weights)


def plackett_luce(rewards: Tensor, choices: Stages) -> Tensor:
    """-log of the probability of a ranking when each place is drawn by softmax of the rewards of what is left.

    -sum over stages of weight * (reward of the chosen - log sum of e^reward over those it was chosen among). With the weights of `stages`
    it is the mean over stages, so that a long ranking counts like a short one; times their number it is the paper's sum.

    Shapes:  B rankings of K completions, S stages.   Units: rewards are beta * log-ratio, in nats.
    Args:    rewards (B, K) float32;  choices: (B, S), (B, S, K), (B, S).
    Returns: losses (B,). For K = 2 it is DPO's loss.
    Source:  Plackett 1975; Luce 1959; Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 18 to 20."""
    left = rewards[:, None, :].expand(choices.among.shape).masked_fill(~choices.among, -torch.inf)
    return (choices.weights * (left.logsumexp(-1) - rewards.gather(1, choices.chosen))).sum(-1)


def coupling(one: Tensor, other: Tensor, weights: Tensor, other_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of two weighted sets of numbers: the n-th smallest of one goes with the n-th smallest of the other.

    AOT asks that the margins of the policy lie above those of the reference as distributions, not pair by pair, hence the n-th smallest
    against the n-th smallest. With the coupling (x, y) its loss is sum of mass * -log s(beta (x - y)): x and y are the differences of
    log-probabilities of a pair under policy and reference (`aot`), or the log-ratios of chosen and of rejected (`aot_unpaired`).

    Shapes:  N and M numbers with weights > 0 of the same sum.
    Returns: (P,) int64 places in `one`, (P,) places in `other`, (P,) float32 mass that goes with each; equal weights give a sort of both.
    Source:  Melnyk et al. 2024 (AOT), arXiv:2406.05882, eq. 7 and 9; one-dimensional optimal transport: Villani 2003, theorem 2.18."""
    order, other_order = one.argsort(stable=True), other.argsort(stable=True)
    ends, other_ends = weights.double()[order].cumsum(0), other_weights.double()[other_order].cumsum(0)
    edges = torch.cat([ends, other_ends]).sort().values
    mass = edges.diff(prepend=edges.new_zeros(1))
    middle = edges - mass / 2
    places = torch.searchsorted(ends, middle).clamp(max=len(order) - 1)
    other_places = torch.searchsorted(other_ends, middle).clamp(max=len(other_order) - 1)
    return order[places], other_order[other_places], mass.float()
