"""Rankloop's side of the PPO comparison in a process of its own: whole run directories, timed by their own step events.

    python -m benchmarks.ppo_sides FOLDER shared|classic|sft RESULT.json

`shared`: one backbone under the adapters of policy, value and reward model, the reference being the backbone itself. `classic`: all weights
of policy and value model train, beside a frozen reference and the reward model: four models. `sft`: what SFT with the same adapters takes
on the same model, at the same tokens in a micro-batch; it is there for its peak of memory.
"""

import dataclasses
import json
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from alignment.ppo.options import PPOOptions
from benchmarks.ppo_data import LEARNING_RATE, LORA_RANK, MINIBATCHES, PASSES
from benchmarks.rank_data import Row
from training.progress import memory_bytes
from training.rundir import RunDirectory, file_digest

SEED = 0
HAS_SHARED = any(field.name == "backbone" for field in dataclasses.fields(PPOOptions))


class Watch:
    """Optimiser steps of each optimiser, and token positions that went through an embedding: what a side really computes."""

    def __init__(self) -> None:
        self.positions = 0
        self.optimiser_steps: dict[int, int] = {}
        self.processor_marks = [time.process_time()]
        self._hooks = [
            register_optimizer_step_post_hook(self._stepped),
            nn.modules.module.register_module_forward_pre_hook(self._see),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def watch_events(self, run: RunDirectory) -> None:
        """Processor seconds at each step event: on a busy machine they say more than the clock."""
        write = run.event

        def watched(kind: str, **values: Any) -> None:
            write(kind, **values)
            if kind == "step":
                self.processor_marks.append(time.process_time())

        run.event = watched  # type: ignore[method-assign]

    def _stepped(self, optimiser: Any, *_: Any) -> None:
        self.optimiser_steps[id(optimiser)] = self.optimiser_steps.get(id(optimiser), 0) + 1

    def _see(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            self.positions += given[0].numel()


def common(row: Row) -> dict[str, Any]:
    return {
        "dtype": row.dtype,
        "learning_rate": LEARNING_RATE,
        "schedule": "linear",
        "warmup_share": 0.0,
        "max_steps": row.steps,
        "log_steps": 1,
        "evaluate_steps": 0,
        "checkpoint_seconds": 0.0,
        "tokens_per_micro_batch": row.micro_batch_tokens,
        "max_prompt_tokens": row.prompt_tokens,
    }


def form(side: str) -> dict[str, Any]:
    if side == "classic":
        return {"lora_rank": 0, **({"backbone": "separate"} if HAS_SHARED else {})}
    return {"lora_rank": LORA_RANK, **({"backbone": "shared"} if HAS_SHARED else {})}


def options(row: Row, side: str) -> dict[str, Any]:
    if side == "sft":
        per_step = row.rankings * row.completions // MINIBATCHES
        return {
            **common(row),
            "lora_rank": LORA_RANK,
            "batch_rows": per_step,
            "max_completion_tokens": row.completion_tokens,
            "held_out_share": 0.0,
        }
    return {
        **common(row),
        **form(side),
        "prompts_per_step": row.rankings,
        "samples_per_prompt": row.completions,
        "passes": PASSES,
        "minibatches": MINIBATCHES,
        "max_completion_tokens": row.completion_tokens,
        "kl_coefficient": 0.05,
        "evaluation_prompts": 1,
    }


def create_run(folder: Path, row: Row, side: str, work: Path) -> RunDirectory:
    data = folder / ("demonstrations.jsonl" if side == "sft" else "prompts.jsonl")
    inputs: dict[str, Any] = {"model": str(folder / "model"), "data": {"path": str(data), "digest": file_digest(data)}}
    if side != "sft":
        inputs["reward_model"] = str(folder / "reward")
    method = "sft" if side == "sft" else "ppo"
    return RunDirectory.create(work / "run", method=method, seed=SEED, inputs=inputs, options=options(row, side), code={})


def measured(run: RunDirectory, row: Row, start: int, watch: Watch) -> dict[str, Any]:
    """From the step events of a finished run. What comes before the first step and after the last one is no step's."""
    events = [event for event in run.read_events()[0] if event["kind"] == "step"]
    marks = [0.0, *(event["seconds"] for event in events)]
    done: dict[str, Any] = {
        "seconds": [after - before for before, after in pairwise(marks)],
        "processor_seconds": [after - before for before, after in pairwise(watch.processor_marks)],
        "peak_bytes": events[-1]["memory_bytes"],
        "whole_run_peak_bytes": memory_bytes(torch.device(row.device)),
        "start_bytes": start,
        "positions": watch.positions,
        "optimiser_steps": max(watch.optimiser_steps.values()),
    }
    for part in ("generate", "score", "update"):
        done[f"seconds_{part}"] = [event["metrics"].get(f"seconds_{part}", 0.0) for event in events]
    if run.method == "ppo":
        episodes = row.rankings * row.completions
        done["tokens"] = round(sum(episodes * event["metrics"]["length_tokens"] for event in events))
        done["forbidden"] = round(sum(episodes * (1 - event["metrics"]["unfinished_share"]) for event in events))
        done["first_ratio_deviation"] = max(event["metrics"]["first_ratio_deviation"] for event in events)
    return done


@torch.no_grad()
def checked(folder: Path) -> dict[str, Any]:
    """Of given episodes, under the models that training starts from, as PPO computes them; values and scores before normalisation."""
    from rewardmodel.network import token_values
    from rewardmodel.score import Scorer
    from training.language_model import completion_logps, load_policy
    from training.pack import Row as Tokens
    from training.pack import pad_rows

    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    rows = [Tokens(one["prompt"], one["completion"]) for one in task["checked"]]
    context = len(rows[0].prompt_ids)
    scorer = Scorer.load(folder / "reward")
    padded = pad_rows(rows, scorer.encoder.pad_id)
    logps = completion_logps(load_policy(folder / "model"), padded.input_ids, padded.attention_mask, padded.completion_mask)
    values = token_values(scorer.model, padded.input_ids, padded.attention_mask)
    return {
        "logps": logps[:, context:].tolist(),
        "values": values[:, context - 1 : -1].tolist(),
        "scores": scorer.raw_scores(rows)[:, 0].tolist(),
    }


def measure(folder: Path, row: Row, side: str) -> dict[str, Any]:
    import alignment.ppo.train
    import alignment.sft

    work = folder / side
    shutil.rmtree(work, ignore_errors=True)
    if side != "classic":
        import peft  # noqa: F401  # its import is no growth of the run

    start = memory_bytes(torch.device(row.device))
    run = create_run(folder, row, side, work)
    with Watch() as watch:
        watch.watch_events(run)
        (alignment.sft if side == "sft" else alignment.ppo.train).run(run)
    done = measured(run, row, start, watch)
    done["form"] = "one backbone" if side == "shared" and HAS_SHARED else {"shared": "two backbones with adapters"}.get(side, side)
    if side != "sft" and row.device == "cpu":
        done["checked"] = checked(folder)
    return done


def main(folder: Path, side: str, result: Path) -> None:
    row = Row.read(folder)
    torch.set_num_threads(row.threads)
    # peft loads bitsandbytes wherever it is: 45 MiB for a tool of the tests that requirements.txt does not name.
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    result.write_text(json.dumps(measure(folder, row, side)), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
