"""A prompt that is encoded once for all its completions gives the numbers that one encoding for each of them gives."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForCausalLM, PretrainedConfig

import training.row_logps as row_logps_module
from rewardmodel.network import load_reward_model
from rewardmodel.score import row_scores
from tests.training.tiny import ALL_FAMILIES
from training.language_model import Lora, completion_logps, load_policy, unwrap
from training.pack import Row, pad_rows
from training.packed_model import packed_states, packs_rows, unpacked_reason
from training.row_logps import row_last_states, row_logps
from training.shared_prompt import Packed, pack_rows
from training.tree_attention import Scoring, flex_tree_attention, tree_attention

CPU = torch.device("cpu")
PACKING = [name for name in ALL_FAMILIES if name != "mamba"]


def rankings(*, prompts=5, most=4, seed=0, vocabulary=200, longest=24) -> list[Row]:
    """Rows of several prompts, of many sizes, some alone, some twice the same, in no order."""
    generator = random.Random(seed)
    rows = []
    for _ in range(prompts):
        prompt = [generator.randrange(vocabulary) for _ in range(generator.randint(9, longest))]
        rows += [
            Row(prompt, [generator.randrange(vocabulary) for _ in range(generator.randint(1, 14))])
            for _ in range(generator.randint(1, most))
        ]
    rows.append(rows[0])
    generator.shuffle(rows)
    return rows


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def folder(request, tmp_path_factory):
    return request.param, ALL_FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "m", seed=3)


def one_by_one(model, rows, *, side="right"):
    """(B,): plain transformers on one padded row after another: the numbers that hold, whatever we do."""
    found = []
    width = max(map(len, rows))
    for row in rows:
        padded = pad_rows([row], 1)
        ids, real, completion = padded.input_ids, padded.attention_mask, padded.completion_mask
        gap = width - ids.shape[1]
        edges = (gap, 0) if side == "left" else (0, gap)
        ids, real, completion = (
            torch.nn.functional.pad(part, edges, value=value) for part, value in ((ids, 1), (real, 0), (completion, 0))
        )
        found.append(completion_logps(model, ids, real, completion).sum(-1))
    return torch.cat(found)


def gradients(model, value):
    value.square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_alike(ours, theirs, model):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    mine, other = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == other.keys()
    scale = max(float(gradient.abs().max()) for gradient in other.values())
    for name, gradient in other.items():
        assert float((mine[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("lora", [None, Lora(4, 8.0)], ids=["full", "lora"])
@pytest.mark.parametrize(("budget", "side"), [(10_000, "right"), (60, "left")], ids=["one-pack", "many-packs"])
def test_log_probabilities_and_gradients_are_those_of_rows_alone(folder, lora, budget, side, checkpointing):
    family, path = folder
    if family == "mamba" and (side == "left" or lora):
        pytest.skip("a state-space model sees padding on the left, whoever computes it; its LoRA targets have names of their own")
    model = shaken(load_policy(path, lora=lora, gradient_checkpointing=checkpointing, seed=1))
    rows = rankings(seed=budget)
    ours = row_logps(model, rows, 1, device=CPU, budget=budget)
    assert packs_rows(unwrap(model).base_model) == (family != "mamba")
    assert_alike(ours, one_by_one(model, rows, side=side), model)


@pytest.mark.parametrize("lora", [None, Lora(4, 8.0)], ids=["full", "lora"])
def test_scores_and_gradients_are_those_of_rows_alone(folder, lora):
    family, path = folder
    if family in ("mamba",):
        pytest.skip("it has no score head in transformers")
    model = shaken(load_reward_model(path, lora=lora, seed=1))
    rows = rankings(seed=2)
    ours = row_scores(model, rows, 1, device=CPU, budget=90)
    theirs = torch.cat([row_scores(model, [row], 1, device=CPU, budget=1) for row in rows])
    plain = torch.stack([unwrap(model)(input_ids=torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits.squeeze() for row in rows])
    assert_alike(ours, theirs, model)
    torch.testing.assert_close(ours.detach(), plain.detach().view_as(ours), atol=1e-5, rtol=1e-5)


def shaken(model):
    """Adapters and heads start at zero; a zero cannot show a mistake."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load_policy(ALL_FAMILIES["llama"](tmp_path_factory.mktemp("llama") / "m", seed=3))


def packed(rows, *, budget=10_000, share=True) -> list[Packed]:
    return pack_rows(rows, budget=budget, share=share)


