import math
from dataclasses import replace
from itertools import combinations, permutations

import pytest
import torch

from rewardmodel.choices import choice_losses, choices, log_symmetric_sum, stack_choices
from rewardmodel.likelihood import likelihood_of, training_losses, upside_down
from rewardmodel.options import RewardOptions
from training.errors import InputError
from training.rankings import RaterRanking

KINDS = [(loss, ties) for loss in ("bradley_terry", "plackett_luce") for ties in ("davidson", "rao_kupper", "half", "drop")]
KINDS.remove(("plackett_luce", "rao_kupper"))
every_kind = pytest.mark.parametrize(("loss", "ties"), KINDS)


def said(*bands, weight=1.0, strengths=()):
    return RaterRanking(tuple(map(tuple, bands)), weight=weight, strengths=strengths)


RANKINGS = [
    said([2], [0, 3], [1], strengths=(1.0, 3.0)),
    said([0], [1], [2], [3]),
    said([3, 1, 2], [0], strengths=(2.0,)),
    said([0, 1, 2, 3]),
]


def taught(rankings, scores, *, start=RANKINGS, centring=0.0, **options):
    """Loss, total weight, and gradients of scores and tie parameters. `start`: what tie parameters are started from."""
    options = RewardOptions(**options)
    likelihood = likelihood_of(options, [(start, 4)], largest_band=4)
    target = likelihood.target(rankings, len(scores))
    points = torch.tensor([scores], requires_grad=True)
    loss = training_losses(likelihood, points, likelihood.stack([target], len(scores), "cpu"), centring=centring).sum()
    return float(loss.detach()), target.pairs.weight, torch.autograd.grad(loss, [points, *likelihood.parameters], allow_unused=True)


