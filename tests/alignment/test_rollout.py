"""Sampling: the exact distribution, the same sequence in any company, log-probabilities that a fresh forward pass confirms."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from alignment.rollout.built_in import draw_tokens, sample_completions, uniform_numbers
from alignment.rollout.packed_weights import packed_weights
from alignment.rollout.sampling import Sample, Sampling
from tests.alignment.letters import make_policy
from training.errors import TrainingFailed
from training.language_model import Lora, add_lora, completion_logps, completion_statistics
from training.pack import pad_rows

PROMPTS = [[3, 4, 5, 2], [6, 2], [8, 7, 6, 5, 4, 3, 2], [4, 2]]
STOPS = {0}


def draw(model, prompts=PROMPTS, *, stop_ids=STOPS, samples=2, streams=None, **sampling) -> list[Sample]:
    chosen = Sampling(**{"max_new_tokens": 12, "seed": 5, **sampling})
    return sample_completions(model, prompts, chosen, stop_ids=stop_ids, pad_id=1, samples=samples, streams=streams)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, eos_token_id=0, pad_token_id=1)
    return GPT2LMHeadModel(config).eval()


def sliding() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=9, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=4, initializer_range=0.3, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def with_lora():
    model = add_lora(make_policy(), Lora(4, 8.0), task="CAUSAL_LM", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


MODELS = {"llama": make_policy, "gpt2": gpt2, "sliding window": sliding, "lora": with_lora}


def test_what_would_change_the_distribution_is_refused_for_training():
    for rule in ({"top_k": 5}, {"top_p": 0.9}, {"greedy": True}):
        with pytest.raises(ValueError, match="ratio"):
            Sampling(4, **rule).require_exact()
    Sampling(4, temperature=0.7).require_exact()


def test_bad_input_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="no tokens"):
        draw(make_policy(), [[3], []])
    with pytest.raises(ValueError, match="could ever end"):
        draw(make_policy(), stop_ids=set())
    with pytest.raises(ValueError, match="temperature > 0"):
        Sampling(4, temperature=0.0)


def test_a_model_that_is_broken_says_so():
    model = make_policy()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="not finite"):
        draw(model)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_follow_the_distribution_exactly(temperature: float):
    """Chi-square of 20,000 two-token completions against the model's own probabilities of all 81 pairs; a right sampler fails once in
    10,000 seeds, and the seed is fixed."""
    model = make_policy()
    count = 20_000
    found = draw(model, [PROMPTS[0]], stop_ids={99}, samples=count, max_new_tokens=2, temperature=temperature)
    pairs = np.array([sample.completion_ids for sample in found])
    observed = np.bincount(pairs[:, 0] * 9 + pairs[:, 1], minlength=81)
    with torch.no_grad():
        first = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).log_softmax(-1)
        followed = torch.tensor([[*PROMPTS[0], token] for token in range(9)])
        second = (model(followed).logits[:, -1] / temperature).log_softmax(-1)
    expected = (first[:, None] + second).exp().double().flatten().numpy()
    common = expected * count >= 5  # the rare ones together are one class
    seen = np.append(observed[common], observed[~common].sum())
    hoped = np.append(expected[common], expected[~common].sum()) * count
    assert stats.chisquare(seen, hoped * seen.sum() / hoped.sum()).pvalue > 1e-4


def test_each_token_of_a_large_vocabulary_has_its_own_share_of_the_unit_interval():
    """Token v of 1,000 (not a whole number of blocks) has weight v; its interval is [v (v - 1) / 2, v (v + 1) / 2) / 499,500."""
    weights = torch.arange(1000.0)
    tokens = torch.arange(1, 1000)
    starts = (tokens * (tokens - 1)).double() / 2 / 499_500
    widths = tokens.double() / 499_500
    for share in (0.001, 0.5, 0.999):
        found, logps, _ = draw_tokens(weights.log().expand(999, -1), starts + share * widths, Sampling(1))
        assert found.tolist() == tokens.tolist()
        assert torch.allclose(logps.double(), widths.log(), atol=1e-5)


def test_a_token_without_probability_is_never_drawn():
    """The ends of the unit interval are the risk: 0 must not fall on a leading zero, nor the largest number below 1 beyond the last one."""
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens, logps, entropies = draw_tokens(logits, uniforms, Sampling(1))
    assert tokens.tolist() == [1, 3, 3]
    assert logps.tolist() == pytest.approx([-0.6931472] * 3)
    assert entropies.tolist() == pytest.approx([0.6931472] * 3)


@pytest.mark.parametrize("kind", MODELS)
def test_a_sequence_does_not_depend_on_its_company(kind: str):
    """One by one, all together, in another order, in small batches: the same tokens. A prompt keeps its stream."""
    model = MODELS[kind]()
    together = draw(model)
    alone = [sample for place, prompt in enumerate(PROMPTS) for sample in draw(model, [prompt], streams=[place])]
    turned = draw(model, PROMPTS[::-1], streams=[3, 2, 1, 0])
    small = draw(model, cache_tokens=60)
    expected = [sample.completion_ids for sample in together]
    assert [sample.completion_ids for sample in alone] == expected
    assert [sample.completion_ids for sample in small] == expected
    assert [turned[2 * (3 - place) + sample].completion_ids for place in range(4) for sample in range(2)] == expected
    assert len({tuple(ids) for ids in expected}) > 4


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_and_entropies_are_those_of_a_fresh_forward_pass(kind: str):
    model = MODELS[kind]()
    found = draw(model, temperature=0.8, samples=3)
    padded = pad_rows([sample.row for sample in found], 1)
    with torch.no_grad():
        logps, entropies = completion_statistics(model, padded.input_ids, padded.attention_mask, padded.completion_mask, 0.8)
    assert entropies is not None
    for place, sample in enumerate(found):
        here = slice(len(sample.prompt_ids), len(sample.prompt_ids) + len(sample.completion_ids))
        assert torch.allclose(sample.logps, logps[place, here], atol=1e-5)
        assert torch.allclose(sample.entropies, entropies[place, here], atol=1e-5)
    assert len({len(sample.completion_ids) for sample in found}) > 1  # rows left the batch at different times


def test_packed_weights_write_what_the_model_says_and_are_gone_afterwards():
    """A head of 2^18 weights is packed, once there are rows and steps enough."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, initializer_range=0.3,
        bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with packed_weights(model):
        assert "forward" in vars(model.lm_head)
    found = draw(model, max_new_tokens=16)
    assert "forward" not in vars(model.lm_head)
    padded = pad_rows([sample.row for sample in found], 1)
    logps = completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask)
    for place, sample in enumerate(found):
        here = slice(len(sample.prompt_ids), len(sample.row))
        assert torch.allclose(sample.logps, logps[place, here], atol=2e-5)


