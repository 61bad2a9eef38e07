"""Preference losses on whole rankings: sums by hand, and what must not matter."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from alignment.loss_kinds import LOSS_KINDS
from alignment.losses import Compared, preference_losses, tie_losses
from alignment.options import DPOOptions
from alignment.pair_losses import PAIR_LOSSES
from alignment.preferences import best_weights, compare, target
from alignment.transport import coupling
from training.options import OptionError
from training.rankings import RaterRanking

NAMES = sorted(LOSS_KINDS)
STEP = [name for name in NAMES if LOSS_KINDS[name].takes == "step" and name != "kto"]


def said(*bands, weight=1.0):
    return RaterRanking(tuple(map(tuple, bands)), weight=weight)


def options_of(loss, **more):
    return DPOOptions(loss=loss, **{"label_smoothing": 0.01, **more} if loss == "exo_pair" else more)


def losses_of(rankings, logps, reference, options, *, tokens=None):
    """Losses of items, each (rankings of it); logps (B, K)."""
    logps, reference = torch.as_tensor(logps), torch.as_tensor(reference)
    targets = [target(one, logps.shape[1], options) for one in rankings]
    return preference_losses(compare(targets, logps, reference, torch.full(logps.shape, 4.0) if tokens is None else tokens), options)


# Refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss": "sigmoidal"}, "Did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "has no term for flipped preferences"),
        ({"loss": "exo_pair"}, "needs label_smoothing above 0"),
        ({"loss": "apo_zero", "f_divergence": "forward_kl"}, "only reverse_kl fits"),
        ({"loss": "ipo", "strength_margin": 1.0}, "no margin"),
        ({"loss": "ipo", "length_normalised": True}, "per token by itself"),
        ({"loss": "kto", "length_normalised": True}, "KL of whole completions"),
        ({"loss": "hinge", "ties": "rao_kupper"}, "in place of loss = sigmoid"),
        ({"ties": "rao_kupper", "strength_margin": 1.0}, "no longer be a probability"),
        ({"ties": "davidson", "label_smoothing": 0.1}, "has no term for flipped preferences"),
        ({"tie_probability": 1.0}, "tie_probability"),
        ({"loss": "sft", "sft_weight": 0.5}, "leave sft_weight out"),
        ({"loss": "sft", "ties": "half"}, "ties cannot change it"),
        ({"sft_weight": -1.0}, "sft_weight must not be negative"),
        ({"simpo_gamma": 1.0}, "simpo_gamma would change nothing: it goes with loss = simpo"),
        ({"loss": "ipo", "discopop_tau": 0.1}, "discopop_tau would change nothing"),
        ({"desirable_weight": 2.0}, "desirable_weight would change nothing"),
        ({"tie_probability": 0.3}, "tie_probability would change nothing: it goes with ties = rao_kupper or davidson"),
        ({"alpha_divergence_coefficient": 0.3}, "alpha_divergence_coefficient would change nothing"),
        ({"loss": "sft", "beta": 0.3}, "beta would change nothing"),
    ],
)
def test_options_that_make_no_sense_together_are_refused_with_the_reason(options, says):
    with pytest.raises(OptionError, match=says):
        DPOOptions(**options)


@pytest.mark.parametrize("wrong", ["reference", "tokens", "wins", "ties", "best", "margins", "strict"])
def test_shapes_are_checked(wrong):
    good = {
        "logps": (2, 3),
        "reference": (2, 3),
        "tokens": (2, 3),
        "wins": (2, 3, 3),
        "ties": (2, 3, 3),
        "best": (2, 3),
        "margins": (2, 3, 3),
        "strict": (2, 3, 3),
    }
    with pytest.raises(ValueError, match="shapes do not fit"):
        Compared(**{name: torch.zeros((2, 2) if name == wrong else shape) for name, shape in good.items()})


def test_what_a_loss_asks_for_must_be_there():
    batch = Compared(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="needs `choices`"):
        preference_losses(batch, DPOOptions(loss="plackett_luce"))
    with pytest.raises(ValueError, match="needs `best`"):
        preference_losses(batch, DPOOptions(sft_weight=1.0))
    with pytest.raises(ValueError, match="unknown model of ties"):
        tie_losses(torch.zeros(1, 2), torch.zeros(1, 2, 2), None, model="half", tie_probability=0.5)
    with pytest.raises(ValueError, match="completions are tied"):
        target([said(range(11), [11])], 12, DPOOptions(loss="plackett_luce", ties="half"))


def test_the_table_names_every_loss_once():
    assert set(PAIR_LOSSES) | {"aot", "aot_unpaired", "plackett_luce", "sft"} == set(LOSS_KINDS)
    assert all(kind.source for kind in LOSS_KINDS.values())


# By hand


def test_dpo_by_hand():
    """Log-ratios 1 and -0.5, beta 0.2: margin 0.3, -log sigmoid(0.3) = 0.554355; the other way round: 0.854355; with a tenth of labels
    wrong: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355."""
    policy, reference = [[-4.0, -7.5]], [[-5.0, -7.0]]
    options = DPOOptions(beta=0.2)
    assert float(losses_of([[said([0], [1])]], policy, reference, options)) == pytest.approx(0.554355, abs=1e-6)
    assert float(losses_of([[said([1], [0])]], policy, reference, options)) == pytest.approx(0.854355, abs=1e-6)
    smoothed = DPOOptions(beta=0.2, label_smoothing=0.1)
    assert float(losses_of([[said([0], [1])]], policy, reference, smoothed)) == pytest.approx(0.584355, abs=1e-6)


def test_a_ranking_is_the_mean_of_its_pairs_and_ties_make_none():
    """Bands [[1], [0, 2]]: two pairs, (1, 0) and (1, 2); 0 and 2 are tied."""
    logps = torch.randn(1, 3)
    pairs = [-F.logsigmoid(0.1 * (logps[0, 1] - logps[0, other])) for other in (0, 2)]
    ours = losses_of([[said([1], [0, 2])]], logps, torch.zeros(1, 3), DPOOptions())
    assert float(ours) == pytest.approx(float(sum(pairs)) / 2, abs=1e-6)


def test_half_a_tie_is_half_a_win_each_way():
    """Log-ratios 1 and -0.5, beta 0.2, tied: (0.554355 + 0.854355) / 2 = 0.704355."""
    ours = losses_of([[said([0, 1])]], [[1.0, -0.5]], torch.zeros(1, 2), DPOOptions(beta=0.2, ties="half"))
    assert float(ours) == pytest.approx(0.704355, abs=1e-6)


def test_rao_kupper_by_hand():
    """nu = 3, d = 1: P(win) = e / (e + 3) = 0.475367; P(loss) = 1 / (1 + 3e) = 0.109232; P(tie) = 0.415401, so they add up to 1."""
    options = DPOOptions(beta=1.0, ties="rao_kupper")
    for ranking, probability in ((said([0], [1]), 0.475367), (said([1], [0]), 0.109232), (said([0, 1]), 0.415401)):
        assert float(losses_of([[ranking]], [[1.0, 0.0]], torch.zeros(1, 2), options)) == pytest.approx(-math.log(probability), abs=1e-5)


def test_davidson_by_hand():
    """nu = 1 of the paper, d = 1: 1 + e^-1 + 2 e^-0.5 = 2.580941; P(win) = 0.387455; P(tie) = 0.470008; P(loss) = 0.142537."""
    options = DPOOptions(beta=1.0, ties="davidson")
    for ranking, probability in ((said([0], [1]), 0.387455), (said([1], [0]), 0.142537), (said([0, 1]), 0.470008)):
        assert float(losses_of([[ranking]], [[1.0, 0.0]], torch.zeros(1, 2), options)) == pytest.approx(-math.log(probability), abs=1e-5)


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_equals_tie_with_the_probability_asked_for_and_outcomes_add_up_to_one(model, share):
    win, tie = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    win[0, 0, 1] = tie[0, 0, 1] = 1.0
    for delta in (0.0, 0.7, -3.0):
        rewards = torch.tensor([[delta, 0.0]])
        outcomes = [
            math.exp(-float(tie_losses(rewards, *weights, model=model, tie_probability=share)))
            for weights in ((win, None), (win.mT, None), (torch.zeros(1, 2, 2), tie))
        ]
        assert sum(outcomes) == pytest.approx(1.0, abs=1e-5)
        if not delta:
            assert outcomes[2] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("model", ["rao_kupper", "davidson"])
def test_a_tie_pulls_together_and_a_win_pushes_apart(model):
    for ranking, sign in ((said([0, 1]), 1), (said([0], [1]), -1)):
        logps = torch.tensor([[1.0, 0.0]], requires_grad=True)
        losses_of([[ranking]], logps, torch.zeros(1, 2), DPOOptions(ties=model)).sum().backward()
        assert sign * float(logps.grad[0, 0]) > 0


def test_plackett_luce_by_hand():
    """Rewards 2, 0.5, -1 in order. First of three: 2 - log(e^2 + e^0.5 + e^-1) = -0.241311; second of two: -0.201413; mean 0.221362."""
    ours = losses_of([[said([0], [1], [2])]], [[2.0, 0.5, -1.0]], torch.zeros(1, 3), DPOOptions(loss="plackett_luce", beta=1.0))
    assert float(ours) == pytest.approx(0.221362, abs=1e-6)


def test_plackett_luce_of_half_ties_is_the_mean_over_all_orders_of_the_band():
    """One completion above a band of three: the mean over six strict orders, each of three choices."""
    logps, options = torch.randn(1, 4), DPOOptions(loss="plackett_luce", ties="half", beta=0.5)
    strict = [losses_of([[said([0], *([i] for i in order))]], logps, torch.zeros(1, 4), options) for order in permutations((1, 2, 3))]
    ours = losses_of([[said([0], [1, 2, 3])]], logps, torch.zeros(1, 4), options)
    assert float(ours) == pytest.approx(float(sum(strict)) / 6, abs=1e-6)


def test_plackett_luce_without_half_ties_compares_across_bands_only():
    """Bands [[0, 1], [2]]: 0 against 2 and 1 against 2, one choice each; nothing between 0 and 1."""
    logps = torch.tensor([[0.3, -0.4, 0.1]])
    expected = -(F.logsigmoid(logps[0, 0] - logps[0, 2]) + F.logsigmoid(logps[0, 1] - logps[0, 2])) / 2
    ours = losses_of([[said([0, 1], [2])]], logps, torch.zeros(1, 3), DPOOptions(loss="plackett_luce", beta=1.0))
    assert float(ours) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("ranking", [said([0], [1]), said([1], [0]), said([0, 1])])
def test_plackett_luce_of_two_completions_is_dpo(ties, ranking):
    logps, reference = torch.randn(1, 2), torch.randn(1, 2)
    one, other = (losses_of([[ranking]], logps, reference, DPOOptions(loss=loss, ties=ties)) for loss in ("plackett_luce", "sigmoid"))
    torch.testing.assert_close(one, other)


def test_the_nll_term_by_hand():
    """Best band of 4 and 2 tokens with log-probabilities -8 and -6: (8/4 + 6/2) / 2 = 2.5 nats per token; a tenth of it added to ln 2."""
    tokens = torch.tensor([[4.0, 2.0, 3.0]])
    logps = torch.tensor([[-8.0, -6.0, -9.0]])
    ranking = [[said([0, 1], [2])]]
    assert float(losses_of(ranking, logps, logps, DPOOptions(loss="sft"), tokens=tokens)) == pytest.approx(2.5)
    ours = losses_of(ranking, logps, logps, DPOOptions(sft_weight=0.1), tokens=tokens)
    assert float(ours) == pytest.approx(math.log(2) + 0.25, abs=1e-6)


def test_a_ranking_of_one_band_has_no_best():
    assert best_weights([said([0, 1]), said([1], [0], weight=3.0)], 2).tolist() == [0.0, 3.0]


def test_coupling_by_hand():
    """Masses 1, 1 at 3 and 1 against 0.5, 1.5 at 9 and 7: in order, 1 meets 7; of 3, half meets 7 and half meets 9."""
    one, other, mass = coupling(torch.tensor([3.0, 1.0]), torch.tensor([9.0, 7.0]), torch.ones(2), torch.tensor([0.5, 1.5]))
    met = {}
    for place, other_place, weight in zip(one.tolist(), other.tolist(), mass.tolist(), strict=True):
        met[place, other_place] = met.get((place, other_place), 0.0) + weight
    assert {pair: weight for pair, weight in met.items() if weight} == pytest.approx({(1, 1): 1.0, (0, 1): 0.5, (0, 0): 0.5})


# What must not matter, and what must


@pytest.mark.parametrize("loss", [name for name in NAMES if name not in STEP])
def test_rankings_do_not_see_each_other(loss):
    """Of several sizes, in one batch or alone: the same losses. The numbers of places that no completion has are never looked at."""
    options = options_of(loss)
    logps, reference = 3 * torch.randn(2, 3) - 9, 3 * torch.randn(2, 3) - 9
    logps[1, 2], reference[1, 2] = 1e9, -1e9
    together = losses_of([[said([2], [0], [1])], [said([1], [0])]], logps, reference, options)
    assert float(together[0]) == pytest.approx(float(losses_of([[said([2], [0], [1])]], logps[:1], reference[:1], options)), rel=1e-6)
    assert float(together[1]) == pytest.approx(float(losses_of([[said([1], [0])]], logps[1:, :2], reference[1:, :2], options)), rel=1e-6)
    logps.requires_grad_(True)
    losses_of([[said([2], [0], [1])], [said([1], [0])]], logps, reference, options).sum().backward()
    assert torch.isfinite(logps.grad).all()
    assert float(logps.grad[1, 2]) == 0.0


@pytest.mark.parametrize("loss", NAMES)
def test_a_weight_of_two_is_two_raters_who_agree(loss):
    options, logps, reference = options_of(loss), torch.randn(1, 3) - 9, torch.randn(1, 3) - 9
    twice = losses_of([[said([2], [0, 1], weight=2.0)]], logps, reference, options)
    torch.testing.assert_close(twice, losses_of([[said([2], [0, 1]), said([2], [0, 1])]], logps, reference, options))
    torch.testing.assert_close(twice, 2 * losses_of([[said([2], [0, 1])]], logps, reference, options))


@pytest.mark.parametrize("loss", NAMES)
def test_every_loss_prefers_what_raters_prefer(loss):
    """One step down the gradient from where policy and reference agree: the chosen one gains on the rejected one.

    Discopop is no monotone loss: it has a hill at 0, so there it is looked at with the chosen one 5 nats ahead.
    """
    reference = torch.tensor([[-8.0, -8.0]])
    logps = (reference + torch.tensor([[0.0, 5.0 if loss == "discopop" else 0.0]])).requires_grad_(True)
    losses_of([[said([1], [0])]], logps, reference, options_of(loss)).sum().backward()
    assert float(logps.grad[0, 1]) < float(logps.grad[0, 0])


@pytest.mark.parametrize("loss", [name for name in NAMES if name not in STEP and name != "kto"])
def test_extreme_log_probabilities_stay_finite(loss):
    for far in (300.0, 30.0):
        logps = torch.tensor([[-far, -0.001], [-0.001, -far]], requires_grad=True)
        losses = losses_of([[said([0], [1])], [said([0], [1])]], logps, torch.full((2, 2), -far / 2), options_of(loss))
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(logps.grad).all()


def test_kto_gives_no_gradient_to_what_is_above_as_many_as_it_is_below():
    logps = torch.randn(1, 3, requires_grad=True)
    losses_of([[said([0], [1], [2])]], logps, torch.zeros(1, 3), DPOOptions(loss="kto")).sum().backward()
    assert float(logps.grad[0, 1]) == pytest.approx(0.0, abs=1e-7)
    assert float(logps.grad[0, 0]) < 0 < float(logps.grad[0, 2])


@pytest.mark.parametrize("loss", STEP)
def test_transport_over_equal_pairs_is_a_sort(loss):
    """Eight strict pairs of equal weight: the n-th smallest against the n-th smallest, as the paper has it."""
    logps, reference = torch.randn(8, 2), torch.randn(8, 2)
    ours = losses_of([[said([0], [1])]] * 8, logps, reference, DPOOptions(loss=loss)).sum()
    if loss == "aot":
        above, below = (logps[:, 0] - logps[:, 1]), (reference[:, 0] - reference[:, 1])
    else:
        above, below = (logps - reference).unbind(1)
    assert float(ours) == pytest.approx(float(-F.logsigmoid(0.1 * (above.sort().values - below.sort().values)).sum()), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_every_divergence_is_the_log_ratio_near_the_reference(divergence):
    logps = torch.tensor([[1e-3, -1e-3]])
    one, other = (
        losses_of([[said([0], [1])]], logps, torch.zeros(1, 2), DPOOptions(f_divergence=kind)) for kind in (divergence, "reverse_kl")
    )
    scale = 0.5 if divergence == "js_divergence" else 1.0  # its second derivative at 1 is 1/2
    assert float(one) - math.log(2) == pytest.approx(scale * (float(other) - math.log(2)), abs=2e-7)


# Strengths


def ranked_by(strengths, *bands, weight=1.0):
    return RaterRanking(tuple(map(tuple, bands)), weight=weight, strengths=tuple(strengths))


@pytest.mark.parametrize("loss", [name for name in NAMES if LOSS_KINDS[name].margin])
def test_a_stated_strength_is_taken_off_inside(loss):
    """Margin 0.5 * 2 = 1: the loss of a reward difference of 3 is that of 2 without a margin."""
    base = {"loss": loss, "beta": 1.0, "sft_weight": 0.0}
    scale = 4.0 if LOSS_KINDS[loss].per_token else 1.0
    ahead = torch.tensor([[3.0, 0.0]]) * scale
    with_margin = losses_of([[ranked_by((2.0,), [0], [1])]], ahead, torch.zeros(1, 2), DPOOptions(strength_margin=0.5, **base))
    without = losses_of([[said([0], [1])]], ahead * 2 / 3, torch.zeros(1, 2), DPOOptions(**base))
    torch.testing.assert_close(with_margin, without)


def test_strengths_add_up_between_bands_and_each_rater_has_his_own_margins():
    """Margins 1 between 2 and 0, 3 between 0 and 1, hence 4 between 2 and 1; a second rater states 2 between 2 and 1; a third nothing."""
    options = DPOOptions(beta=1.0, strength_margin=1.0)
    one, two, three = ranked_by((1.0, 3.0), [2], [0], [1]), ranked_by((2.0,), [2], [1]), said([1], [0], weight=2.0)
    logps, reference = torch.tensor([[0.3, -0.4, 2.0]]), torch.zeros(1, 3)
    by_pair = [0.3 - -0.4 - 3, 2.0 - 0.3 - 1, 2.0 - -0.4 - 4]
    expected = -F.logsigmoid(torch.tensor(by_pair)).mean() - F.logsigmoid(torch.tensor(2.4 - 2)) - 2 * F.logsigmoid(torch.tensor(-0.7))
    assert float(losses_of([[one, two, three]], logps, reference, options).sum()) == pytest.approx(float(expected), abs=1e-5)
    assert target([one, two, three], 3, options).weight == 4.0
    assert len(target([one, two, three], 3, DPOOptions()).layers) == 1, "without a margin they share one layer"
