"""What members say together: sums by hand, and the invariants of pessimism and of disagreement."""

import numpy as np
import pytest
import torch

from rewardmodel.ensemble import (
    bootstrap_weights,
    disagreement,
    mean_disagreement,
    member_losses,
    most_disputed,
    spread_report,
    views,
)


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="worst"):
        views(torch.zeros(2, 3)).of("median")


def test_mean_spread_and_worst_are_the_sums_by_hand():
    """Members say 1, 2 and 6: mean 3, squared distances 4 + 1 + 9 = 14, spread sqrt(14 / 3), worst 1."""
    found = views(torch.tensor([[1.0, 2.0, 6.0]]))
    assert found.mean.tolist() == [3.0]
    assert found.worst.tolist() == [1.0]
    assert found.spread.tolist() == pytest.approx([(14 / 3) ** 0.5])
    assert found.of("mean_minus_spread", 0.5).tolist() == pytest.approx([3 - 0.5 * (14 / 3) ** 0.5])


def test_pessimism_is_never_above_the_mean_and_one_member_has_none():
    scores = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    found = views(scores)
    for view in ("worst", "mean_minus_spread"):
        assert (found.of(view) <= found.mean).all()
        assert (found.of(view) < found.mean).any()
    alone = views(scores[:, :1])
    assert torch.equal(alone.mean, scores[:, 0])
    for view in ("worst", "mean_minus_spread"):
        assert torch.equal(alone.of(view), scores[:, 0])


def test_of_two_members_the_worst_is_the_mean_minus_the_spread():
    found = views(torch.randn(20, 2, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(found.worst, found.of("mean_minus_spread"))


def test_a_prompts_weights_depend_on_seed_member_and_prompt_alone():
    prompts = [f"prompt {number}" for number in range(400)]
    weights = bootstrap_weights(prompts, 4, seed=3)
    assert torch.equal(bootstrap_weights(prompts[::-1], 4, seed=3), weights.flip(0))
    assert torch.equal(bootstrap_weights(["prompt 7", "prompt 7"], 4, seed=3), weights[[7, 7]])
    assert not torch.equal(bootstrap_weights(prompts, 4, seed=4), weights)
    assert (weights > 0).all()
    # Mean 1 and variance 1, as the counts of drawing with replacement have; standard error of 400 draws is 0.05 and about 0.14.
    assert weights.mean(0).tolist() == pytest.approx([1.0] * 4, abs=0.2)
    assert weights.var(0).tolist() == pytest.approx([1.0] * 4, abs=0.6)
    assert torch.corrcoef(weights.T).triu(1).abs().max() < 0.2
    assert torch.equal(bootstrap_weights(prompts, 1, seed=3), torch.ones(400, 1))


def test_the_loss_is_the_mean_over_members_of_their_weighted_losses():
    """Loss of a member: the sum of its scores. Members (1, 2) and (10, 20), weights 1 and 3: (1 * 3 + 3 * 30) / 2 = 46.5."""
    scores = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    assert member_losses(scores, torch.tensor([[1.0, 3.0]]), lambda own: own.sum(-1)).tolist() == [46.5]


def test_the_loss_of_one_member_is_its_loss_bit_by_bit():
    scores = torch.randn(6, 4, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    alone = scores.detach()[..., 0].clone().requires_grad_()
    losses = member_losses(scores, bootstrap_weights(["p"] * 6, 1, seed=0), lambda own: own.square().sum(-1))
    expected = alone.square().sum(-1)
    losses.sum().backward()
    expected.sum().backward()
    assert torch.equal(losses, expected)
    assert torch.equal(scores.grad[..., 0], alone.grad)


def test_disagreement_is_the_variance_of_the_probability_by_hand():
    """Two members: s_0 - s_1 = +log 3 and -log 3, so P = 3/4 and 1/4, mean 1/2, variance 1/16. On the third they agree."""
    log3 = float(np.log(3))
    scores = torch.tensor([[log3, 0.0], [0.0, log3], [-9.0, -9.0 + 1e-7]])
    pairs = disagreement(scores)
    assert float(pairs[0, 1]) == pytest.approx(1 / 16)
    torch.testing.assert_close(pairs, pairs.T)
    assert not pairs.diagonal().any()
    assert not disagreement(scores[:, :1]).any()
    shifted = scores + torch.tensor([[5.0, -3.0]])  # a member's zero says nothing about an order
    torch.testing.assert_close(disagreement(shifted), pairs, atol=1e-6, rtol=0)


def test_a_planted_dispute_is_chosen():
    """Six completions in an order that all three members share, but for 1 and 4: each member puts them elsewhere."""
    scores = torch.linspace(-1, 1, 6)[:, None].repeat(1, 3)
    scores[4] = torch.tensor([3.0, -3.0, 0.0])
    scores[1] = torch.tensor([-3.0, 3.0, 0.0])
    pairs = disagreement(scores)
    assert set(most_disputed(pairs, 2)) == {1, 4}
    assert set(most_disputed(pairs, 6)) == set(range(6))
    assert mean_disagreement(pairs, [1, 4]) == pytest.approx(float(pairs[1, 4]))
    assert mean_disagreement(pairs, [0, 2, 3]) == pytest.approx(0.0)
    assert mean_disagreement(pairs, [2]) == 0.0
    assert most_disputed(torch.zeros(4, 4), 3) == [0, 1, 2]
    for wrong in (1, 7):
        with pytest.raises(ValueError, match="count"):
            most_disputed(pairs, wrong)


def test_spread_is_told_apart_where_it_says_when_the_mean_is_wrong():
    """Three pairs (0 before 1 in each): margins of the members (1, 1), (2, 0), (-4, 2). P differs by 0, .38 and .86; the mean orders
    the first two rightly and the third wrongly. Spreads of scores: 0, 1 and 3 of the first completions, 0 of the second: mean 4 / 6.

    A pair of margins (8, 4) has a larger spread than (2, 0), and no dispute at all: with it, the clear pair counts as clear."""
    scores = [torch.tensor([margins, [0.0, 0.0]]) for margins in ([1.0, 1.0], [2.0, 0.0], [-4.0, 2.0])]
    wins = [np.array([[0, 1], [0, 0]])] * 3
    told = {"spread": pytest.approx(4 / 6), "accuracy_low_disagreement": 1.0, "accuracy_high_disagreement": 0.0}
    assert spread_report(scores, scores, wins) == told
    clear = [torch.tensor([[8.0, 4.0], [0.0, 0.0]]), *scores[1:]]
    assert spread_report(clear, clear, wins)["accuracy_low_disagreement"] == 1.0
    assert spread_report(scores[:2], scores[:2], wins[:2]) == {}
    alone = [points[:, :1] for points in scores]
    assert spread_report(alone, alone, wins) == {}
