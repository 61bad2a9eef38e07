"""Ensembles as networks: each member is what it would be alone, trained and saved, and one member is today's model."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rewardmodel.members import ADAPTERS
from rewardmodel.network import Ensemble, is_reward_model, load_reward_model, load_value_model, saved_ensemble, token_values
from rewardmodel.score import REWARD_FILE, RewardNotes, Scorer, read_notes, row_scores
from tests.rewardmodel.test_network import rows_of, shaken
from tests.training.tiny import FAMILIES, llama, texts, user
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, save_model
from training.pack import pad_rows

CPU = torch.device("cpu")
LORA = Lora(4, 8.0)


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def family(request, tmp_path):
    folder = FAMILIES[request.param](tmp_path / "m")
    return folder, Encoder.load(folder)


def saved(folder, kind, target, *, size=3, **notes):
    """A shaken ensemble, its folder and what it scores."""
    encoder = Encoder.load(folder)
    model = shaken(load_reward_model(folder, lora=LORA if kind == "adapters" else None, ensemble=Ensemble(size, kind), seed=4))
    found = RewardNotes(**{"mean": (0.1,) * size, "scale": (1.0,) * size, "encoder_digest": encoder.digest, **notes})
    save_model(model, encoder, target, notes={REWARD_FILE: found.as_json()})
    return model, encoder, row_scores(model, rows_of(encoder), encoder.pad_id, device=CPU, budget=60).detach()


def test_another_ensemble_than_the_folders_is_refused(tmp_path):
    saved(llama(tmp_path / "m"), "heads", tmp_path / "r")
    for other in (Ensemble(2), Ensemble(3, "adapters"), Ensemble()):
        with pytest.raises(InputError, match="3 heads"):
            load_reward_model(tmp_path / "r", ensemble=other)
    with pytest.raises(InputError, match="LoRA"):
        load_reward_model(tmp_path / "m", ensemble=Ensemble(3, "adapters"))


def test_notes_of_another_number_of_members_are_refused(tmp_path):
    saved(llama(tmp_path / "m"), "heads", tmp_path / "r", mean=0.0, scale=1.0)
    with pytest.raises(InputError, match="normalises 1 members, the model has 3"):
        Scorer.load(tmp_path / "r")


def test_targets_that_name_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match="no linear layer"):
        load_reward_model(llama(tmp_path / "m"), lora=Lora(4, 8.0, ("c_attn",)), ensemble=Ensemble(2, "adapters"))


def test_notes_written_before_there_were_ensembles_still_load(tmp_path):
    (tmp_path / REWARD_FILE).write_text(json.dumps({"format": "rankloop.reward/1", "mean": 0.5, "scale": 2.0, "ties": "drop", "nu": 0.0}))
    notes = read_notes(tmp_path)
    assert (notes.means, notes.scales) == ((0.5,), (2.0,))
    assert notes.as_json()["mean"] == 0.5


def test_new_heads_differ_and_follow_from_the_seed(tmp_path):
    folder = llama(tmp_path / "m")
    weights = [load_reward_model(folder, ensemble=Ensemble(3), seed=seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.corrcoef(weights[0].detach()).triu(1).abs().max() < 0.8


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_ensemble_of_one_is_todays_model_bit_by_bit(family, lora):
    folder, encoder = family
    one, today = (load_reward_model(folder, lora=lora, seed=2, ensemble=ensemble) for ensemble in (Ensemble.of(1, "adapters"), None))
    for (name, mine), (other, theirs) in zip(one.named_parameters(), today.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    rows = rows_of(encoder)
    mine, theirs = (row_scores(shaken(model), rows, encoder.pad_id, device=CPU, budget=500) for model in (one, today))
    assert mine.shape == (5, 1)
    assert torch.equal(mine, theirs)


def test_adapters_start_as_the_backbone(family):
    folder, encoder = family
    rows = rows_of(encoder)
    adapters = load_reward_model(folder, lora=LORA, ensemble=Ensemble(3, "adapters"), seed=5)
    heads = load_reward_model(folder, ensemble=Ensemble(3), seed=5)
    found, expected = (row_scores(model, rows, encoder.pad_id, device=CPU, budget=60) for model in (adapters, heads))
    assert found.shape == (5, 3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert {name.rsplit(".", 1)[-1] for name, p in adapters.named_parameters() if p.requires_grad} >= {"lora_a", "lora_b"}
    assert all("lora_" in name or "score" in name for name, p in adapters.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_a_saved_ensemble_gives_the_same_scores_here(family, tmp_path, kind):
    folder, encoder = family
    _, _, expected = saved(folder, kind, tmp_path / "saved", mean=(0.5, -1.0, 0.0), scale=(2.0, 1.0, 0.5))
    assert saved_ensemble(tmp_path / "saved") == Ensemble(3, kind)
    assert is_reward_model(tmp_path / "saved")
    scorer = Scorer.load(tmp_path / "saved")
    rows = rows_of(encoder)
    raw = scorer.raw_scores(rows)
    torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-5)
    assert len({round(value, 5) for value in raw[0].tolist()}) == 3
    normalised = (expected - torch.tensor([0.5, -1.0, 0.0])) / torch.tensor([2.0, 1.0, 0.5])
    torch.testing.assert_close(scorer.normalise(raw), normalised, atol=1e-4, rtol=1e-4)
    lines = texts(10)
    answers = [(user(lines[2 * n]), lines[2 * n + 1]) for n in range(5)]
    assert scorer.score(answers) == pytest.approx(normalised.mean(-1).tolist(), abs=1e-4)


def test_saved_heads_are_the_logits_of_plain_transformers(family, tmp_path):
    folder, encoder = family
    _, _, expected = saved(folder, "heads", tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    with torch.no_grad():
        logits = plain(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_saved_adapters_are_the_logits_of_plain_transformers_and_peft(family, tmp_path):
    """The recipe of docs/data-flow.md: the folder, one adapter of it, and the logit of that number."""
    folder, encoder = family
    _, _, expected = saved(folder, "adapters", tmp_path / "saved")
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    for member in range(3):
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        one = PeftModel.from_pretrained(plain, tmp_path / "saved" / ADAPTERS / f"member-{member}").eval()
        with torch.no_grad():
            logits = one(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        torch.testing.assert_close(logits[:, member], expected[:, member], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_each_member_learns_what_it_would_learn_alone_with_peft(tmp_path, recompute):
    """Gradients of a loss of member m with respect to its matrices and its head, against a peft model of that one adapter. With
    activations recomputed in the backward pass as well: there a hook that chooses adapters would be gone."""
    folder = llama(tmp_path / "m")
    _, encoder, _ = saved(folder, "adapters", tmp_path / "saved")
    model = load_reward_model(tmp_path / "saved", gradient_checkpointing=recompute)
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    aims = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    (row_scores(model, rows_of(encoder), encoder.pad_id, device=CPU, budget=500) * aims).sum().backward()
    for member in range(3):
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        alone = PeftModel.from_pretrained(plain, tmp_path / "saved" / ADAPTERS / f"member-{member}", is_trainable=True)
        logits = alone(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits
        (logits[:, member] * aims[:, member]).sum().backward()
        theirs = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.grad is not None}
        assert len(theirs) == 2 * len(model.names)
        for name, layer in ((name, model.model.get_submodule(name)) for name in model.names):
            for mine, matrix in ((layer.lora_a, "A"), (layer.lora_b, "B")):
                expected = theirs[f"base_model.model.{name}.lora_{matrix}.default.weight"]
                torch.testing.assert_close(mine.grad[member], expected, atol=1e-5, rtol=1e-4)


def test_a_copy_taken_for_saving_leaves_the_model_as_it_was(tmp_path):
    model, encoder, expected = saved(llama(tmp_path / "m"), "adapters", tmp_path / "saved")
    rows = rows_of(encoder)
    torch.testing.assert_close(row_scores(copy.deepcopy(model), rows, encoder.pad_id, device=CPU, budget=60), expected)
    torch.testing.assert_close(row_scores(model, rows, encoder.pad_id, device=CPU, budget=60), expected)


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_a_value_model_starts_at_the_normalised_score(family, tmp_path, kind):
    """Heads: at the last token the mean of the members' normalised scores. Adapters: the first member's."""
    folder, encoder = family
    means, scales = (0.5, -1.0, 0.25), (2.0, 1.0, 0.5)
    _, _, raw = saved(folder, kind, tmp_path / "saved")
    expected = (raw - torch.tensor(means)) / torch.tensor(scales)
    expected = expected.mean(-1) if kind == "heads" else expected[:, 0]
    for lora in (None, LORA):
        model, mean, scale = load_value_model(tmp_path / "saved", (means, scales), lora=lora)
        padded = pad_rows(rows_of(encoder), encoder.pad_id)
        values = (token_values(model, padded.input_ids, padded.attention_mask) - mean) / scale
        last = padded.attention_mask.sum(-1) - 1
        torch.testing.assert_close(values[torch.arange(5), last], expected, atol=1e-5, rtol=1e-4)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert bool(frozen) == (lora is not None)
        notes = RewardNotes(mean=mean, scale=scale, encoder_digest=encoder.digest)
        save_model(model, encoder, tmp_path / "value", notes={REWARD_FILE: notes.as_json()})
        assert Scorer.load(tmp_path / "value").members == 1
