"""Judges of held-out pairs side by side: accuracy and log-loss of each, and the difference of two on the very same pairs.

A judge is a difference of scores, in log-odds, for each pair of completions. Intervals resample prompts; where a judge was trained with
several seeds, the seeds' sums of each prompt are averaged first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.human_pairs import MajorityPair
from rewardmodel.accuracy import clustered_interval, pair_counts
from rewardmodel.agreement import tie_counts
from rewardmodel.calibration import Pairs, cross_fitted
from rewardmodel.tie_models import Davidson, NoTies, RaoKupper, TieModel
from training.rankings import RankedPrompt

SAMPLES = 2000
MEASURES = ("majority_accuracy", "accuracy", "log_loss", "log_loss_scaled", "outcome_log_loss")


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Every pair of completions of some prompts, N of them: how many raters put the first or the second higher, or tied them."""

    pairs: list[MajorityPair]  # `better` is the first text and `worse` the second, whatever people said of them
    places: np.ndarray  # (N, 3): item, first, second
    prompts: np.ndarray  # (N,): digests
    won: np.ndarray
    lost: np.ndarray
    tied: np.ndarray

    def differences(self, scores: Sequence[Sequence[float]]) -> np.ndarray:
        """(N,) of the scores of each item's completions."""
        return np.array([scores[item][first] - scores[item][second] for item, first, second in self.places])


def verdicts(items: Sequence[RankedPrompt]) -> Verdicts:
    pairs, places, counts = [], [], []
    for number, item in enumerate(items):
        size = len(item.completions)
        wins, ties = pair_counts(item.rankings, size), tie_counts(item.rankings, size)
        for first, second in zip(*np.triu_indices(size, 1), strict=True):
            pairs.append(MajorityPair(item.digest, item.messages[-1]["content"], item.completions[first], item.completions[second]))
            places.append((number, first, second))
            counts.append((wins[first, second], wins[second, first], ties[first, second]))
    won, lost, tied = np.array(counts, dtype=np.float64).reshape(-1, 3).T
    return Verdicts(pairs, np.array(places, dtype=int).reshape(-1, 3), np.array([pair.prompt for pair in pairs]), won, lost, tied)


@dataclass(frozen=True, slots=True)
class Sums:
    """Of each prompt, C of them in one order: a measure is sum(tops) / sum(bottoms)."""

    tops: np.ndarray
    bottoms: np.ndarray

    @property
    def value(self) -> float:
        return float(self.tops.sum() / self.bottoms.sum())


@dataclass(frozen=True, slots=True)
class Figure:
    """`value` with its 95 % interval; `seeds` are the values of each seed."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]


def tie_model(ties: str, strength: float) -> TieModel:
    """What a reward model's notes say of ties (`ties`, `nu`), as probabilities of win and tie."""
    parameter = torch.tensor(strength, dtype=torch.float64)
    if ties == "rao_kupper" and strength > 1:
        return RaoKupper(parameter.log().log())
    return Davidson(parameter.log()) if ties == "davidson" and strength > 0 else NoTies()


def measure(said: Verdicts, differences: np.ndarray, model: TieModel) -> dict[str, Sums]:
    """MEASURES of one judge, by prompt. Equal scores are half right.

    majority_accuracy: of the pairs of which more than half of the raters put the same one higher;  accuracy: of single raters' pairs;
    log_loss: minus the mean log-probability of a single rater's preference, given that he did not tie, in nats;  log_loss_scaled: the same
    with sigmoid(log-odds / T), T fitted on the other half of the prompts;  outcome_log_loss: of preference or tie, where the model knows
    ties.
    """
    right = (np.sign(differences) + 1) / 2
    margins = torch.from_numpy(np.asarray(differences, dtype=np.float64))
    win, loss = model.log_win(margins).numpy(), model.log_win(-margins).numpy()
    either = np.logaddexp(win, loss)
    raters = said.won + said.lost + said.tied
    first, second = 2 * said.won > raters, 2 * said.lost > raters
    sums = {
        "majority_accuracy": (first * right + second * (1 - right), 1.0 * (first | second)),
        "accuracy": (said.won * right + said.lost * (1 - right), said.won + said.lost),
        "log_loss": (said.won * (either - win) + said.lost * (either - loss), said.won + said.lost),
    }
    if (scaled := _scaled_losses(said, win - loss)) is not None:
        sums["log_loss_scaled"] = (scaled, said.won + said.lost)
    if not isinstance(model, NoTies):
        tie = model.log_tie(margins).numpy()
        sums["outcome_log_loss"] = (-(said.won * win + said.lost * loss + said.tied * tie), raters)
    _, clusters = np.unique(said.prompts, return_inverse=True)
    return {name: Sums(np.bincount(clusters, top), np.bincount(clusters, bottom)) for name, (top, bottom) in sums.items()}


def _scaled_losses(said: Verdicts, log_odds: np.ndarray) -> np.ndarray | None:
    """(N,) at temperatures of the other half of the prompts; None where one half is empty."""
    both = Pairs(np.concatenate([log_odds, -log_odds]), np.concatenate([said.won, said.lost]), np.tile(said.prompts, 2))
    if (temperatures := cross_fitted(both)) is None:
        return None
    losses = both.weights * np.logaddexp(0.0, -both.differences / temperatures)
    return losses.reshape(2, -1).sum(0)


def figure(by_seed: Sequence[Sums]) -> Figure:
    """The mean over seeds."""
    tops, bottoms = np.mean([sums.tops for sums in by_seed], axis=0), by_seed[0].bottoms
    low, high = clustered_interval(tops, bottoms, samples=SAMPLES, seed=0)
    return Figure(float(tops.sum() / bottoms.sum()), low, high, tuple(sums.value for sums in by_seed))


def difference(ours: Sequence[Sums], others: Sequence[Sums]) -> Figure:
    """Ours less theirs, seed by seed on the same pairs.

    Raises:  ValueError if they were not measured on the same pairs, or with different numbers of seeds."""
    if any(not np.array_equal(one.bottoms, other.bottoms) for one, other in zip(ours, others, strict=True)):
        raise ValueError("two judges can only be compared on the same pairs")
    return figure([Sums(one.tops - other.tops, one.bottoms) for one, other in zip(ours, others, strict=True)])
