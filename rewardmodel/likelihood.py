"""The likelihood that a reward model maximises: rankings become targets once, before training; scores of a batch become losses.

Smoothing: with probability `smoothing` the rater held the list upside down. The loss is that of the ranking and that of its reverse
(the same ties, the same strengths), in these shares; for two completions, the smoothed loss of Mitchell 2023 (cDPO).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from rewardmodel.choices import Choices, band_heights, choice_losses, choices, stack_choices, start_of_log_delta
from rewardmodel.losses import PairWeights, centring_losses, pair_weights, ranking_losses, stack
from rewardmodel.options import RewardOptions
from rewardmodel.tie_models import NoTies, TieModel, tie_model
from training.rankings import RaterRanking


@dataclass(frozen=True, slots=True)
class Reading:
    """How rankings are read: as they are on held-out ones, with smoothing and margins in training."""

    ties: str
    smoothing: float = 0.0
    strength_margin: float = 0.0  # score units per unit of stated strength


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of pairs (K, K) that share their margins."""

    wins: Tensor
    ties: Tensor
    margins: Tensor


@dataclass(frozen=True, slots=True)
class Target:
    """All rankings of one prompt's K completions. `pairs`: as they are said, for metrics and centring; `outcomes`: what the loss takes."""

    pairs: PairWeights
    outcomes: tuple[Layer, ...] | Choices


@dataclass(frozen=True, slots=True)
class Batch:
    """Targets of B prompts, on one device. `wins`, `ties` (B, K, K): of `Target.pairs`; `outcomes`: as `Likelihood.stack` makes it."""

    wins: Tensor
    ties: Tensor
    outcomes: tuple[Tensor, Layer] | Choices