def test_each_prompt_and_each_completion_stands_in_a_packed_row_once():
    """Two prompts of 3 and 2 tokens with 2 and 3 completions of 2 tokens: 3 + 4 + 2 + 6 = 15 tokens, where rows alone take 10 + 12 = 22."""
    rows = [Row([1, 2, 3], [4, 5]), Row([1, 2, 3], [6, 7]), *(Row([8, 9], [number, 5]) for number in (10, 11, 12))]
    (one,) = packed(rows)
    assert one.input_ids.shape == (1, 15)
    assert sum(part.input_ids.shape[1] for part in packed(rows, share=False)) == 22
    for number, row in enumerate(one.rows):
        mine = one.owner == number
        assert one.targets[mine].tolist() == list(rows[row].completion_ids)
        assert one.input_ids[0, one.before[mine]].tolist() == [rows[row].prompt_ids[-1], *rows[row].completion_ids[:-1]]
        assert one.position_ids[0, one.ends[number]] == len(rows[row]) - 1
        assert one.input_ids[0, one.ends[number]] == rows[row].completion_ids[-1]


def test_packs_keep_to_the_budget_and_lose_no_row():
    rows = rankings(prompts=30, most=6, seed=4)
    for budget in (40, 100, 700):
        parts = packed(rows, budget=budget)
        assert sorted(row for part in parts for row in part.rows) == list(range(len(rows)))
        longest = max(len(row) for row in rows)
        assert all(part.input_ids.shape[1] <= max(budget, longest) for part in parts)
    sizes = [part.input_ids.shape[1] for part in packed(rows, budget=100)]
    assert max(sizes) <= 100


def test_a_short_prompt_is_not_worth_sharing():
    rows = [Row([1], [2] * 60), Row([1], [3] * 60)]
    (one,) = packed(rows)
    assert one.input_ids.shape == (1, 122)


