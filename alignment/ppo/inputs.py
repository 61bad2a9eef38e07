"""What PPO reads, and which prompts belong to which step."""

from typing import Any

from alignment.ppo.options import PPOOptions
from alignment.prompts import EncodedPrompt, choose_split, encode_prompts, prompt_rows
from training.encode import Encoder
from training.pack import epoch_order
from training.rundir import RunDirectory


def read_inputs(
    run_directory: RunDirectory, encoder: Encoder, options: PPOOptions
) -> tuple[list[EncodedPrompt], list[EncodedPrompt], dict[str, Any]]:
    """(training prompts, prompts of the evaluations, counts). Evaluations use held-out prompts, or training ones where there are none."""
    rows = prompt_rows(run_directory.data_file())
    train_rows, _ = choose_split(rows, "train")
    held_out = [row for row in rows if row.split == "held_out"]
    prompts, counts = encode_prompts(train_rows, encoder, max_dropped_share=options.max_dropped_share)
    watched_rows = (held_out or train_rows)[: options.evaluation_prompts]
    watched, watched_counts = encode_prompts(watched_rows, encoder, max_dropped_share=options.max_dropped_share)
    return prompts, watched, {"train": counts, "evaluation": {**watched_counts, "split": "held_out" if held_out else "train"}}


def step_prompts(count: int, step: int, per_step: int, seed: int) -> list[int]:
    """Indices of the prompts of a step: epoch after epoch, each in an order of its own. Depends on its arguments alone."""
    first = step * per_step
    epochs = range(first // count, (first + per_step - 1) // count + 1)
    order = [index for epoch in epochs for index in epoch_order(count, seed=seed, epoch=epoch)]
    start = first - epochs[0] * count
    return order[start : start + per_step]


def step_count(count: int, options: PPOOptions) -> int:
    return options.max_steps or max(1, -int(-options.epochs * count // options.prompts_per_step))