class Likelihood(Protocol):
    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned beside the scores."""

    @property
    def tie_strength(self) -> Tensor:
        """Scalar: nu of Davidson, delta of two tied of Davidson-Luce, theta of Rao-Kupper; 0: no tie is possible."""

    def log_odds(self, margins: Tensor) -> Tensor:
        """Log-odds of i before j, if they are not tied, elementwise, of s_i - s_j."""

    def as_said(self) -> "Likelihood":
        """The same parameters, without smoothing and margins: to judge held-out rankings by."""

    def target(self, rankings: Sequence[RaterRanking], size: int) -> Target:
        """Once for each prompt."""

    def stack(self, targets: Sequence[Target], size: int, device: torch.device | str) -> Batch:
        """Targets of up to K = size completions."""

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """scores (B, K) float32 -> sums (B,) of weighted losses: minus the log-likelihood."""


@dataclass(frozen=True, slots=True)
class AllPairs:
    """Every pair of a ranking: Bradley-Terry, with a model of ties or without. A ranking is the mean over its pairs."""

    model: TieModel
    reading: Reading

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self.model.parameters

    @property
    def tie_strength(self) -> Tensor:
        return self.model.strength

    def log_odds(self, margins: Tensor) -> Tensor:
        return self.model.log_win(margins) - self.model.log_win(-margins)

    def as_said(self) -> "AllPairs":
        return replace(self, reading=Reading(self.reading.ties))

    def target(self, rankings: Sequence[RaterRanking], size: int) -> Target:
        reading = self.reading
        stated = [ranking for ranking in rankings if reading.strength_margin and any(ranking.strengths)]
        silent = [ranking for ranking in rankings if ranking not in stated]
        layers = []
        # Raters who state different strengths cannot share margins: the loss is not linear in them.
        for group in [silent, *([ranking] for ranking in stated)]:
            said = pair_weights(group, size, ties=reading.ties)
            if said.weight:
                wins = (1 - reading.smoothing) * said.wins + reading.smoothing * said.wins.T
                heights = torch.tensor(band_heights(group[0], size)) if group is not silent else torch.zeros(size)
                layers.append(Layer(wins, said.ties, reading.strength_margin * (heights[:, None] - heights[None, :]).abs()))
        return Target(pair_weights(rankings, size, ties=reading.ties), tuple(layers))

    def stack(self, targets: Sequence[Target], size: int, device: torch.device | str) -> Batch:
        layers: list[Layer] = []
        owner: list[int] = []
        for place, target in enumerate(targets):
            assert isinstance(target.outcomes, tuple)
            layers += target.outcomes
            owner += [place] * len(target.outcomes)
        wins, ties, margins = (stack([getattr(layer, name) for layer in layers], size).to(device) for name in ("wins", "ties", "margins"))
        return Batch(*_pairs(targets, size, device), (torch.tensor(owner, dtype=torch.long, device=device), Layer(wins, ties, margins)))

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch.outcomes, tuple)
        owner, layer = batch.outcomes
        ties = None if isinstance(self.model, NoTies) else layer.ties
        losses = ranking_losses(scores[owner], layer.wins, ties, model=self.model, margins=layer.margins)
        return torch.zeros_like(scores[:, 0]).index_add(0, owner, losses)


@dataclass(frozen=True, slots=True)
class BestOfTheRest:
    """Plackett-Luce: a ranking is the choice of the best, then of the best of the rest. Bands tie as `choices` says."""

    log_delta: Tensor | None  # (D - 1,): Davidson-Luce; None: no tie is possible
    reading: Reading

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.log_delta] if isinstance(self.log_delta, nn.Parameter) else []

    @property
    def tie_strength(self) -> Tensor:
        return torch.zeros(()) if self.log_delta is None else self.log_delta[0].detach().exp()

    def log_odds(self, margins: Tensor) -> Tensor:
        return margins

    def as_said(self) -> "BestOfTheRest":
        return replace(self, reading=Reading(self.reading.ties))

    def target(self, rankings: Sequence[RaterRanking], size: int) -> Target:
        reading = self.reading
        said = list(rankings)
        if reading.smoothing:
            said = [replace(ranking, weight=(1 - reading.smoothing) * ranking.weight) for ranking in rankings]
            said += [replace(upside_down(ranking), weight=reading.smoothing * ranking.weight) for ranking in rankings]
        asked = choices(said, size, ties=reading.ties, strength_margin=reading.strength_margin)
        largest = 1 if self.log_delta is None else 1 + len(self.log_delta)
        if len(asked.orders) and int(asked.orders.max()) > largest:
            raise ValueError(f"a tie of {int(asked.orders.max())} completions, where the largest foreseen was {largest}")
        return Target(pair_weights(rankings, size, ties=reading.ties), asked)

    def stack(self, targets: Sequence[Target], size: int, device: torch.device | str) -> Batch:
        parts = [target.outcomes for target in targets if isinstance(target.outcomes, Choices)]
        return Batch(*_pairs(targets, size, device), stack_choices(parts, size).to(device))

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch.outcomes, Choices)
        return choice_losses(scores, batch.outcomes, self.log_delta)


def likelihood_of(
    options: RewardOptions, rankings: Iterable[tuple[Sequence[RaterRanking], int]], *, largest_band: int, device: torch.device | str = "cpu"
) -> Likelihood:
    """The likelihood that the options name; its tie parameters start at the shares of ties among the training rankings.

    Args:    rankings: of each training prompt, with the number of its completions;  largest_band: of all rankings, held-out ones too.
             Where no training ranking ties anything, ties are not modelled, and held-out ones are left out.
    """
    items = list(rankings)
    tied, pairs = 0.0, 0.0
    for said, _ in items:
        for ranking in said:
            sizes = [len(band) for band in ranking.bands]
            ties = sum(size * (size - 1) // 2 for size in sizes)
            tied += ranking.weight * ties
            pairs += ranking.weight * (sum(sizes) * (sum(sizes) - 1) // 2 - ties)
    as_outcome = options.ties in ("davidson", "rao_kupper")
    reading = Reading("drop" if as_outcome and not tied else options.ties, options.label_smoothing, options.strength_margin)
    if options.loss == "bradley_terry":
        return AllPairs(tie_model(reading.ties, pairs=pairs, tied=tied, device=device), reading)
    if reading.ties != "davidson":
        return BestOfTheRest(None, reading)
    asked = [choices(said, size, ties="davidson") for said, size in items]
    return BestOfTheRest(nn.Parameter(torch.tensor(start_of_log_delta(asked, largest_band), device=device)), reading)


def upside_down(ranking: RaterRanking) -> RaterRanking:
    return replace(ranking, bands=ranking.bands[::-1], strengths=ranking.strengths[::-1])


def training_losses(likelihood: Likelihood, scores: Tensor, batch: Batch, *, centring: float) -> Tensor:
    """(B,): minus the log-likelihood, and the weight `centring` of what keeps scores near 0."""
    losses = likelihood.losses(scores, batch)
    return losses + centring * centring_losses(scores, batch.wins + batch.ties) if centring else losses


def _pairs(targets: Sequence[Target], size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return (
        stack([target.pairs.wins for target in targets], size).to(device),
        stack([target.pairs.ties for target in targets], size).to(device),
    )
