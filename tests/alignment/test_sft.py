import pytest
import torch
from transformers import AutoModelForCausalLM

import alignment.sft
from alignment.sft import is_held_out
from tests.training.tiny import demonstrations, events, llama, make_run, user, write_lines
from training.encode import Encoder
from training.errors import InputError

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model") / "m")


def finished(folder, model, data, **options):
    run = make_run(folder, "sft", model=model, data=data, **{"learning_rate": 1e-2, "batch_rows": 8, **options})
    alignment.sft.run(run)
    return run


def test_over_long_rows_above_the_share_end_the_run(tmp_path, model):
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": "a cat", "completion": "fish " * 60}, *[{"prompt": "b", "completion": "c."}] * 9])
    with pytest.raises(InputError, match=r"1 of 10 demonstrations cannot be used.*line 1"):
        finished(tmp_path / "run", model, data, held_out_share=0.0, max_completion_tokens=40)
    run = finished(tmp_path / "run2", model, data, held_out_share=0.0, max_completion_tokens=40, max_dropped_share=0.2, max_steps=1)
    assert run.result()["counts"]["train"]["dropped"] == {"completion of more than 40 tokens": 1}


def test_rows_of_one_prompt_are_in_one_split_and_the_share_is_kept():
    assert is_held_out(user("a"), 0.5) == is_held_out(user("a"), 0.5)
    share = sum(is_held_out(user(str(n)), 0.2) for n in range(2000)) / 2000
    assert share == pytest.approx(0.2, abs=0.03)
    assert not is_held_out(user("a"), 0.0)


def test_it_learns_to_answer_and_to_end(tmp_path, model):
    """Two questions with fixed answers: after training, greedy decoding gives the answer and then the end token."""
    pairs = {"the cat": "sat on a mat.", "two dogs": "ran home in warm rain."}
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in pairs.items()] * 8)
    run = finished(tmp_path / "run", model, data, held_out_share=0.0, max_steps=80, schedule="constant")
    assert events(run, "step")[-1]["metrics"]["loss"] < 0.1
    encoder = Encoder.load(run.model_folder)
    trained = AutoModelForCausalLM.from_pretrained(run.model_folder)
    for prompt, answer in pairs.items():
        ids = encoder.prompt_ids(user(prompt))
        out = trained.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        assert out[-1] == encoder.end_id
        assert encoder.decode(out) == answer


def test_the_loss_is_the_mean_over_completion_tokens_alone(tmp_path, model):
    """By hand at a learning rate of next to nothing: the model's own cross-entropy over completion tokens, the end among them."""
    rows = [("the cat", "sat."), ("two dogs ran home", "a red mat and some fish.")]
    data = write_lines(tmp_path / "d.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in rows])
    run = finished(tmp_path / "run", model, data, held_out_share=0.0, max_steps=1, learning_rate=1e-12)
    encoder = Encoder.load(model)
    plain = AutoModelForCausalLM.from_pretrained(model)
    losses = []
    for prompt, answer in rows:
        start, rest = encoder.prompt_ids(user(prompt)), encoder.completion_ids(answer)
        with torch.no_grad():
            logps = plain(torch.tensor([start + rest])).logits[0].log_softmax(-1)
        losses += [-float(logps[len(start) + place - 1, token]) for place, token in enumerate(rest)]
    assert events(run, "step")[0]["metrics"]["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_held_out_loss_is_measured_on_prompts_kept_apart(tmp_path, model):
    run = finished(tmp_path / "run", model, demonstrations(tmp_path / "d.jsonl"), held_out_share=0.3, max_steps=4, evaluate_steps=2)
    assert run.result()["counts"]["held_out"]["used"] > 0
    assert [event["step"] for event in events(run, "evaluation")] == [2, 4]
    assert run.result()["metrics"]["held_out_loss"] > 0


def test_a_held_out_file_takes_the_place_of_the_split(tmp_path, model):
    data, held_out = demonstrations(tmp_path / "d.jsonl"), demonstrations(tmp_path / "h.jsonl", rows=5)
    run = make_run(tmp_path / "run", "sft", model=model, data=data, max_steps=1)
    run.inputs["held_out"] = str(held_out)
    alignment.sft.run(run)
    assert run.result()["counts"]["train"]["used"] == 40
    assert run.result()["counts"]["held_out"]["used"] == 5


def test_lora_trains_adapters_and_leaves_a_merged_model(tmp_path, model):
    run = finished(tmp_path / "run", model, demonstrations(tmp_path / "d.jsonl"), lora_rank=4, max_steps=6)
    losses = [event["metrics"]["loss"] for event in events(run, "step")]
    assert losses[-1] < losses[0]
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (model, run.model_folder))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
