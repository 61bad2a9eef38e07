"""QLoRA where bitsandbytes is installed, and a clear no where it is not."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from rewardmodel.network import load_reward_model
from rewardmodel.score import row_scores
from tests.training import test_loop
from tests.training.test_language_model import plain_sum, rows_of
from tests.training.test_loop import METHODS, finished
from tests.training.tiny import gemma2, llama
from training.encode import Encoder
from training.errors import InputError
from training.language_model import Lora, is_quantised, load_policy, save_model, unwrap
from training.options import OptionError, TrainingOptions
from training.quantise import quantised
from training.row_logps import row_logps

CPU = torch.device("cpu")
parts = test_loop.parts
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def shaken(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_quantised_weights_without_adapters_are_refused():
    with pytest.raises(OptionError, match="lora_rank"):
        TrainingOptions(quantise="4bit")


def test_without_bitsandbytes_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("training.quantise.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as refused:
        quantised("4bit", "some-model", device="cpu")
    assert refused.value.remedy == "pip install bitsandbytes"
    assert quantised("", "some-model", device="cpu") == {}


def test_a_gguf_file_is_not_quantised_again():
    with pytest.raises(InputError, match="gguf"):
        quantised("8bit", "folder/model.gguf", device="cpu")


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "share"), [("4bit", 1e-5), ("8bit", 5e-3)])
@pytest.mark.parametrize("family", [llama, gemma2])
def test_a_quantised_policy_trains_its_adapters_and_is_saved_in_float32(tmp_path, family, kind, share):
    """8 bits: inputs of each product are rounded to 16 bits while training, so the saved float model differs by about as much."""
    folder = family(tmp_path / "m")
    encoder = Encoder.load(folder)
    rows = rows_of(encoder)
    model = shaken(load_policy(folder, lora=Lora(4, 8.0, quantise=kind)))
    assert is_quantised(model)
    assert type(unwrap(model).get_output_embeddings()) is torch.nn.Linear
    live = row_logps(model, rows, encoder.pad_id, device=CPU, budget=500)
    live.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    save_model(model, encoder, tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    theirs = torch.tensor([plain_sum(plain, row) for row in rows])
    torch.testing.assert_close(theirs, live.detach(), atol=share * float(live.abs().max()), rtol=0)


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "share"), [("4bit", 1e-5), ("8bit", 2e-2)])
def test_a_quantised_reward_model_keeps_its_head_in_float32(tmp_path, kind, share):
    folder = llama(tmp_path / "m")
    encoder = Encoder.load(folder)
    rows = rows_of(encoder)
    given = {"lora": Lora(4, 8.0, quantise=kind), "seed": 1}
    model, recomputing = (shaken(load_reward_model(folder, gradient_checkpointing=again, **given)) for again in (False, True))
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    live, other = (row_scores(one, rows, encoder.pad_id, device=CPU, budget=500) for one in (model, recomputing))
    allowed = share * float(live.abs().max())
    torch.testing.assert_close(live, other, atol=allowed, rtol=0)
    for one in (live, other):
        one.sum().backward()
    for mine, its in zip(model.parameters(), recomputing.parameters(), strict=True):
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, its.grad, atol=share * (1 + float(mine.grad.abs().max())), rtol=share)
    save_model(model, encoder, tmp_path / "saved")
    again = row_scores(load_reward_model(tmp_path / "saved"), rows, encoder.pad_id, device=CPU, budget=500)
    torch.testing.assert_close(again, live, atol=allowed, rtol=0)


@needs_bitsandbytes
@pytest.mark.training
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run_with_quantised_weights(parts, tmp_path, method):
    run = finished(parts, tmp_path / "run", method, max_steps=4, lora_rank=4, quantise="4bit")
    assert run.result()["metrics"]["steps"] == 4
