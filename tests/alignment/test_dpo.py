import math
import re

import pytest
import torch

import alignment.dpo
from alignment.losses import preference_losses
from alignment.options import DPOOptions
from alignment.preference_metrics import preference_sums
from alignment.preferences import compare, target
from tests.training.tiny import events, llama, make_run, snapshot, start, weights
from training.encode import Encoder
from training.errors import InputError
from training.rankings import RaterRanking


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
    assert {"chosen_logps", "rejected_logps", "margin", "reference_above_policy_nats", "pairs"} <= set(metrics)
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


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "kto"])
def test_a_loss_of_a_whole_step_is_refused_where_the_step_would_be_cut(tmp_path, model, data, loss):
    run = make_run(tmp_path / "run", "dpo", model=model, data=data, loss=loss, tokens_per_micro_batch=200)
    with pytest.raises(InputError, match="micro-batches of 200 tokens cut it") as refusal:
        alignment.dpo.run(run)
    tokens = re.search(r"at least (\d+)", refusal.value.remedy)
    assert tokens
    run = finished(tmp_path / "again", model, data, loss=loss, max_steps=2, batch_rankings=32, tokens_per_micro_batch=int(tokens[1]))
    assert run.result()["metrics"]["loss"] > 0


@pytest.mark.training
def test_a_loss_of_a_whole_step_is_refused_with_two_processes(tmp_path, model, data):
    run = make_run(tmp_path / "run", "dpo", model=model, data=data, loss="aot", max_steps=1)
    child = start(run, "--processes", "2")
    output = child.communicate(timeout=240)[0]
    assert child.returncode == 2, output
    assert "2 processes would each see a part" in run.error()["error"]


@pytest.mark.training
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "plackett_luce", "ties": "half"},
        {"ties": "rao_kupper", "rater_weights": "agreement"},
        {"loss": "ipo", "sft_weight": 0.2},
        {"loss": "orpo"},
        {"loss": "exo_pair", "label_smoothing": 0.01, "f_divergence": "js_divergence"},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_small_micro_batches_give_the_same_update(tmp_path, model, data, options):
    whole = finished(tmp_path / "whole", model, data, max_steps=3, learning_rate=1e-3, **options)
    cut = finished(tmp_path / "cut", model, data, max_steps=3, learning_rate=1e-3, tokens_per_micro_batch=1, **options)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(cut)[name], atol=1e-5, rtol=0)
    for one, other in zip(events(whole, "step"), events(cut, "step"), strict=True):
        for name in ("loss", "accuracy", "chosen_logps", "nll"):
            assert one["metrics"][name] == pytest.approx(other["metrics"][name], rel=1e-4, abs=1e-5), name


@pytest.mark.training
def test_what_becomes_of_ties_and_raters_is_counted(tmp_path, model, data):
    dropped = finished(tmp_path / "drop", model, data, max_steps=1).result()["counts"]
    assert dropped["ties_left_out"] == dropped["ties"] == dropped["train"]["tied_pairs"] > 0
    assert dropped["train"]["tied_pairs_keys"][0].startswith("ranking-")
    modelled = finished(tmp_path / "model", model, data, max_steps=1, ties="rao_kupper", rater_weights="agreement").result()["counts"]
    assert modelled["ties"] == dropped["ties"]
    assert "ties_left_out" not in modelled
    assert set(modelled["rater_weights"]) == {"rater-0", "rater-1"}


@pytest.mark.training
def test_chosen_completions_that_become_unlikely_are_told_once_with_a_remedy(tmp_path, model, data):
    """apo_down lowers the chosen ones too, by design; with the NLL of the chosen ones added they rise, and nothing is told."""
    falling = finished(tmp_path / "falling", model, data, loss="apo_down", beta=1.0, epochs=10, learning_rate=3e-3)
    (told,) = (event for event in events(falling, "warning") if event.get("chosen_fell"))
    assert "sft_weight" in told["text"]
    assert events(falling, "step")[-1]["metrics"]["chosen_log_ratio"] < -1
    assert math.isclose(events(falling, "step")[0]["metrics"]["chosen_log_ratio"], 0, abs_tol=1e-3)
    rising = finished(tmp_path / "rising", model, data, sft_weight=1.0, epochs=10, learning_rate=3e-3)
    assert not [event for event in events(rising, "warning") if event.get("chosen_fell")]
    assert events(rising, "step")[-1]["metrics"]["chosen_log_ratio"] > 0


def test_only_what_rounding_may_have_made_is_no_difference():
    """bfloat16 may move 600 nats by 0.6 and 60 nats by 0.06: ratios of 0.5 and 0.2 are one, ratios of 1.0 and 0.2 are two."""
    options = DPOOptions(beta=0.1)
    reference = torch.tensor([[-600.0, -60.0]])
    for ratio, accuracy in ((0.5, 0.5), (1.0, 1.0), (-1.0, 0.0)):
        batch = compare(
            [target([RaterRanking(((0,), (1,)))], 2, options)], reference + torch.tensor([[ratio, 0.2]]), reference, torch.ones(1, 2)
        )
        sums = preference_sums(batch, options, dtype="bfloat16")
        assert float(sums["accuracy"][0]) == accuracy
        assert float(sums["margin"][0]) == pytest.approx(0.1 * (ratio - 0.2), abs=1e-5)


@pytest.mark.parametrize("options", [{"f_divergence": "forward_kl"}, {"f_divergence": "alpha_divergence"}, {"ties": "rao_kupper"}])
def test_where_an_item_has_fewer_completions_nothing_infinite_gets_into_the_gradients(options):
    """Two completions beside three. At the place that is missing stands the log-probability of another row, -300, and no reference."""
    chosen = DPOOptions(**options)
    logps = torch.tensor([[-300.0, -200.0, -300.0], [-150.0, -160.0, -170.0]], requires_grad=True)
    reference = alignment.dpo._fill([torch.tensor([-301.0, -199.0]), torch.tensor([-150.0, -161.0, -169.0])], logps)
    assert reference.tolist() == [[-301.0, -199.0, -300.0], [-150.0, -161.0, -169.0]]
    said = [RaterRanking(((0,), (1,)))], [RaterRanking(((2,), (0, 1)))]
    batch = compare([target(one, size, chosen) for one, size in zip(said, (2, 3), strict=True)], logps, reference, torch.full((2, 3), 9.0))
    losses = preference_losses(batch, chosen)
    losses.sum().backward()
    assert bool(losses.isfinite().all())
    assert bool(logps.grad.isfinite().all())
    assert logps.grad[0, 2] == 0
    assert all(torch.as_tensor(top).isfinite() for top, _ in preference_sums(batch, chosen, dtype="float32").values())
