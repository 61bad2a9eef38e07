import math

import pytest
import torch
import torch.nn.functional as F

import alignment.dpo
from alignment.losses import dpo_losses
from rewardmodel.losses import band_matrices, pair_weights
from tests.training.tiny import events, llama, make_run, snapshot, user
from training.encode import Encoder
from training.errors import InputError
from training.language_model import load_policy
from training.pack import Row
from training.rankings import RaterRanking
from training.row_logps import row_logps

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 3, 2), {"beta": 0.1}), ((2, 3, 3), {"beta": 0.0}), ((2, 3, 3), {"beta": 0.1, "label_smoothing": 0.5})],
)
def test_shapes_and_ranges_are_checked(shape, options):
    with pytest.raises(ValueError):
        dpo_losses(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(shape), **options)


def test_the_loss_by_hand():
    """Log-ratios 1 and -0.5, beta 0.2: margin 0.3, -log sigmoid(0.3) = 0.554355; the other way round: 0.854355; with a tenth of labels
    wrong: 0.9 * 0.554355 + 0.1 * 0.854355 = 0.584355."""
    policy, reference = torch.tensor([[-4.0, -7.5]]), torch.tensor([[-5.0, -7.0]])
    wins = band_matrices(((0,), (1,)), 2)[0][None]
    assert float(dpo_losses(policy, reference, wins, beta=0.2)) == pytest.approx(0.554355, abs=1e-6)
    assert float(dpo_losses(policy, reference, wins.mT, beta=0.2)) == pytest.approx(0.854355, abs=1e-6)
    assert float(dpo_losses(policy, reference, wins, beta=0.2, label_smoothing=0.1)) == pytest.approx(0.584355, abs=1e-6)


def test_a_ranking_is_the_mean_of_its_pairs_and_ties_make_none():
    """Bands [[1], [0, 2]]: two pairs, (1, 0) and (1, 2); 0 and 2 are tied."""
    logps = torch.randn(1, 3)
    weights = pair_weights([RaterRanking(((1,), (0, 2)))], 3, ties="drop")
    pairs = [-F.logsigmoid(0.1 * (logps[0, 1] - logps[0, other])) for other in (0, 2)]
    expected = float(sum(pairs)) / 2
    assert float(dpo_losses(logps, torch.zeros(1, 3), weights.wins[None], beta=0.1)) == pytest.approx(expected, abs=1e-6)


def test_pairs_equal_trls_sigmoid_loss(model):
    """TRL 1.16's DPOTrainer (`loss_type` sigmoid) in formula, on sums of the model's own log-probabilities; and its gradient."""
    encoder, policy, reference = Encoder.load(model), load_policy(model), load_policy(model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    prompt = encoder.prompt_ids(user("the cat"))
    chosen, rejected = (encoder.completion_ids(text) for text in ("sat on a mat.", "ate two dogs and some fish."))

    def logp(one, completion):
        logits = one(torch.tensor([prompt + completion])).logits[:, :-1].float()
        per_token = logits.log_softmax(-1).gather(-1, torch.tensor([prompt + completion])[:, 1:, None])[0, :, 0]
        return per_token[len(prompt) - 1 :].sum()

    with torch.no_grad():
        chosen_reference, rejected_reference = logp(reference, chosen), logp(reference, rejected)
    delta = (logp(policy, chosen) - chosen_reference) - (logp(policy, rejected) - rejected_reference)
    theirs = -F.logsigmoid(0.1 * delta)
    theirs.backward()
    their_gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    rows = [Row(prompt, chosen), Row(prompt, rejected)]
    logps = row_logps(policy, rows, encoder.pad_id, device=CPU, budget=1000)[None]
    with torch.no_grad():
        reference_logps = row_logps(reference, rows, encoder.pad_id, device=CPU, budget=1000)[None]
    ours = dpo_losses(logps, reference_logps, band_matrices(((0,), (1,)), 2)[0][None], beta=0.1).sum()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    for parameter, other in zip(policy.parameters(), their_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, other, atol=1e-6, rtol=1e-4)


@pytest.mark.training
@pytest.mark.parametrize("options", [{}, {"lora_rank": 4}, {"length_normalised": True}], ids=["full", "lora", "normalised"])
def test_at_the_start_the_loss_is_ln_2(tmp_path, model, data, options):
    run = finished(tmp_path / "run", model, data, max_steps=3, learning_rate=1e-3, **options)
    metrics = events(run, "step")[0]["metrics"]
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
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
def test_the_reference_is_computed_once_and_kept_with_the_run(tmp_path, model, data):
    run = finished(tmp_path / "run", model, data, max_steps=2, learning_rate=1e-3)
    file = run.path / alignment.dpo.REFERENCE_FILE
    before = file.stat().st_mtime_ns
    (run.path / "result.json").unlink()
    alignment.dpo.run(run)
    assert file.stat().st_mtime_ns == before


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