def test_any_of_several_stop_tokens_ends_a_completion_and_is_kept():
    found = draw(make_policy(), stop_ids={0, 5, 7}, samples=8)
    assert {sample.completion_ids[-1] for sample in found if sample.finished} == {0, 5, 7}
    for sample in found:
        assert {0, 5, 7}.isdisjoint(sample.completion_ids[:-1])
        assert sample.finished or (len(sample.completion_ids) == 12 and sample.completion_ids[-1] not in {0, 5, 7})


def test_samples_of_a_prompt_differ_and_more_samples_keep_the_first_ones():
    two, four = draw(make_policy(), samples=2), draw(make_policy(), samples=4)
    assert [sample.completion_ids for sample in two] == [sample.completion_ids for sample in four if sample.sample < 2]
    assert two[0].completion_ids != two[1].completion_ids


def test_another_seed_or_step_draws_other_numbers():
    sampling = Sampling(6, seed=1, step=2)
    assert uniform_numbers(sampling, 3, 0).tolist() == uniform_numbers(sampling, 3, 0).tolist()
    others = [
        uniform_numbers(Sampling(6, seed=2, step=2), 3, 0),
        uniform_numbers(Sampling(6, seed=1, step=3), 3, 0),
        uniform_numbers(sampling, 4, 0),
        uniform_numbers(sampling, 3, 1),
    ]
    assert not any(np.array_equal(uniform_numbers(sampling, 3, 0), other) for other in others)


def test_greedy_takes_the_most_likely_token_each_time():
    model = make_policy()
    found = draw(model, [PROMPTS[0]], samples=1, greedy=True)[0]
    ids = list(PROMPTS[0])
    for token in found.completion_ids:
        assert model(torch.tensor([ids])).logits[0, -1].argmax().item() == token
        ids.append(token)


def test_top_k_and_top_p_keep_to_the_likely_tokens_and_report_the_whole_distribution():
    """Probabilities .5, .25, .125, .125: top_k = 2 and top_p = .7 both leave the first two, and the log-probability stays log .25."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(2, 1)
    uniforms = torch.tensor([0.0, 0.999], dtype=torch.float64)
    for rule in ({"top_k": 2}, {"top_p": 0.7}):
        tokens, logps, _ = draw_tokens(logits, uniforms, Sampling(1, **rule))
        assert tokens.tolist() == [0, 1]
        assert logps[1].item() == pytest.approx(np.log(0.25))


def test_sampling_leaves_the_model_as_it_was():
    model = make_policy().train()
    draw(model)
    assert model.training
