"""Advantages within groups: sums by hand, and what is refused."""

import pytest
import torch

from alignment.ppo.estimators import group_normalised, leave_one_out, token_weights
from alignment.ppo.losses import policy_terms
from alignment.ppo.options import PPOOptions
from training.options import OptionError, parse_options

MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
REWARDS = torch.tensor([[0.0, 1.0, float("nan")], [3.0, 9.0, 9.0], [1.0, 1.0, 0.0], [4.0, 2.0, 9.0]])  # in sum 1, 3, 2, 6


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"advantage_estimator": "rloo", "samples_per_prompt": 1}, "samples_per_prompt = 2"),
        ({"advantage_estimator": "grpo", "lam": 0.9}, "lam would change nothing"),
        ({"advantage_estimator": "dr_grpo", "whiten_advantages": False}, "whiten_advantages would change nothing"),
        ({"kl_estimator": "k3"}, "has not the gradient of the KL"),
        ({"kl_in": "loss"}, "the expectation of its gradient is 0"),
        ({"advantage_estimator": "reinforce"}, "is not one of"),
    ],
)
def test_what_would_train_something_else_than_it_says_is_refused(wrong: dict, reason: str):
    with pytest.raises(OptionError, match=reason):
        parse_options(PPOOptions, wrong)


def test_leave_one_out_by_hand():
    """Groups (1, 3) and (2, 6): each against the other one."""
    expected = torch.tensor([[-2.0, -2, 0], [2, 0, 0], [-4, -4, -4], [4, 4, 0]])
    assert torch.equal(leave_one_out(REWARDS, MASK, 2), expected)
    whole = leave_one_out(REWARDS, MASK, 4)  # 1 against the mean of 3, 2, 6
    assert whole[0, 0].item() == pytest.approx(1 - 11 / 3)
    assert whole[3, 1].item() == pytest.approx(6 - 2)


def test_group_normalised_by_hand():
    """Dr. GRPO: less the mean. GRPO: over the standard deviation (of a sample of 2: |difference| / sqrt(2))."""
    expected = torch.tensor([[-1.0, -1, 0], [1, 0, 0], [-2, -2, -2], [2, 2, 0]])
    assert torch.equal(group_normalised(REWARDS, MASK, 2, scale=False), expected)
    scaled = group_normalised(REWARDS, MASK, 2, scale=True)
    assert scaled[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, -(0.5**0.5), 0.5**0.5], rel=1e-3)


@pytest.mark.parametrize("scale", [True, False, None])
def test_equal_rewards_in_a_group_give_no_gradient(scale: bool | None):
    for given in (torch.zeros(4, 3), torch.tensor([[0.7, 0.0, 0.0]] * 4)):
        found = leave_one_out(given, MASK, 2) if scale is None else group_normalised(given, MASK, 2, scale=scale)
        logps = torch.zeros((4, 3), requires_grad=True)
        policy_terms(logps, torch.zeros((4, 3)), found, 0.2).loss.sum().backward()
        assert torch.equal(logps.grad, torch.zeros((4, 3)))


def test_groups_of_one_or_of_uneven_size_are_refused():
    for samples in (1, 3):
        with pytest.raises(ValueError, match="A group needs 2 samples or more"):
            leave_one_out(REWARDS, MASK, samples)


def test_what_a_token_counts_by_hand():
    """4 completions of 2, 1, 3 and 2 tokens; at most 5 allowed."""
    assert torch.allclose(token_weights(MASK, "tokens", 5), MASK / 8)
    assert torch.allclose(token_weights(MASK, "completions", 5).sum(1), torch.full((4,), 0.25))
    assert torch.allclose(token_weights(MASK, "constant", 5), MASK / 20)
