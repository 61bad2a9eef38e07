import math

import pytest
import torch

from rewardmodel.losses import band_matrices, centring_losses, pair_weights, ranking_losses, stack
from rewardmodel.tie_models import Davidson, NoTies, RaoKupper, tie_model
from training.rankings import RaterRanking


def said(*bands, weight=1.0):
    return RaterRanking(tuple(map(tuple, bands)), weight=weight)


def losses_of(scores, ranking, ties="davidson", **more):
    weights = pair_weights([ranking], len(scores), ties=ties)
    return float(ranking_losses(torch.tensor([scores]), weights.wins[None], weights.ties[None], **more))


def test_an_unknown_treatment_of_ties_is_refused():
    with pytest.raises(ValueError, match="unknown treatment"):
        pair_weights([said([0], [1])], 2, ties="ignore")


def test_ties_without_a_tie_parameter_are_refused():
    with pytest.raises(ValueError, match="need a model of ties"):
        losses_of([0.0, 0.0], said([0, 1]))


def test_bands_make_wins_across_and_ties_within():
    """Bands [[2], [0, 3], [1]] of five completions, one of them in no band: 2 beats 0, 3, 1; 0 and 3 beat 1; 0 and 3 are tied."""
    wins, ties = band_matrices(((2,), (0, 3), (1,)), 5)
    assert {tuple(pair) for pair in wins.nonzero().tolist()} == {(2, 0), (2, 3), (2, 1), (0, 1), (3, 1)}
    assert ties.nonzero().tolist() == [[0, 3]]


def test_a_ranking_counts_once_however_many_pairs_it_has():
    """Three raters of three completions: a strict order (3 pairs of 1/3), a tie in front (2 wins and 1 tie of 1/3), all equal (3 ties)."""
    rankings = [said([0], [1], [2]), said([0, 1], [2]), said([0, 1, 2])]
    weights = pair_weights(rankings, 3, ties="davidson")
    assert (weights.weight, weights.pairs, weights.tied) == (3.0, 5, 4)
    assert float(weights.wins.sum() + weights.ties.sum()) == pytest.approx(3.0)
    assert weights.wins[0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert weights.ties[0].tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    dropped = pair_weights(rankings, 3, ties="drop")
    assert dropped.weight == 2.0, "a ranking without a pair counts nothing"
    half = pair_weights(rankings, 3, ties="half")
    assert half.wins[1, 0] == pytest.approx(1 / 6 + 1 / 6)
    assert float(half.wins.sum()) == pytest.approx(3.0)


def test_a_weight_of_two_is_two_copies_and_of_zero_is_none():
    one, other = said([0], [1], [2]), said([2], [0, 1])
    twice = pair_weights([said([0], [1], [2], weight=2.0), other], 3, ties="davidson")
    copied = pair_weights([one, one, other], 3, ties="davidson")
    assert torch.allclose(twice.wins, copied.wins)
    assert twice.weight == copied.weight
    without = pair_weights([said([0], [1], [2], weight=0.0), other], 3, ties="davidson")
    assert torch.equal(without.wins, pair_weights([other], 3, ties="davidson").wins)


def test_bradley_terry_by_hand():
    """Scores 2, 0.5, -1 in order: -log sigmoid of 1.5, 3, 1.5 = 0.201413, 0.048587, 0.201413; the mean is 0.150471."""
    assert losses_of([2.0, 0.5, -1.0], said([0], [1], [2]), ties="drop") == pytest.approx(0.150471, abs=1e-6)


def test_davidson_by_hand():
    """d = 1, nu = 1: e^0.5 + e^-0.5 + 1 = 3.255252; P(win) = 1.648721 / 3.255252 = 0.506480; P(tie) = 0.307196; P(loss) = 0.186324."""
    model = Davidson(torch.tensor(0.0))
    assert losses_of([1.0, 0.0], said([0], [1]), model=model) == pytest.approx(-math.log(0.506480), abs=1e-5)
    assert losses_of([1.0, 0.0], said([0, 1]), model=model) == pytest.approx(-math.log(0.307196), abs=1e-5)
    assert losses_of([1.0, 0.0], said([1], [0]), model=model) == pytest.approx(-math.log(0.186324), abs=1e-5)


def test_davidson_without_ties_is_bradley_terry():
    strict = said([0], [1], [2])
    assert losses_of([2.0, 0.5, -1.0], strict, model=Davidson(torch.tensor(-60.0))) == pytest.approx(
        losses_of([2.0, 0.5, -1.0], strict, ties="drop"), abs=1e-6
    )
    assert isinstance(tie_model("davidson", pairs=10, tied=0), NoTies)


def test_rao_kupper_by_hand():
    """d = 1, theta = 2: P(win) = e / (e + 2) = 0.576117; P(loss) = 1 / (1 + 2e) = 0.155362; the rest is P(tie) = 0.268521."""
    model = RaoKupper(torch.tensor(math.log(math.log(2.0))))
    assert losses_of([1.0, 0.0], said([0], [1]), model=model) == pytest.approx(-math.log(0.576117), abs=1e-5)
    assert losses_of([1.0, 0.0], said([1], [0]), model=model) == pytest.approx(-math.log(0.155362), abs=1e-5)
    assert losses_of([1.0, 0.0], said([0, 1]), model=model) == pytest.approx(-math.log(0.268521), abs=1e-5)
    assert float(model.strength) == pytest.approx(2.0)


@pytest.mark.parametrize("model", [Davidson, RaoKupper])
@pytest.mark.parametrize("parameter", [-5.0, -0.3, 2.0])
def test_win_tie_and_loss_are_all_there_is(model, parameter):
    differences = torch.linspace(-8, 8, 33, dtype=torch.float64)
    asked = model(torch.tensor(parameter, dtype=torch.float64))
    total = asked.log_win(differences).exp() + asked.log_win(-differences).exp() + asked.log_tie(differences).exp()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-9, rtol=0)


