"""What both sides of the PPO comparison start from: one model, one reward model trained from it, the same prompts as the same tokens.

    python -m benchmarks.ppo_data FOLDER

writes, beside the `row.json` that is in FOLDER already, `model/` (a causal model of random weights), `reward/` (a reward model: LoRA over
that very model, merged, with its `adapter/`), `prompts.jsonl`, `demonstrations.jsonl` for SFT, and `task.json`, which is all that TRL's
side reads beside the two model folders. The end of text has a probability of about e^-50 in this model, so that every completion has
exactly the length that the row names, on either side.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.rank_data import END, PAD, Row, made_rankings, made_texts, make_model, snapshot_lines

PASSES = 4
MINIBATCHES = 4
LORA_RANK = 16
LEARNING_RATE = 1e-5
CHECKED = 4  # episodes whose log-probabilities, values and scores both sides say
REWARD_STEPS = 3

# Rankloop's memory, not its update, depends on the tokens of a micro-batch. Larger ones are hardly faster on two cores.
_SHAPE = {"method": "ppo", "prompt_tokens": 64, "completion_tokens": 64}
ROWS = (
    Row(name="ppo-n1", rankings=32, completions=1, target=2.0, micro_batch_tokens=512, **_SHAPE),
    Row(name="ppo-n4", rankings=8, completions=4, target=3.0, micro_batch_tokens=1024, **_SHAPE),
)
MEMORY_TARGET = 0.6
MEMORY_NAME = "ppo-memory"
SFT_TARGET = 1.5  # PPO's peak over that of SFT with the same adapters


def never_ends(model_file: Path) -> None:
    """One coordinate of the residual stream becomes the same positive number for every token; against it the two special tokens' rows of
    the (tied) output matrix point. All other logits move together, so the distribution over the rest stays what it was at random."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_file)
    table = tensors["model.embed_tokens.weight"]
    table[:, 0] = 1.0
    table[[END, PAD], 0] = -8.0
    save_file(tensors, model_file, metadata={"format": "pt"})


def train_reward(row: Row, folder: Path) -> None:
    """By the product itself, for a few steps: neither its adapters nor its head are zero any more."""
    import rewardmodel.train
    from training.rundir import RunDirectory, file_digest

    data = folder / "rankings.jsonl"
    options = {
        "lora_rank": LORA_RANK,
        "batch_rankings": row.rankings,
        "max_steps": REWARD_STEPS,
        "learning_rate": 1e-3,
        "ties": "drop",
        "learning_curve": [],
        "dtype": row.dtype,
        "checkpoint_seconds": 0.0,
    }
    inputs = {"model": str(folder / "model"), "data": {"path": str(data), "digest": file_digest(data)}}
    run = RunDirectory.create(folder / "reward-run", method="reward", seed=0, inputs=inputs, options=options, code={})
    rewardmodel.train.run(run)
    run.model_folder.rename(folder / "reward")


def write_lines(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def prepare(folder: Path) -> None:
    row = Row.read(folder)
    encoder = make_model(row, made_texts(row.size), folder / "model")
    never_ends(folder / "model" / "model.safetensors")
    items = list(made_rankings(replace(row, completions=2), encoder))
    write_lines(folder / "rankings.jsonl", list(snapshot_lines(items)))
    train_reward(row, folder)
    keyed = [(f"prompt-{number}", item) for number, item in enumerate(items)]
    write_lines(folder / "prompts.jsonl", [{"key": key, "messages": item["messages"], "split": "train"} for key, item in keyed])
    told = [{"id": key, "prompt": item["messages"], "completion": item["texts"][0]} for key, item in keyed]
    write_lines(folder / "demonstrations.jsonl", told)
    prompts = [encoder.prompt_ids(item["messages"]) for item in items]
    if {len(prompt) for prompt in prompts} != {row.prompt_tokens}:
        raise SystemExit(f"Prompts have {sorted({len(prompt) for prompt in prompts})} tokens instead of {row.prompt_tokens}.")
    checked = [{"prompt": prompts[place], "completion": encoder.completion_ids(items[place]["texts"][0])[:-1]} for place in range(CHECKED)]
    task = {
        "prompts": prompts,
        "samples": row.completions,
        "episodes": row.rankings * row.completions,
        "response_tokens": row.completion_tokens,
        "steps": row.steps,
        "passes": PASSES,
        "minibatches": MINIBATCHES,
        "learning_rate": LEARNING_RATE,
        "lora_rank": LORA_RANK,
        "threads": row.threads,
        "checked": checked,
    }
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
