import math

import pytest

import alignment.dpo
from tests.training.tiny import events, llama, make_run, snapshot
from training.encode import Encoder
from training.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return snapshot(tmp_path_factory.mktemp("data") / "rankings.jsonl", prompts=40, raters=2, size=4, held_out=10)


def finished(folder, model, data, **options):
    run = make_run(folder, "dpo", model=model, data=data, **{"batch_rankings": 16, **options})
    alignment.dpo.run(run)
    return run


@pytest.mark.training
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"length_normalised": True}], ids=["full", "lora", "normalised"])
def test_at_the_start_the_loss_is_ln_2(tmp_path, model, data, options):
    run = finished(tmp_path / "run", model, data, max_steps=3, learning_rate=1e-3, **options)
    metrics = events(run, "step")[0]["metrics"]
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["accuracy"] == 0.5, "equal rewards count one half, also where rounding tells them apart"
    assert metrics["chosen_log_ratio"] == pytest.approx(0, abs=1e-3)


@pytest.mark.training
def test_it_raises_what_raters_prefer_over_what_they_do_not(tmp_path, model, data):
    run = finished(tmp_path / "run", model, data, epochs=6, learning_rate=2e-3)
    metrics = run.result()["metrics"]
    assert metrics["accuracy"] > 0.6
    assert metrics["accuracy_low"] <= metrics["accuracy"] <= metrics["accuracy_high"]
    assert metrics["chosen_log_ratio"] > metrics["rejected_log_ratio"]
    assert metrics["loss"] < math.log(2)
    assert {"chosen_logps", "rejected_logps", "margin", "kl_reference_policy_k1_nats", "pairs"} <= set(metrics)
    counts = run.result()["counts"]
    assert counts["ties_left_out"] > 0 < counts["pairs"]


@pytest.mark.training
def test_another_reference_is_used_and_one_of_another_tokenizer_refused(tmp_path, model, data):
    other = llama(tmp_path / "other", seed=9)
    run = make_run(tmp_path / "run", "dpo", model=model, data=data, max_steps=1)
    run.inputs["reference"] = str(other)
    alignment.dpo.run(run)
    assert abs(events(run, "step")[0]["metrics"]["chosen_log_ratio"]) > 0.01
    foreign = Encoder.load(other)
    foreign.separator = " => "
    foreign.digest = foreign._digest()
    foreign.save(other)
    run = make_run(tmp_path / "run2", "dpo", model=model, data=data, max_steps=1)
    run.inputs["reference"] = str(other)
    with pytest.raises(InputError, match="encodes text differently"):
        alignment.dpo.run(run)
