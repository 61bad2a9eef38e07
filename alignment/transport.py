"""Optimal transport on the line, for the losses (AOT) that compare distributions of log-ratios rather than pairs. Pure functions."""

import torch
from torch import Tensor


def coupling(one: Tensor, other: Tensor, weights: Tensor, other_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The monotone coupling of two weighted sets of numbers: the n-th smallest of one goes with the n-th smallest of the other.

    AOT asks that the margins of the policy lie above those of the reference as distributions, not pair by pair, hence the n-th smallest
    against the n-th smallest. With the coupling (x, y) its loss is sum of mass * -log s(beta (x - y)): x and y are the differences of
    log-probabilities of a pair under policy and reference (`aot`), or the log-ratios of chosen and of rejected (`aot_unpaired`).

    Shapes:  N and M numbers with weights > 0 of the same sum.
    Returns: (P,) int64 places in `one`, (P,) places in `other`, (P,) float32 mass that goes with each; equal weights give a sort of both.
    Source:  Melnyk et al. 2024 (AOT), arXiv:2406.05882; one-dimensional optimal transport: Villani 2003, theorem 2.18."""
    order, other_order = one.argsort(stable=True), other.argsort(stable=True)
    ends, other_ends = weights.double()[order].cumsum(0), other_weights.double()[other_order].cumsum(0)
    edges = torch.cat([ends, other_ends]).sort().values
    mass = edges.diff(prepend=edges.new_zeros(1))
    middle = edges - mass / 2
    places = torch.searchsorted(ends, middle).clamp(max=len(order) - 1)
    other_places = torch.searchsorted(other_ends, middle).clamp(max=len(other_order) - 1)
    return order[places], other_order[other_places], mass.float()
