import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from tests.training.tiny import FAMILIES, llama, texts, user
from training import language_model
from training.encode import Encoder
from training.errors import InputError
from training.language_model import (
    Lora,
    completion_logps,
    completion_statistics,
    frozen_copy,
    is_adapted,
    load_policy,
    prepare,
    reference,
    save_model,
    unwrap,
)
from training.pack import Row, pad_rows
from training.row_logps import row_logps

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request, tmp_path_factory):
    folder = FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "m")
    return folder, load_policy(folder), Encoder.load(folder)


@pytest.fixture
def tiny(tmp_path):
    folder = llama(tmp_path / "m")
    return folder, load_policy(folder), Encoder.load(folder)


def rows_of(encoder, count=6):
    lines = texts(2 * count)
    return [Row(encoder.prompt_ids(user(lines[2 * n])), encoder.completion_ids(lines[2 * n + 1])) for n in range(count)]


def plain_sum(model, row):
    """Sum by hand: one row, no padding, the model's own logits."""
    ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].float().log_softmax(-1)
    start = len(row.prompt_ids)
    return sum(float(logps[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="No model can be loaded"):
        load_policy(tmp_path)


def test_a_temperature_of_zero_is_refused(tiny):
    _, model, encoder = tiny
    padded = pad_rows(rows_of(encoder), encoder.pad_id)
    with pytest.raises(ValueError, match="temperature"):
        completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask, 0.0)


def test_log_probabilities_equal_the_models_own_and_padding_changes_nothing(family):
    _, model, encoder = family
    rows = rows_of(encoder)
    expected = torch.tensor([plain_sum(model, row) for row in rows])
    padded = pad_rows(rows, encoder.pad_id)
    right = completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask)
    assert right.dtype == torch.float32
    assert right.shape == padded.input_ids.shape
    torch.testing.assert_close(right.sum(-1), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(right != 0, padded.completion_mask.bool())
    # The same rows padded on the left, with another id.
    left = [torch.zeros_like(padded.input_ids) for _ in range(3)]
    for place, row in enumerate(rows):
        for target, source in zip(left, (padded.input_ids, padded.attention_mask, padded.completion_mask), strict=True):
            target[place, -len(row) :] = source[place, : len(row)]
    torch.testing.assert_close(completion_logps(model, *left).sum(-1), expected, atol=1e-4, rtol=1e-5)
    # And in groups by length.
    for budget in (40, 10_000):
        torch.testing.assert_close(row_logps(model, rows, encoder.pad_id, device=CPU, budget=budget), expected, atol=1e-4, rtol=1e-5)


def test_dropout_is_off_wherever_it_stands(family):
    _, model, encoder = family
    rows = rows_of(encoder)
    model.train()
    first, second = (row_logps(model, rows, encoder.pad_id, device=CPU, budget=500) for _ in range(2))
    model.eval()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, row_logps(model, rows, encoder.pad_id, device=CPU, budget=500))


def test_chunks_of_positions_change_neither_values_nor_gradients(tiny, monkeypatch):
    _, model, encoder = tiny
    rows = rows_of(encoder)

    def gradients():
        model.zero_grad()
        values = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500)
        values.sum().backward()
        return values.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    whole, whole_gradients = gradients()
    monkeypatch.setattr(language_model, "LOGIT_CHUNK_BYTES", 7 * 4 * 300)
    chunked, chunked_gradients = gradients()
    torch.testing.assert_close(whole, chunked)
    for one, other in zip(whole_gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 3.0}),
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    ],
    ids=["gemma2", "granite"],
)
def test_families_that_scale_or_cap_their_logits_are_followed(kind):
    model_class, config_class, more = kind
    torch.manual_seed(0)
    config = config_class(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, **more
    )
    model = prepare(model_class(config), device="cpu").eval()
    model.get_output_embeddings().weight.data.mul_(40)
    row = Row([3, 4, 5], [6, 7, 8, 9])
    padded = pad_rows([row], 0)
    got = completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask).sum()
    assert float(got) == pytest.approx(plain_sum(model, row), abs=1e-4)