def test_the_tie_parameter_starts_at_the_share_of_ties():
    """A quarter of the pairs tied: Davidson's nu / (2 + nu) = 1/4 gives nu = 2/3; Rao-Kupper's (t - 1) / (t + 1) = 1/4 gives 5/3."""
    assert float(tie_model("davidson", pairs=30, tied=10).strength) == pytest.approx(2 / 3)
    assert float(tie_model("rao_kupper", pairs=30, tied=10).strength) == pytest.approx(5 / 3)
    for ties in ("davidson", "rao_kupper"):
        assert float(tie_model(ties, pairs=30, tied=10).log_tie(torch.zeros(())).detach()) == pytest.approx(math.log(0.25), abs=1e-6)


def test_a_margin_is_taken_from_the_difference():
    """Scores 2, 0.5 with a margin of 1: -log sigmoid(0.5) = 0.474077."""
    wins = pair_weights([said([0], [1])], 2, ties="drop").wins[None]
    margins = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    assert float(ranking_losses(torch.tensor([[2.0, 0.5]]), wins, margins=margins)) == pytest.approx(0.474077, abs=1e-6)


def test_a_tie_pulls_scores_together_and_a_win_apart():
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    tied, strict = pair_weights([said([0, 1])], 2, ties="davidson"), pair_weights([said([0], [1])], 2, ties="davidson")
    for weights, sign in ((tied, 1), (strict, -1)):
        loss = ranking_losses(scores, weights.wins[None], weights.ties[None], model=Davidson(torch.tensor(0.0))).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        assert sign * float(gradient[0, 0]) > 0
        assert float(gradient.sum()) == pytest.approx(0.0, abs=1e-7)


def test_swapping_a_pair_is_negating_its_margin():
    assert losses_of([0.7, -0.2], said([1], [0]), ties="drop") == pytest.approx(losses_of([-0.2, 0.7], said([0], [1]), ties="drop"))


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[800.0, -800.0]], requires_grad=True)
    for ranking in (said([0], [1]), said([1], [0]), said([0, 1])):
        weights = pair_weights([ranking], 2, ties="davidson")
        loss = ranking_losses(scores, weights.wins[None], weights.ties[None], model=Davidson(torch.tensor(0.0))).sum()
        (gradient,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_rankings_of_several_sizes_share_a_batch():
    three, two = pair_weights([said([2], [0], [1])], 3, ties="drop"), pair_weights([said([1], [0])], 2, ties="drop")
    wins = stack([three.wins, two.wins], 3)
    batch = ranking_losses(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 99.0]]), wins)
    assert float(batch[0]) == pytest.approx(losses_of([0.1, 0.2, 0.3], said([2], [0], [1]), ties="drop"))
    assert float(batch[1]) == pytest.approx(losses_of([0.4, 0.5], said([1], [0]), ties="drop"))


@pytest.mark.parametrize(("centring", "with_margin"), [(0.0, False), (0.3, False), (0.0, True), (0.3, True)])
def test_two_completions_equal_trls_reward_trainer(centring, with_margin):
    """TRL's own compute_loss on given scores, with and without centring and a column of margins: loss and gradients."""
    from types import SimpleNamespace

    from trl import RewardTrainer

    torch.manual_seed(0)
    chosen, rejected = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    margin = torch.rand(16) * 2 if with_margin else torch.zeros(16)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring or None),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens")}},
        _total_train_tokens=0,
    )
    logits = torch.cat([chosen, rejected])[:, None]
    inputs = {"margin": margin} if with_margin else {}
    theirs = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=logits), inputs)
    wins = pair_weights([said([0], [1])], 2, ties="drop").wins.expand(16, 2, 2)
    scores = torch.stack([chosen, rejected], 1)
    losses = ranking_losses(scores, wins, margins=margin[:, None, None].expand(16, 2, 2)) + centring * centring_losses(scores, wins)
    ours = losses.mean()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)
    for mine, other in zip(torch.autograd.grad(ours, (chosen, rejected)), torch.autograd.grad(theirs, (chosen, rejected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=0)
