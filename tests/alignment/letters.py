"""A language of six letters for the tests of sampling and PPO: a tiny random policy, and a reward model that likes the letter `a`.

The reward model is built by hand, so that its answer is known: one attention layer with equal weights averages over all tokens, the value
matrix passes the share of `a`, and the head reads it. Its score is w * sqrt(32) * s / sqrt(1 + s^2), where s is sqrt(32) times the
share of `a` among the row's tokens: it grows with the share and with nothing else.
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewardmodel.network import Ensemble, load_reward_model
from rewardmodel.score import REWARD_FILE, RewardNotes
from training.encode import Encoder
from training.language_model import save_model
from training.rundir import RunDirectory

LETTERS = "abcdef"
END, PAD = "<end>", "<pad>"
HIDDEN = 32


def make_encoder() -> Encoder:
    vocabulary = {token: index for index, token in enumerate([END, PAD, "\n", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=4096)
    return Encoder(fast, template="plain")


def make_policy(seed: int = 0, *, layers: int = 2, spread: float = 0.3, **config) -> LlamaForCausalLM:
    """Random weights, large enough that the distribution is far from even."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=3 + len(LETTERS),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        **config,
    )
    return LlamaForCausalLM(settings).eval()


def write_models(folder: Path, *, seed: int = 0, spread: float = 0.05) -> None:
    """`folder/policy` and `folder/reward`."""
    encoder = make_encoder()
    save_model(make_policy(seed, spread=spread), encoder, folder / "policy")
    save_model(make_policy(seed, layers=1), encoder, folder / "plain")
    reward = load_reward_model(folder / "plain")
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.zero_()
        backbone, layer = reward.model, reward.model.layers[0]
        for norm in (backbone.norm, layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1.0)
        backbone.embed_tokens.weight[:, 1] = 1.0
        backbone.embed_tokens.weight[3, :2] = torch.tensor([1.0, 0.0])  # `a` points another way than all other tokens
        layer.self_attn.v_proj.weight[0, 0] = 1.0
        layer.self_attn.o_proj.weight[2, 0] = 1.0
        reward.score.weight[0, 2] = 1.0
    save_model(reward, encoder, folder / "reward", notes={REWARD_FILE: RewardNotes(mean=2.0, encoder_digest=encoder.digest).as_json()})


def write_prompts(file: Path, count: int = 24) -> Path:
    rows = []
    for index in range(count):
        text = "".join(LETTERS[(index * 7 + place * place) % 6] for place in range(1 + index % 5))
        messages = [{"role": "user", "content": f"{text}{LETTERS[index % 6]}{LETTERS[index // 6 % 6]}"}]
        rows.append({"key": f"p{index}", "messages": messages, "split": "held_out" if index % 4 == 0 else "train"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def ppo_run(folder: Path, home: Path, *, seed: int = 0, **options) -> RunDirectory:
    chosen = {
        "max_steps": 4,
        "prompts_per_step": 8,
        "samples_per_prompt": 2,
        "max_completion_tokens": 10,
        "learning_rate": 3e-3,
        "evaluate_steps": 2,
        "checkpoint_seconds": 0.0,
        **options,
    }
    inputs = {"model": str(home / "policy"), "reward_model": str(home / "reward"), "data": str(home / "prompts.jsonl")}
    return RunDirectory.create(folder, method="ppo", seed=seed, inputs=inputs, options=chosen)


def write_ensemble(folder: Path, *, likes: tuple[float, ...] = (1.0, 1.0, -0.5)) -> Path:
    """`folder/ensemble`: heads over the backbone of `folder/reward`, member m liking the letter `a` by likes[m]. Before normalisation they
    all score 0 without an `a`, and differ the more the more of it there is."""
    encoder = make_encoder()
    model = load_reward_model(folder / "plain", ensemble=Ensemble(len(likes)))
    single = load_reward_model(folder / "reward")
    model.model.load_state_dict(single.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(likes)[:, None] * single.score.weight)
    means, scales = tuple(0.5 * number for number in likes), (1.0, 2.0, 0.5)[: len(likes)]
    notes = RewardNotes(mean=means, scale=scales, encoder_digest=encoder.digest)
    save_model(model, encoder, folder / "ensemble", notes={REWARD_FILE: notes.as_json()})
    return folder / "ensemble"
