"""The built-in sampler beside transformers' continuous batching and its `generate`, on one device: seconds a rollout, in turns.

    python -m benchmarks.rollout [--vocabulary 49152] [--samples 4] [--early]

32 completions of up to 64 tokens after prompts of 24 to 96 tokens, by a Qwen2 of random weights (6 layers, 256 wide), in float32. With
`--early` a fortieth of the vocabulary ends a completion, so that rows finish at different times.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from alignment.rollout.built_in import sample_completions
from alignment.rollout.sampling import Sampling

ROWS, NEW_TOKENS = 32, 64


def model_of(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.05, eos_token_id=0, pad_token_id=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def engines(model: Any, prompts: list[list[int]], samples: int, stops: list[int]) -> dict[str, Callable[[], int]]:
    """By name, what one rollout does; each returns the tokens it wrote."""
    wanted = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=stops, pad_token_id=1
    )
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    width = max(map(len, repeated))
    ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in repeated])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in repeated])

    def built_in() -> int:
        drawn = sample_completions(model, prompts, Sampling(NEW_TOKENS), stop_ids=stops, pad_id=1, samples=samples)
        return sum(len(sample.completion_ids) for sample in drawn)

    def continuous() -> int:
        cache = ContinuousBatchingConfig(
            return_logprobs=True, page_size=32, num_blocks=(ROWS + 1) * 7, max_batch_tokens=512, auto_switch_to_flash=False
        )
        answers = model.generate_batch(repeated, generation_config=wanted, continuous_batching_config=cache)
        return sum(len(answer.generated_tokens) for answer in answers.values())

    def generate() -> int:
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, generation_config=wanted)
        return int((found[:, width:] != 1).sum())

    return {"built_in": built_in, "continuous": continuous, "generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--early", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    stops = list(range(2, 2 + asked.vocabulary // 40)) if asked.early else [asked.vocabulary - 1]
    random = np.random.default_rng(0)
    prompts = [random.integers(2, asked.vocabulary - 1, size=size).tolist() for size in random.integers(24, 97, size=ROWS // asked.samples)]
    named = engines(model_of(asked.vocabulary), prompts, asked.samples, stops)
    seconds: dict[str, list[float]] = {name: [] for name in named}
    tokens: dict[str, int] = {}
    for repeat in range(asked.repeats + 1):
        for name, rollout in named.items():
            started = time.perf_counter()
            tokens[name] = rollout()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    rows = {
        name: {"seconds": sorted(found)[len(found) // 2], "least_seconds": min(found), "tokens": tokens[name]}
        for name, found in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:11} {row['seconds']:.2f} s (least {row['least_seconds']:.2f}), {row['tokens']} tokens")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
