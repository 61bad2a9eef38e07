"""What raters said of one prompt's completions, as the weights that preference losses take: derived once, before training."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.losses import Compared
from alignment.options import DPOOptions
from rewardmodel.choices import Choices, band_heights, choices, stack_choices
from rewardmodel.losses import pair_weights, stack
from training.rankings import RaterRanking


@dataclass(frozen=True, slots=True)
class Layer:
    """Rankings of one prompt's K completions that share their margins. Each of them spreads its weight over its pairs (or choices).

    wins, ties, best, margins, choices: as in `Compared`, of one prompt;  strict (K, K): the preference pairs alone, for metrics.
    """

    wins: Tensor
    ties: Tensor
    strict: Tensor
    best: Tensor
    margins: Tensor
    choices: Choices | None


@dataclass(frozen=True, slots=True)
class Target:
    """All rankings of one prompt. `weight`: of those that count;  `pairs`, `tied`: preference pairs and tied pairs, over all of them."""

    layers: tuple[Layer, ...]
    weight: float
    pairs: int
    tied: int


def target(rankings: Sequence[RaterRanking], size: int, options: DPOOptions) -> Target:
    """Weights of one prompt's completions under the run's treatment of ties.

    A tie is no pair ("drop"), half a win each way ("half"), or an outcome of its own ("rao_kupper", "davidson"). Rankings without stated
    strengths are one layer; with them each has its own, because the losses are not linear in the margins.

    Args:    rankings: with the weight each one has;  size: K;  options: ties, loss, strength_margin.
    """
    stated = [one for one in rankings if options.strength_margin and any(one.strengths)]
    silent = [one for one in rankings if not (options.strength_margin and any(one.strengths))]
    said = pair_weights(rankings, size, ties=options.ties)
    layers = tuple(_layer(group, size, options) for group in (silent, *([one] for one in stated)) if group)
    return Target(layers, said.weight, said.pairs, said.tied)


def _layer(rankings: Sequence[RaterRanking], size: int, options: DPOOptions) -> Layer:
    said = pair_weights(rankings, size, ties=options.ties)
    listwise = options.loss == "plackett_luce"
    heights = torch.tensor(band_heights(rankings[0], size) if options.strength_margin else [0.0] * size)
    return Layer(
        wins=said.wins,
        ties=said.ties,
        strict=pair_weights(rankings, size, ties="drop").wins,
        best=best_weights(rankings, size),
        margins=options.strength_margin * (heights[:, None] - heights[None, :]).abs(),
        choices=choices(rankings, size, ties=options.ties, strength_margin=options.strength_margin) if listwise else None,
    )


def best_weights(rankings: Sequence[RaterRanking], size: int) -> Tensor:
    """(K,): each ranking's weight, spread evenly over its best band. A ranking of one band calls nothing better than anything else: 0."""
    best = torch.zeros(size)
    for ranking in rankings:
        if len(ranking.bands) > 1:
            best[list(ranking.bands[0])] += ranking.weight / len(ranking.bands[0])
    return best


def compare(targets: Sequence[Target], logps: Tensor, reference: Tensor, tokens: Tensor, *, shift: Tensor | float = 0.0) -> Compared:
    """The batch that `preference_losses` takes, a row for each layer, on the device of the log-probabilities (B, K)."""
    device, size = logps.device, logps.shape[1]
    layers = [layer for one in targets for layer in one.layers]
    owner = torch.tensor([place for place, one in enumerate(targets) for _ in one.layers], dtype=torch.long, device=device)
    best = torch.zeros((len(layers), size))
    for place, layer in enumerate(layers):
        best[place, : len(layer.best)] = layer.best
    asked = [layer.choices for layer in layers if layer.choices is not None]
    return Compared(
        logps=logps[owner],
        reference=reference.to(device)[owner],
        tokens=tokens.to(device)[owner],
        wins=stack([layer.wins for layer in layers], size).to(device),
        ties=stack([layer.ties for layer in layers], size).to(device),
        best=best.to(device),
        margins=stack([layer.margins for layer in layers], size).to(device),
        choices=stack_choices(asked, size).to(device) if asked else None,
        strict=stack([layer.strict for layer in layers], size).to(device),
        shift=shift,
    )
