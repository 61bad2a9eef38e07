"""Importance weights and the mismatch they correct: sums by hand."""

import math

import pytest
import torch

from alignment.ppo.importance import importance_weights, mismatch_metrics
from alignment.ppo.options import PPOOptions
from training.options import OptionError, parse_options

TRAINER = torch.tensor([0.5, 0.25, 0.125, 0.125])
ENGINE = torch.tensor([0.25, 0.25, 0.25, 0.25])
ALL = torch.ones((1, 4), dtype=torch.bool)


def weights(cap: float) -> torch.Tensor:
    """Of every token of a vocabulary of four, side by side: 2, 1, 1/2, 1/2 before the cap."""
    return importance_weights(TRAINER.log()[None], ENGINE.log()[None], ALL, cap)[0]


def test_what_cannot_be_weighed_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        weights(0.9)
    with pytest.raises(ValueError, match="Shapes differ"):
        importance_weights(torch.zeros(1, 2), torch.zeros(1, 3), torch.ones((1, 3), dtype=torch.bool), 2.0)


def test_an_engine_without_its_server_or_a_server_without_its_engine_is_refused():
    for wrong in ({"engine": "vllm_server"}, {"engine_url": "http://a:1"}, {"importance_cap": 0.5}, {"engine": "magic"}):
        with pytest.raises(OptionError):
            parse_options(PPOOptions, wrong)
    parse_options(PPOOptions, {"engine": "vllm_server", "engine_url": "http://a:1"})


def test_engines_that_agree_weigh_one():
    logps = torch.randn(3, 5)
    mask = torch.ones((3, 5), dtype=torch.bool)
    assert torch.equal(importance_weights(logps, logps, mask, 1.0), torch.ones(3, 5))
    found = mismatch_metrics(logps, logps, mask, 2.0)
    assert found["mismatch_nats"] == found["mismatch_kl_k3_nats"] == found["importance_capped_share"] == 0
    assert found["importance_sample_share"] == pytest.approx(1)


def test_uncapped_weights_turn_means_under_the_engine_into_means_under_the_trainer():
    """E_engine[w] = 1, and E_engine[w f] = E_trainer[f]: sums over the whole vocabulary, without sampling."""
    values = torch.tensor([3.0, -1.0, 4.0, 1.5])
    assert (ENGINE * weights(100.0)).sum().item() == pytest.approx(1)
    assert (ENGINE * weights(100.0) * values).sum().item() == pytest.approx((TRAINER * values).sum().item())


def test_the_cap_holds_and_only_takes_away():
    """Cap 1.5 cuts the first token's 2: the mean is .25 (1.5 + 1 + .5 + .5) = .875."""
    assert weights(1.5).tolist() == pytest.approx([1.5, 1.0, 0.5, 0.5])
    assert (ENGINE * weights(1.5)).sum().item() == pytest.approx(0.875)
    far = importance_weights(torch.tensor([[0.0]]), torch.tensor([[-500.0]]), ALL[:, :1], 2.0)
    assert far.item() == 2.0


def test_no_gradient_flows_through_the_weights():
    logps = torch.randn((1, 4), requires_grad=True)
    found = importance_weights(logps, torch.randn(1, 4), ALL, 2.0)
    assert not found.requires_grad
    (logps * found).sum().backward()
    assert torch.equal(logps.grad, found)


def test_padding_changes_nothing_whatever_stands_there():
    mask = torch.tensor([[True, True, True, True, False, False]])
    trainer, engine = torch.full((1, 6), math.nan), torch.full((1, 6), 7.0)
    trainer[:, :4], engine[:, :4] = TRAINER.log(), ENGINE.log()
    assert importance_weights(trainer, engine, mask, 1.5).tolist()[0] == pytest.approx([1.5, 1.0, 0.5, 0.5, 0.0, 0.0])
    assert mismatch_metrics(trainer, engine, mask, 1.5) == mismatch_metrics(TRAINER.log()[None], ENGINE.log()[None], ALL, 1.5)
    assert mismatch_metrics(trainer, engine, torch.zeros_like(mask), 1.5) == {}


def test_the_mismatch_by_hand():
    """|log ratios| ln 2, 0, ln 2, ln 2: mean .75 ln 2. k3 of engine || trainer, w - 1 - ln w: (1 - ln 2) + 0 + 2 (ln 2 - 1/2), over 4.
    Weights 1.5, 1, .5, .5: (3.5)^2 / (4 * 3.75)."""
    found = mismatch_metrics(TRAINER.log()[None], ENGINE.log()[None], ALL, 1.5)
    assert found["mismatch_nats"] == pytest.approx(0.75 * math.log(2))
    assert found["mismatch_largest_nats"] == pytest.approx(math.log(2))
    assert found["mismatch_kl_k3_nats"] == pytest.approx((1 - math.log(2) + 2 * (math.log(2) - 0.5)) / 4)
    assert found["importance_capped_share"] == 0.25
    assert found["importance_sample_share"] == pytest.approx(3.5**2 / (4 * 3.75))