def test_attention_is_that_of_the_written_out_mask():
    """Against softmax over a dense mask made token by token from its meaning, with windows and soft caps; FlexAttention as well."""
    rows = rankings(prompts=6, seed=8, longest=200)
    rows += [Row(list(range(40, 300)), [number] * 30) for number in range(3)]  # long enough for the fused kernel
    (one,) = packed(rows)
    tree, tokens = one.tree, one.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    for window, softcap in ((0, 0.0), (7, 0.0), (45, 0.0), (0, 3.0), (7, 3.0)):
        scoring = Scoring(0.3, softcap, window)
        query = torch.randn((2, 4, tokens, 8), generator=generator, requires_grad=True)
        key, value = (torch.randn((2, 2, tokens, 8), generator=generator, requires_grad=True) for _ in range(2))
        distance = tree.positions[:, None] - tree.positions[None]
        visible = (tree.segment[:, None] == tree.segment[None]) | (tree.parent[:, None] == tree.segment[None])
        visible &= (distance >= 0) & (distance < (window or tokens))
        products = query @ key.repeat_interleave(2, 1).mT * 0.3
        products = softcap * torch.tanh(products / softcap) if softcap else products
        expected = (products.masked_fill(~visible, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)
        ours = tree_attention(query, key, value, tree, scoring)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
        weights = torch.randn(expected.shape, generator=generator)
        for mine, other in zip(
            torch.autograd.grad((ours * weights).sum(), (query, key, value)),
            torch.autograd.grad((expected * weights).sum(), (query, key, value)),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
        detached = (query.detach(), key.detach(), value.detach())
        flex = flex_tree_attention(flex_attention, *detached, tree=tree, scoring=scoring)
        torch.testing.assert_close(flex, expected, atol=1e-5, rtol=1e-5)


def test_completions_do_not_see_each_other(llama):
    """Changing one completion changes nothing for the others of its prompt."""
    rows = [Row([5, 6, 7, 8], [9, 10, 11]), Row([5, 6, 7, 8], [12, 13]), Row([5, 6, 7, 8], [14, 15, 16])]
    other = [rows[0], Row([5, 6, 7, 8], [99, 98]), rows[2]]
    before, after = (row_logps(llama, given, 1, device=CPU, budget=500).detach() for given in (rows, other))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert before[1] != after[1]


def test_the_order_of_rows_and_the_company_they_are_packed_with_change_nothing(llama):
    rows = rankings(seed=6)
    straight = row_logps(llama, rows, 1, device=CPU, budget=10_000).detach()
    backwards = row_logps(llama, rows[::-1], 1, device=CPU, budget=70).detach()
    torch.testing.assert_close(straight, backwards.flip(0), atol=1e-5, rtol=1e-5)


def test_copies_side_by_side_are_each_the_row_itself(llama):
    (one,) = packed(rankings(seed=3))
    states = packed_states(llama.base_model, one, copies=3)
    assert states.shape[0] == 3
    torch.testing.assert_close(states[2], packed_states(llama.base_model, one)[0], atol=1e-5, rtol=1e-5)


def test_generation_and_padded_passes_are_exactly_what_they_were(llama):
    """A model that packs rows still computes everything else by the attention it was loaded with, bit by bit."""
    row_logps(llama, rankings(), 1, device=CPU, budget=500)
    assert packs_rows(llama.base_model)
    fresh = AutoModelForCausalLM.from_config(llama.config, attn_implementation="sdpa").eval()
    fresh.load_state_dict(llama.state_dict())
    ids = torch.arange(2, 22).view(2, 10)
    real = torch.ones_like(ids)
    real[0, :4] = 0
    assert torch.equal(llama(input_ids=ids, attention_mask=real).logits, fresh(input_ids=ids, attention_mask=real).logits)


def test_a_saved_model_does_not_remember_how_it_was_trained(llama, tmp_path):
    row_logps(llama, rankings(), 1, device=CPU, budget=500)
    llama.save_pretrained(tmp_path / "m")
    assert "rankloop" not in (tmp_path / "m" / "config.json").read_text()


def test_an_architecture_that_cannot_share_says_so_and_gives_the_same_numbers(tmp_path):
    model = load_policy(ALL_FAMILIES["mamba"](tmp_path / "m"))
    assert "cannot share prompts" in unpacked_reason(model.base_model)
    assert "Each completion is encoded with its prompt" in unpacked_reason(model.base_model)
    rows = rankings(seed=5)
    torch.testing.assert_close(row_logps(model, rows, 1, device=CPU, budget=80), one_by_one(model, rows), atol=1e-5, rtol=1e-5)
    assert row_last_states(model, rows, 1, device=CPU, budget=80).shape == (len(rows), model.config.hidden_size)


def test_a_mask_that_no_tree_can_stand_for_is_noticed_not_ignored(llama, monkeypatch):
    """Attention in chunks (as Llama 4's) is neither causal nor a window: the model then falls back instead of computing something else."""
    monkeypatch.setattr(PretrainedConfig, "attention_chunk_size", 4, raising=False)
    model = AutoModelForCausalLM.from_config(llama.config, attn_implementation="sdpa").eval()
    assert not packs_rows(model.base_model)
    assert model.config._attn_implementation == "sdpa"


def test_padding_is_below_a_tenth(llama):
    """Tokens have no padding at all; the products of attention have little, as rows of near sizes are computed together."""
    sizes = [
        (part.input_ids.shape[1], part.tree.padding_share)
        for part in packed(rankings(prompts=200, most=5, seed=1, longest=90), budget=2048)
    ]
    products = sum(tokens * share for tokens, share in sizes) / sum(tokens for tokens, _ in sizes)
    assert products < 0.5, "of attention, which is itself a small part of the work"
    rows = rankings(prompts=200, most=5, seed=1, longest=90)
    encoded = {tuple(row.prompt_ids) for row in rows}
    alone = sum(len(row) for row in rows)
    assert sum(tokens for tokens, _ in sizes) <= sum(map(len, encoded)) + sum(len(row.completion_ids) for row in rows) + alone * 0.1


def test_buckets_hold_every_token_once():
    for part in packed(rankings(prompts=40, seed=12, longest=60), budget=600):
        seen: list[int] = []
        for bucket in part.tree.buckets:
            kept = bucket.places if bucket.real is None else bucket.places[bucket.real]
            seen += kept.tolist()
        assert sorted(seen) == list(range(part.input_ids.shape[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("family", PACKING)
def test_on_a_gpu_in_bfloat16_rows_alone_and_shared_agree(family, checkpointing, tmp_path):
    """FlexAttention against the same model's padded rows, in values and gradients: equal to 1e-4 in float32, and to its precision in
    bfloat16. Packed rows are longer than one block of FlexAttention (128)."""
    model = load_policy(ALL_FAMILIES[family](tmp_path / "m", seed=3), device="cuda", gradient_checkpointing=checkpointing)
    rows, device = rankings(prompts=12, seed=2), torch.device("cuda")
    assert packs_rows(model.base_model), unpacked_reason(model.base_model)
    exact = row_logps(model, rows, 1, device=device, budget=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_logps_module, "packs_rows", lambda _backbone: False)
        alone = row_logps(model, rows, 1, device=device, budget=400)
    torch.testing.assert_close(exact, alone, atol=1e-3, rtol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rough = row_logps(model, rows, 1, device=device, budget=400)
    torch.testing.assert_close(rough, alone, atol=0.5, rtol=0.02)
    expected = gradients(model, alone)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for value, allowed in ((exact, 1e-3), (rough, 5e-2)):
        for name, gradient in gradients(model, value).items():
            assert float((gradient - expected[name]).abs().max()) <= allowed * scale, name
