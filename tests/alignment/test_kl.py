"""The KL that a preference run tells of its policy: against the exact one, and zero where nothing has moved."""

from dataclasses import replace

import pytest
import torch

import alignment.dpo
from alignment.kl import own_kl
from alignment.rollout.sampling import Sampling
from tests.alignment.letters import make_encoder, make_policy
from tests.training.tiny import events, llama, make_run, snapshot, start
from training.errors import TrainingFailed
from training.processes import Processes

SAMPLING = Sampling(1, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl")


def finished(folder, model, data, **options):
    run = make_run(folder, "dpo", model=model, data=data, **{"batch_rankings": 8, "max_steps": 6, "learning_rate": 3e-3, **options})
    alignment.dpo.run(run)
    return run


def kl_of(policy, frozen, prompts, sampling=SAMPLING):
    return own_kl(policy, lambda: frozen, make_encoder(), prompts, sampling=sampling, budget=4096, processes=Processes("float32"))


def test_it_is_the_exact_kl_within_its_interval():
    """Completions of one token: the exact KL is a sum over the vocabulary of 9. One prompt, drawn 4,000 times."""
    policy, frozen = make_policy(3), make_policy(0, spread=0.05)
    prompt = [3, 5, 4, 2]
    with torch.no_grad():
        p, q = (one(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for one in (policy, frozen))
    exact = float((p.exp() * (p - q)).sum())
    found = kl_of(policy, frozen, [prompt] * 4000)
    half = (found["kl_k1_nats_high"] - found["kl_k1_nats_low"]) / 2
    assert exact > 0.2
    assert half < 0.1
    assert abs(found["kl_k1_nats"] - exact) < 1.5 * half
    assert kl_of(policy, policy, [prompt] * 20)["kl_k1_nats"] == 0.0
    assert kl_of(policy, frozen, []) == {}


def test_tokens_that_do_not_follow_the_distribution_are_refused():
    with pytest.raises(ValueError, match="whole distribution"):
        kl_of(make_policy(), make_policy(), [[3]], replace(SAMPLING, top_k=2))


@pytest.mark.training
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}])
def test_a_run_tells_how_far_it_went_and_that_it_has_not_moved(tmp_path, model, data, options):
    moved = finished(tmp_path / "moved", model, data, **options).result()["metrics"]
    assert moved["kl_k1_nats_low"] < moved["kl_k1_nats"] < moved["kl_k1_nats_high"]
    assert moved["kl_k1_nats"] > 0.01
    still = finished(tmp_path / "still", model, data, max_steps=1, learning_rate=1e-12, **options).result()["metrics"]
    assert abs(still["kl_k1_nats"]) < 1e-3
    assert "kl_k1_nats" not in finished(tmp_path / "off", model, data, kl_prompts=0, **options).result()["metrics"]


@pytest.mark.training
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), TrainingFailed("logits are not finite", remedy="")])
def test_a_kl_that_cannot_be_measured_costs_a_warning_and_not_the_model(tmp_path, model, data, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("alignment.kl.sample_completions", fails)
    run = finished(tmp_path / "run", model, data)
    assert run.result() is not None
    assert "kl_k1_nats" not in run.result()["metrics"]
    assert any("KL to the reference was not measured" in event["text"] for event in events(run, "warning"))


@pytest.mark.training
def test_two_processes_draw_and_measure_what_one_does(tmp_path, model, data):
    two = make_run(tmp_path / "two", "dpo", model=model, data=data, batch_rankings=8, max_steps=6, learning_rate=3e-3)
    child = start(two, "--processes", "2")
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 0, output
    one = finished(tmp_path / "one", model, data)
    assert two.result()["metrics"]["kl_k1_nats"] == pytest.approx(one.result()["metrics"]["kl_k1_nats"], abs=1e-3)
    assert events(two, "evaluation")[-1]["metrics"]["kl_k1_nats"] == two.result()["metrics"]["kl_k1_nats"]
