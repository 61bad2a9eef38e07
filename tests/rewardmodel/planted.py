"""Rankings drawn from a known truth, and fits of free scores to them."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from torch import nn

from rewardmodel.likelihood import likelihood_of
from rewardmodel.options import RewardOptions
from training.rankings import RaterRanking


def draw_stages(scores, deltas, generator):
    """Bands of all completions, drawn by Davidson-Luce; deltas[t - 1] belongs to a tie of t; without deltas, by Plackett-Luce."""
    left, bands = list(range(len(scores))), []
    while left:
        subsets = [subset for order in range(1, len(deltas) + 2) for subset in combinations(left, order)]
        odds = [math.log([1.0, *deltas][len(subset) - 1]) + sum(scores[index] for index in subset) / len(subset) for subset in subsets]
        odds = np.exp(odds)
        band = subsets[generator.choice(len(subsets), p=odds / odds.sum())]
        bands.append(band)
        left = [index for index in left if index not in band]
    return tuple(bands)


def draw_pair(difference, tie, generator):
    """Bands of two completions; `tie`: (name, parameter) of a model of ties, ("none", 0) for Bradley-Terry."""
    name, parameter = tie
    up, down = math.exp(difference / 2), math.exp(-difference / 2)
    if name == "rao_kupper":
        win, lose = up / (up + parameter * down), down / (down + parameter * up)
    else:
        win, lose = (x / (up + down + parameter) for x in (up, down))
    drawn = generator.random()
    return ((0,), (1,)) if drawn < win else ((1,), (0,)) if drawn < win + lose else ((0, 1),)


def fit(rankings, items, *, features=None, **options):
    """Scores of greatest likelihood, with mean 0, and the likelihood;  rankings: [(indices of items, bands among them)], all of one size.

    features (items, F): scores are linear in them, and the weights of the features (F,) come back; without, each score is free. By L-BFGS.
    """
    told = [([RaterRanking(bands)], len(indices)) for indices, bands in rankings]
    largest = max(len(band) for _, bands in rankings for band in bands)
    likelihood = likelihood_of(RewardOptions(**options), told, largest_band=largest)
    batch = likelihood.stack([likelihood.target(*one) for one in told], told[0][1], "cpu")
    places = torch.tensor([indices for indices, _ in rankings])
    weights = nn.Parameter(torch.zeros(items if features is None else features.shape[1]))
    optimiser = torch.optim.LBFGS([weights, *likelihood.parameters], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def closure():
        optimiser.zero_grad()
        loss = likelihood.losses((weights if features is None else features @ weights)[places], batch).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    found = weights.detach()
    return (found - found.mean() if features is None else found), likelihood


def standard_errors(rankings, items, likelihood, scores):
    """Of the scores, and of the learned parameters: sandwich of the mean of per-ranking gradients and the Hessian.

    The rankings are independent, each one's loss is a likelihood (up to a factor), so H^-1 G H^-1 / N is right even for the pairs of
    longer rankings, which are not independent of one another.
    """
    told = [([RaterRanking(bands)], len(indices)) for indices, bands in rankings]
    size = max(size for _, size in told)
    batch = likelihood.stack([likelihood.target(*one) for one in told], size, "cpu")
    places = torch.tensor([indices for indices, _ in rankings])
    extra = [parameter.detach().clone().reshape(-1) for parameter in likelihood.parameters]
    start = torch.cat([scores, *extra]).double()
    # The mean of all scores is not determined: scores of all but the last, against the last.
    basis = torch.zeros(len(start), len(start) - 1, dtype=torch.float64)
    keep = [index for index in range(len(start)) if index != items - 1]
    for column, row in enumerate(keep):
        basis[row, column] = 1.0
        if row < items:
            basis[:items, column] -= 1.0 / items

    def losses(free):
        full = start + basis @ free
        tuned = likelihood if not extra else with_parameters(likelihood, full[items:])
        return tuned.losses(full[:items][places], batch)

    def slopes(free):
        at = free.clone().requires_grad_()
        return torch.autograd.grad(losses(at).mean(), at)[0]

    # Central differences: nothing else asks for a second derivative of these losses.
    steps = 1e-4 * torch.eye(len(keep), dtype=torch.float64)
    with torch.no_grad():
        gradients = torch.stack([(losses(step) - losses(-step)) / 2e-4 for step in steps], 1)
    hessian = torch.stack([(slopes(step) - slopes(-step)) / 2e-4 for step in steps])
    inverse = torch.linalg.inv(hessian)
    covariance = basis @ inverse @ (gradients.T @ gradients / len(gradients)) @ inverse @ basis.T / len(gradients)
    errors = covariance.diagonal().sqrt()
    return errors[:items], errors[items:]


def with_parameters(likelihood, values):
    """The same likelihood at other tie parameters."""
    if hasattr(likelihood, "log_delta"):
        return replace(likelihood, log_delta=values)
    return replace(likelihood, model=type(likelihood.model)(values[0]))