def same(one, other):
    assert one[:2] == pytest.approx(other[:2], abs=1e-6)
    for mine, theirs in zip(one[2], other[2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


SCORES = [0.3, -1.2, 0.9, 0.1]


def test_rao_kupper_under_plackett_luce_is_refused():
    with pytest.raises(InputError, match="rao_kupper is a model of pairs"):
        RewardOptions(loss="plackett_luce", ties="rao_kupper")


@pytest.mark.parametrize("options", [{"label_smoothing": 0.5}, {"label_smoothing": -0.1}, {"strength_margin": -1.0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(InputError):
        RewardOptions(**options)


def test_a_band_too_long_for_all_its_orders_is_refused():
    with pytest.raises(InputError, match="11 completions are tied"):
        choices([said(range(11))], 11, ties="half")


def test_a_tie_larger_than_foreseen_is_refused():
    likelihood = likelihood_of(RewardOptions(loss="plackett_luce"), [([said([0, 1], [2])], 3)], largest_band=2)
    with pytest.raises(ValueError, match="tie of 3"):
        likelihood.target([said([0, 1, 2])], 3)


@every_kind
@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.2, "strength_margin": 0.5, "centring": 0.1}])
def test_a_weight_of_two_is_two_copies_and_of_zero_is_none(loss, ties, more):
    """Also when tie parameters are started from those very rankings."""
    options = {"loss": loss, "ties": ties, **more}
    for place, ranking in enumerate(RANKINGS):
        twice = [replace(one, weight=2.0) if at == place else one for at, one in enumerate(RANKINGS)]
        same(taught(twice, SCORES, start=twice, **options), taught([*RANKINGS, ranking], SCORES, start=[*RANKINGS, ranking], **options))
        none = [replace(one, weight=0.0) if at == place else one for at, one in enumerate(RANKINGS)]
        without = [one for at, one in enumerate(RANKINGS) if at != place]
        same(taught(none, SCORES, start=none, **options), taught(without, SCORES, start=without, **options))


@every_kind
def test_only_differences_of_scores_matter(loss, ties):
    options = {"loss": loss, "ties": ties, "label_smoothing": 0.1, "strength_margin": 0.5}
    one, moved = taught(RANKINGS, SCORES, **options), taught(RANKINGS, [score + 3.0 for score in SCORES], **options)
    assert one[0] == pytest.approx(moved[0], abs=1e-5)
    assert float(one[2][0].sum()) == pytest.approx(0.0, abs=1e-5)


@every_kind
def test_the_names_of_completions_do_not_matter(loss, ties):
    order = [2, 0, 3, 1]  # completion k is now called order[k]
    renamed = [replace(one, bands=tuple(tuple(order[index] for index in band) for band in one.bands)) for one in RANKINGS]
    moved = [0.0] * 4
    for index, score in enumerate(SCORES):
        moved[order[index]] = score
    options = {"loss": loss, "ties": ties, "label_smoothing": 0.1, "strength_margin": 0.5}
    assert taught(RANKINGS, SCORES, **options)[0] == pytest.approx(taught(renamed, moved, **options)[0], abs=1e-5)


@every_kind
def test_smoothing_is_a_mixture_of_the_ranking_and_its_reverse(loss, ties):
    options = {"loss": loss, "ties": ties, "strength_margin": 0.5}
    for ranking in RANKINGS:
        smoothed, _, _ = taught([ranking], SCORES, label_smoothing=0.2, **options)
        plain, _, _ = taught([ranking], SCORES, **options)
        reverse, _, _ = taught([upside_down(ranking)], SCORES, **options)
        assert smoothed == pytest.approx(0.8 * plain + 0.2 * reverse, abs=1e-5)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_smoothing_of_two_completions_by_hand(loss):
    """Scores 1, 0, smoothing 0.1: 0.9 x 0.313262 + 0.1 x 1.313262 = 0.413262."""
    assert taught([said([0], [1])], [1.0, 0.0], loss=loss, ties="drop", label_smoothing=0.1)[0] == pytest.approx(0.413262, abs=1e-6)


@pytest.mark.parametrize("loss", ["bradley_terry", "plackett_luce"])
def test_strengths_add_up_over_the_bands_between(loss):
    """Scores 3, 1, 0; strengths 1 and 2, 0.5 score units each: margins 0.5 (0, 1), 1 (1, 2), 1.5 (0, 2).

    Pairs: differences less margins 1.5, 0, 1.5: (0.201413 + 0.693147 + 0.201413) / 3 = 0.365324.
    Choices: log(1 + e^-1.5 + e^-1.5) = 0.368984, log(1 + e^0) = 0.693147; mean 0.531066."""
    loss_of = taught([said([0], [1], [2], strengths=(1.0, 2.0))], [3.0, 1.0, 0.0], loss=loss, ties="drop", strength_margin=0.5)[0]
    assert loss_of == pytest.approx(0.365324 if loss == "bradley_terry" else 0.531066, abs=1e-5)


@every_kind
def test_raters_of_different_strengths_add_up(loss, ties):
    options = {"loss": loss, "ties": ties, "strength_margin": 0.7}
    apart = sum(taught([ranking], SCORES, **options)[0] for ranking in RANKINGS)
    assert taught(RANKINGS, SCORES, **options)[0] == pytest.approx(apart, abs=1e-5)


@every_kind
def test_rankings_of_several_sizes_share_a_batch(loss, ties):
    likelihood = likelihood_of(RewardOptions(loss=loss, ties=ties, strength_margin=0.5), [(RANKINGS, 4)], largest_band=4)
    small = [said([1], [0], strengths=(2.0,)), said([0, 1])]
    scores = torch.tensor([SCORES, [0.4, 0.5, 99.0, -99.0]])
    targets = [likelihood.target(RANKINGS, 4), likelihood.target(small, 2)]
    both = likelihood.losses(scores, likelihood.stack(targets, 4, "cpu"))
    for place, size in enumerate((4, 2)):
        alone = likelihood.losses(scores[place : place + 1, :size], likelihood.stack(targets[place : place + 1], size, "cpu"))
        torch.testing.assert_close(both[place], alone[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("ties", ["davidson", "half", "drop"])
def test_two_completions_are_bradley_terry(ties):
    """Davidson-Luce of two is Davidson: with starts from the same counts, less the half choice that Davidson-Luce adds."""
    rankings = [said([0], [1]), said([1], [0], weight=0.5), said([0, 1], weight=2.0), said([0], [1], strengths=(2.0,))]
    results = []
    for loss in ("bradley_terry", "plackett_luce"):
        likelihood = likelihood_of(RewardOptions(loss=loss, ties=ties, strength_margin=0.5), [(rankings, 2)], largest_band=2)
        for parameter in likelihood.parameters:
            parameter.data.fill_(0.4)
        scores = torch.tensor([[0.7, -0.2]], requires_grad=True)
        loss_of = likelihood.losses(scores, likelihood.stack([likelihood.target(rankings, 2)], 2, "cpu")).sum()
        results.append((loss_of.detach(), *(part.sum() if part.ndim == 0 else part for part in torch.autograd.grad(loss_of, scores))))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)


def test_plackett_luce_by_hand():
    """Scores 2, 0.5, -1 in order: log(1 + e^-1.5 + e^-3) = 0.241313; log(1 + e^-1.5) = 0.201413; the mean is 0.221363."""
    assert taught([said([0], [1], [2])], [2.0, 0.5, -1.0], loss="plackett_luce", ties="drop")[0] == pytest.approx(0.221363, abs=1e-6)


def test_dropped_ties_are_chosen_before_worse_ones_only():
    """Bands [0, 1], [2], scores 2, 0.5, -1: 0 before 2: log(1 + e^-3) = 0.048587; 1 before 2: 0.201413; the mean is 0.125."""
    assert taught([said([0, 1], [2])], [2.0, 0.5, -1.0], loss="plackett_luce", ties="drop")[0] == pytest.approx(0.125, abs=1e-6)


def test_half_ties_are_the_mean_over_all_orders():
    """Bands [0, 1, 2], [3]: the mean of the six strict rankings."""
    scores = [0.3, -1.2, 0.9, 0.1]
    orders = [taught([said(*([i] for i in order), [3])], scores, loss="plackett_luce", ties="drop")[0] for order in permutations(range(3))]
    assert taught([said([0, 1, 2], [3])], scores, loss="plackett_luce", ties="half")[0] == pytest.approx(sum(orders) / 6, abs=1e-6)


def test_davidson_luce_by_hand():
    """Scores log 4, 0, 0, delta_2 = 0.5, delta_3 = 0.25. Of three: singles 4 + 1 + 1; pairs 0.5 (2 + 2 + 1); all 0.25 x 4^(1/3) = 0.396850;
    in all 8.896850. Bands [0, 1], [2]: 0.5 x 2 / 8.896850, and 2 alone is certain; a ranking of three has weight 1/2 a choice.
    Bands [1], [0, 2]: 1 / 8.896850, then of two 0.5 x 2 / (4 + 1 + 0.5 x 2) = 1/6. All tied: 0.396850 / 8.896850."""
    delta, scores = torch.tensor([0.5, 0.25]).log(), torch.tensor([[math.log(4.0), 0.0, 0.0]])
    for bands, wanted in (
        (said([0, 1], [2]), math.log(8.896850)),
        (said([1], [0, 2]), math.log(8.896850) + math.log(6)),
        (said([0, 1, 2]), -math.log(0.396850 / 8.896850)),
    ):
        asked = stack_choices([choices([bands], 3, ties="davidson")], 3)
        assert float(choice_losses(scores, asked, delta)) == pytest.approx(wanted / 2, abs=1e-5)


def test_all_outcomes_of_davidson_luce_are_all_there_is():
    """Every banding of four completions: 75 of them."""

    def bandings(left):
        if not left:
            yield ()
        for size in range(1, len(left) + 1):
            for band in combinations(left, size):
                for rest in bandings([index for index in left if index not in band]):
                    yield (band, *rest)

    every = list(bandings([0, 1, 2, 3]))
    assert len(every) == 75
    parts = [choices([RaterRanking(bands, weight=3.0)], 4, ties="davidson") for bands in every]  # three choices of weight 1
    losses = choice_losses(torch.tensor([SCORES]).expand(75, 4), stack_choices(parts, 4), torch.tensor([0.3, -0.5, 0.1]))
    assert float((-losses).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_symmetric_sum_is_the_sum_over_subsets():
    logs = torch.tensor([0.3, -2.0, 1.1, -1e30, 0.0], requires_grad=True)
    for order in (1, 2, 3, 4, 5):
        direct = sum(math.exp(sum(logs[list(subset)].tolist())) for subset in combinations([0, 1, 2, 4], order))
        assert float(log_symmetric_sum(logs, order).detach().exp()) == pytest.approx(direct, rel=1e-5)
        (gradient,) = torch.autograd.grad(log_symmetric_sum(logs, order), logs)
        assert torch.isfinite(gradient).all()


@every_kind
def test_extreme_scores_stay_finite(loss, ties):
    value, _, gradients = taught(RANKINGS, [800.0, -800.0, 0.0, 400.0], loss=loss, ties=ties)
    assert math.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_without_ties_in_training_held_out_ties_are_left_out():
    for loss in ("bradley_terry", "plackett_luce"):
        likelihood = likelihood_of(RewardOptions(loss=loss), [([said([0], [1])], 2)], largest_band=2)
        assert likelihood.parameters == []
        assert likelihood.as_said().target([said([0, 1])], 2).pairs.weight == 0
