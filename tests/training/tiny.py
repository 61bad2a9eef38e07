"""Tiny real parts for the learning rooms' tests: texts, models of random weights, data files and runs. Nothing is downloaded."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from training.encode import ENCODER_FILE, Encoder
from training.language_model import save_model
from training.rundir import RunDirectory, file_digest
from training.scratch import make_model, make_tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STORIES = REPOSITORY.parent / "shared" / "data" / "models" / "stories260k-hf"
WORDS = ["the", "cat", "sat", "on", "a", "red", "mat", "and", "ate", "some", "fish", "while", "two", "dogs", "ran", "home", "in", "rain"]


def sentence(generator: random.Random, *, most: int = 9) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most))) + "."


def texts(count: int = 60) -> list[str]:
    generator = random.Random(5)
    return [sentence(generator) for _ in range(count)]


def llama(folder: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """About 30,000 parameters, 300 tokens."""
    make_model(folder, texts(), vocab_size=300, hidden_size=hidden, layers=2, heads=2, seed=seed)
    return folder


def gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Absolute positions, and (like the real one) dropout in its configuration."""
    tokenizer = make_tokenizer(texts(), vocab_size=300)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    return _save(GPT2LMHeadModel, config, tokenizer, folder, seed)


def qwen2(folder: Path, *, seed: int = 0) -> Path:
    tokenizer = make_tokenizer(texts(), vocab_size=300)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return _save(Qwen2ForCausalLM, config, tokenizer, folder, seed)


def mistral(folder: Path, *, seed: int = 0) -> Path:
    """Every layer sees the last 8 tokens only."""
    return _grouped(MistralForCausalLM, MistralConfig, folder, seed, sliding_window=8)


def gemma2(folder: Path, *, seed: int = 0) -> Path:
    """One layer sees the last 8 tokens, the next all; logits and attention are capped, and attention hard enough to be noticed."""
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}
    return _grouped(Gemma2ForCausalLM, Gemma2Config, folder, seed, **_GEMMA, **caps)


def gemma3(folder: Path, *, seed: int = 0) -> Path:
    """One layer sees the last 8 tokens, the next all, each with rotary positions of its own."""
    return _grouped(Gemma3ForCausalLM, Gemma3TextConfig, folder, seed, **_GEMMA)


_GEMMA = {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "initializer_range": 0.2,
}


def _grouped(kind: Any, config: Any, folder: Path, seed: int, **options: Any) -> Path:
    tokenizer = make_tokenizer(texts(), vocab_size=300)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    return _save(kind, config(**sizes, **ids, max_position_embeddings=256, **options), tokenizer, folder, seed)


def mamba(folder: Path, *, seed: int = 0) -> Path:
    """A state-space model: no attention, no positions."""
    tokenizer = make_tokenizer(texts(), vocab_size=300)
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=None, eos_token_id=0, pad_token_id=1
    )
    return _save(MambaForCausalLM, config, tokenizer, folder, seed)


def _save(kind: Any, config: Any, tokenizer: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_model(kind(config), Encoder(tokenizer, template="plain"), folder)
    # Transformers loads a tokenizer as the class of its model family: remember that one, as a real model folder would.
    (folder / ENCODER_FILE).unlink()
    Encoder.load(folder).save(folder)
    return folder


FAMILIES = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2}
ALL_FAMILIES = {**FAMILIES, "mistral": mistral, "gemma2": gemma2, "gemma3": gemma3, "mamba": mamba}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def snapshot(path: Path, *, prompts: int = 24, raters: int = 2, size: int = 3, held_out: int = 6) -> Path:
    """Rankings of raters who mostly like short texts, with ties; the last `held_out` prompts are held out."""
    generator = random.Random(11)
    lines = []
    for number in range(prompts):
        messages = user(f"{sentence(generator, most=4)} {number}")
        completions = sorted({sentence(generator) for _ in range(size + 3)})[: size - number % 2]
        for rater in range(raters):
            score = [len(text) // 12 + generator.choice([0, 0, 1]) for text in completions]
            bands = [[place for place, value in enumerate(score) if value == level] for level in sorted(set(score))]
            lines.append(
                {
                    "ranking": f"ranking-{number}-{rater}",
                    "revision": 1,
                    "key": f"prompt-{number}",
                    "prompt": hashlib.sha256(json.dumps(messages).encode()).hexdigest(),
                    "split": "train" if number < prompts - held_out else "held_out",
                    "round": 0,
                    "messages": messages,
                    "completions": [{"text": text, "policy": "made"} for text in completions],
                    "bands": bands,
                    "displayed": list(range(len(completions))),
                    "criteria": {},
                    "flags": {},
                    "rater": f"rater-{rater}",
                    "rater_kind": "simulated",
                    "duration_seconds": None,
                }
            )
    return write_lines(path, lines)


def demonstrations(path: Path, *, rows: int = 40) -> Path:
    generator = random.Random(7)
    return write_lines(path, [{"prompt": sentence(generator, most=4), "completion": sentence(generator)} for _ in range(rows)])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_run(folder: Path, method: str, *, model: Path, data: Path, seed: int = 3, **options: Any) -> RunDirectory:
    inputs = {"model": str(model), "data": {"path": str(data), "digest": file_digest(data)}}
    return RunDirectory.create(folder, method=method, seed=seed, inputs=inputs, options={"log_steps": 1, **options}, code={})


def start(
    run: RunDirectory,
    *arguments: str,
    launcher: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    module: str = "alignment",
) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", module, str(run.path), *arguments]
    variables = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.model_folder / "model.safetensors")


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.read_events()[0] if event["kind"] == kind]
