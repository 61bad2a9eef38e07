"""Advantages, losses and estimators of PPO, against sums done by hand or by brute force."""

import math

import pytest
import torch

from alignment.ppo.advantages import episode_rewards, gae, masked_mean, whiten
from alignment.ppo.losses import kl_k1, kl_k2, kl_k3, next_kl_coefficient, policy_terms, value_terms

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gae_refuses_a_mask_with_a_hole_and_coefficients_out_of_range():
    with pytest.raises(ValueError, match="hole"):
        gae(numbers(1, 3), numbers(1, 3), torch.tensor([[True, False, True]]), 1.0, 0.95)
    with pytest.raises(ValueError, match="gamma and lam"):
        gae(numbers(1, 3), numbers(1, 3), torch.ones(1, 3).bool(), 1.0, 1.5)
    with pytest.raises(ValueError, match="Shapes differ"):
        gae(numbers(1, 3), numbers(1, 2), torch.ones(1, 3).bool(), 1.0, 0.9)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
def test_gae_is_the_brute_force_sum(gamma: float, lam: float):
    """advantage_t = sum over k of (gamma lam)^k (r_{t+k} + gamma V_{t+k+1} - V_{t+k}), with V = 0 after the last real token."""
    rewards, values = numbers(3, 5), numbers(3, 5, seed=1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for row in range(3):
        length = int(MASK[row].sum())
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert not advantages[~MASK].any()
    assert not returns[~MASK].any()


def test_with_lam_one_the_return_is_the_sum_of_the_rewards_to_come():
    """Rewards 1, 2, 3 and any values: returns 6, 5, 3."""
    _, returns = gae(torch.tensor([[1.0, 2.0, 3.0]]), numbers(1, 3), torch.ones(1, 3).bool(), 1.0, 1.0)
    assert returns[0].tolist() == pytest.approx([6.0, 5.0, 3.0], abs=1e-5)


def test_what_stands_under_the_padding_changes_nothing():
    clean_rewards, clean_values = numbers(3, 5), numbers(3, 5, seed=1)
    dirty_rewards = clean_rewards.masked_fill(~MASK, float("nan"))
    dirty_values = clean_values.masked_fill(~MASK, 1e9)
    for one, other in zip(gae(clean_rewards, clean_values, MASK, 1.0, 0.9), gae(dirty_rewards, dirty_values, MASK, 1.0, 0.9), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whiten(clean_rewards, MASK), whiten(dirty_rewards, MASK))
    assert torch.equal(masked_mean(clean_rewards, MASK), masked_mean(dirty_rewards, MASK))
    wider = torch.nn.functional.pad(clean_rewards, (0, 3)), torch.nn.functional.pad(clean_values, (0, 3))
    longer = gae(*wider, torch.nn.functional.pad(MASK, (0, 3)), 1.0, 0.9)[0]
    assert torch.equal(longer[:, :5], gae(clean_rewards, clean_values, MASK, 1.0, 0.9)[0])


def test_whitening_has_mean_zero_and_variance_one_over_real_tokens():
    whitened = whiten(5 + 3 * numbers(3, 5), MASK)[MASK].double()
    assert whitened.mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened.var(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_whitening_keeps_a_small_spread_on_a_large_mean():
    """A variance from sums of squares in float32 would be 0 or negative here."""
    whitened = whiten(1e4 + 1e-2 * numbers(3, 5), MASK)[MASK]
    assert whitened.double().var(correction=0).item() == pytest.approx(1, rel=0.05)


def test_whitening_without_a_shift_keeps_the_mean():
    values = 5 + 3 * numbers(3, 5)
    kept = whiten(values, MASK, shift_mean=False)[MASK]
    assert kept.mean().item() == pytest.approx(values[MASK].mean().item(), abs=1e-5)
    assert kept.double().var(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_a_single_real_token_is_whitened_to_a_finite_number():
    assert whiten(torch.tensor([[7.0, 1.0]]), torch.tensor([[True, False]])).isfinite().all()


def test_the_score_stands_at_the_last_real_token_found_by_mask():
    """KL 0.5 a token at coefficient 0.2 costs 0.1 a token; the score comes on top at the last one. A completion of pad ids is no matter."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = episode_rewards(torch.tensor([2.0, -1.0]), torch.full((2, 3), 0.5), mask, 0.2)
    assert torch.allclose(rewards, torch.tensor([[-0.1, 1.9, 0.0], [-0.1, -0.1, -1.1]]))


def test_episode_rewards_refuse_an_empty_completion_and_a_negative_coefficient():
    with pytest.raises(ValueError, match="no token"):
        episode_rewards(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2).bool(), 0.1)
    with pytest.raises(ValueError, match="kl_coefficient"):
        episode_rewards(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2).bool(), -0.1)


def test_k1_and_k3_agree_with_the_exact_kl():
    """Both are unbiased: their expectation over the policy, summed over a vocabulary of 7, is the KL; k3 varies less than k1."""
    p, q = numbers(7).log_softmax(-1), numbers(7, seed=3).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum().item()
    assert (p.exp() * kl_k1(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx(exact, abs=1e-6)
    assert (kl_k3(p, q) >= 0).all()
    near = (p + 0.05 * numbers(7, seed=4)).log_softmax(-1)
    variance = [(p.exp() * (kl(p, near) - (p.exp() * kl(p, near)).sum()).square()).sum() for kl in (kl_k1, kl_k3)]
    assert variance[1] < variance[0] / 10


def test_k3_keeps_its_digits_where_two_policies_nearly_agree():
    """At a difference of 1e-4 the estimate is 5e-9: exp(-x) - 1 + x in float32 has an error of 1e-7."""
    assert kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0 - 1e-4])).item() == pytest.approx(5e-9, rel=0.01)
    assert kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5])).item() == pytest.approx(0.125)


def test_policy_loss_by_hand():
    """Ratio 1.5 and A = 2: min(3, 2.4), clipped. Ratio 1.5 and A = -2: min(-3, -2.4) = -3, not clipped. Ratio 0.5, A = 1: 0.5 of 0.8."""
    logps = torch.log(torch.tensor([1.5, 1.5, 0.5]))
    terms = policy_terms(logps, torch.zeros(3), torch.tensor([2.0, -2.0, 1.0]), 0.2)
    assert terms.loss.tolist() == pytest.approx([-2.4, 3.0, -0.5])
    assert terms.clipped.tolist() == [True, False, False]
    assert terms.ratio.tolist() == pytest.approx([1.5, 1.5, 0.5])


def test_an_unchanged_policy_has_ratio_one_and_no_kl_and_its_gradient_is_that_of_the_policy_gradient():
    logps = numbers(4).requires_grad_()
    terms = policy_terms(logps, logps.detach(), torch.tensor([1.0, -2.0, 0.5, 0.0]), 0.2)
    terms.loss.sum().backward()
    assert terms.ratio.tolist() == [1.0] * 4
    assert not terms.approximate_kl.any()
    assert not terms.clipped.any()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-1.0, 2.0, -0.5, 0.0])


def test_a_broken_ratio_stays_finite():
    assert policy_terms(torch.tensor([500.0]), torch.tensor([-500.0]), torch.tensor([-1.0]), 0.2).loss.isfinite().all()


def test_value_loss_by_hand():
    """Old 0, return 1, new 0.5, clip 0.2: the clipped value 0.2 is further off, so 0.5 * 0.64. New -0.5: plain 0.5 * 2.25."""
    losses, clipped = value_terms(torch.tensor([0.5, -0.5]), torch.zeros(2), torch.ones(2), 0.2)
    assert losses.tolist() == pytest.approx([0.32, 1.125])
    assert clipped.tolist() == [True, False]
    assert value_terms(torch.tensor([0.5]), torch.zeros(1), torch.ones(1), None)[0].tolist() == pytest.approx([0.125])


def test_losses_refuse_shapes_that_differ_and_clip_ranges_of_zero():
    with pytest.raises(ValueError, match="Shapes differ"):
        policy_terms(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.2)
    with pytest.raises(ValueError, match="clip_range"):
        policy_terms(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="clip_range"):
        value_terms(torch.zeros(2), torch.zeros(2), torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="Shapes differ"):
        kl_k1(torch.zeros(2), torch.zeros(3))


def test_the_kl_coefficient_follows_its_target():
    """KL 12 at target 10: +0.2 * 500 / 10000 = +1 %. Far above, the error is bound to 0.2 too. Below the target it falls."""
    assert next_kl_coefficient(0.1, 12.0, 10.0, 500, 10_000) == pytest.approx(0.101)
    assert next_kl_coefficient(0.1, 1000.0, 10.0, 500, 10_000) == pytest.approx(0.101)
    assert next_kl_coefficient(0.1, 9.0, 10.0, 500, 10_000) == pytest.approx(0.0995)
    assert next_kl_coefficient(0.1, 1000.0, None, 500, 10_000) == 0.1
    assert next_kl_coefficient(0.1, math.nan, 10.0, 500, 10_000) == 0.1
    with pytest.raises(ValueError, match="target"):
        next_kl_coefficient(0.1, 1.0, -1.0, 500, 10_000)