def test_entropy_and_temperature_are_those_of_the_tempered_distribution(tiny):
    _, model, encoder = tiny
    row = rows_of(encoder)[0]
    padded = pad_rows([row], encoder.pad_id)
    logps, entropy = completion_statistics(model, padded.input_ids, padded.attention_mask, padded.completion_mask, 0.7)
    with torch.no_grad():
        tempered = (model(input_ids=padded.input_ids).logits[0] / 0.7).log_softmax(-1)
    place = len(row.prompt_ids)
    assert float(logps[0, place]) == pytest.approx(float(tempered[place - 1, row.completion_ids[0]]), abs=1e-5)
    assert float(entropy[0, place]) == pytest.approx(float(-(tempered[place - 1].exp() * tempered[place - 1]).sum()), abs=1e-4)


def test_a_new_adapter_changes_nothing_and_the_reference_is_the_adapter_off(tiny):
    folder, model, encoder = tiny
    rows = rows_of(encoder)
    adapted = load_policy(folder, lora=Lora(4, 8.0), seed=1)
    assert is_adapted(adapted)
    before = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500)
    torch.testing.assert_close(row_logps(adapted, rows, encoder.pad_id, device=CPU, budget=500), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    changed = row_logps(adapted, rows, encoder.pad_id, device=CPU, budget=500)
    assert not torch.allclose(changed, before, atol=1e-2)
    with reference(adapted) as base:
        torch.testing.assert_close(row_logps(base, rows, encoder.pad_id, device=CPU, budget=500), before)
    assert torch.equal(row_logps(adapted, rows, encoder.pad_id, device=CPU, budget=500), changed)


def test_a_reference_without_adapter_needs_a_frozen_model(tiny):
    _, model, _ = tiny
    with pytest.raises(ValueError, match="frozen second model"), reference(model):
        pass
    twin = frozen_copy(model)
    with reference(model, twin) as base:
        assert base is twin
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_two_seeds_give_two_adapters_and_one_seed_gives_one(tiny):
    folder, _, _ = tiny

    def start(seed):
        return torch.cat([p.flatten() for n, p in load_policy(folder, lora=Lora(4, 8.0), seed=seed).named_parameters() if "lora_A" in n])

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0)], ids=["full", "lora"])
def test_a_saved_model_is_the_same_in_plain_transformers(tiny, tmp_path, lora):
    folder, _, encoder = tiny
    model = load_policy(folder, lora=lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    rows = rows_of(encoder)
    expected = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500)
    save_model(model, encoder, tmp_path / "saved", notes={"note.json": {"a": 1}})
    again = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500)
    assert torch.equal(again, expected), "saving must not change the model"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.use_cache
    got = torch.tensor([plain_sum(loaded, row) for row in rows])
    torch.testing.assert_close(got, expected.detach(), atol=1e-4, rtol=1e-5)
    assert Encoder.load(tmp_path / "saved").digest == encoder.digest
    assert not list((tmp_path / "saved").rglob("*.bin"))
    assert (tmp_path / "saved" / "adapter").is_dir() == (lora is not None)


def test_recomputing_activations_changes_nothing(tiny):
    folder, model, encoder = tiny
    rows = rows_of(encoder)
    twin = load_policy(folder, gradient_checkpointing=True)
    for one in (model, twin):
        row_logps(one, rows, encoder.pad_id, device=CPU, budget=500).sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_a_copy_does_not_share_its_head(tiny):
    _, model, encoder = tiny
    rows = rows_of(encoder)
    before = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        unwrap(model).get_output_embeddings().weight.mul_(2)
    torch.testing.assert_close(row_logps(twin, rows, encoder.pad_id, device=CPU, budget=500), before)
