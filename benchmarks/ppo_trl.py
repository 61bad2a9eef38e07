"""TRL 1.12's side of the PPO comparison: runs under a virtual environment of its own and imports nothing of Rankloop.

    PYTHON benchmarks/ppo_trl.py FOLDER trl|trl-lora RESULT.json

TRL's own trainer does its own work; what is timed is timed from outside, around its functions. `trl` trains all weights of the policy and
of the value model, as its examples do; `trl-lora` puts adapters on both, the policy's by its own `peft_config`, and has no second copy for
the reference. TRL knows no samples per prompt: a prompt stands in its dataset once for each. Nothing is logged to anybody, nothing saved.

`per_device_train_batch_size` is all episodes of a step and `num_mini_batches` cuts them: with gradient accumulation, which would need less
memory, TRL 1.12 makes one optimiser step where it is told to make four (it counts micro-batches of the whole step, not of a minibatch).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl.experimental.utils import get_reward


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


class Watch:
    """Seconds by part, tokens, optimiser steps and positions, from outside."""

    def __init__(self) -> None:
        self.ends: list[float] = []  # of steps; the first is the start
        self.generated: list[tuple[float, float]] = []  # (from, to) of each step's sampling
        self.updates_began: list[float] = []
        self.peaks: list[int] = []
        self.processor_marks: list[float] = []
        self.tokens = self.forbidden = self.positions = 0
        self.optimiser_steps: dict[int, int] = {}
        register_optimizer_step_post_hook(self._stepped)
        nn.modules.module.register_module_forward_pre_hook(self._see)

    def _stepped(self, optimiser: Any, *_: Any) -> None:
        self.optimiser_steps[id(optimiser)] = self.optimiser_steps.get(id(optimiser), 0) + 1

    def _see(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            self.positions += given[0].numel()

    def watch_sampling(self, special: list[int]) -> None:
        sample = ppo_trainer.batch_generation

        def watched(model: Any, queries: torch.Tensor, *more: Any) -> Any:
            began = time.perf_counter()
            done = sample(model, queries, *more)
            self.generated.append((began, time.perf_counter()))
            answers = done[0][:, queries.shape[1] :]
            self.tokens += answers.numel()
            self.forbidden += int(torch.isin(answers, torch.tensor(special)).sum())
            return done

        ppo_trainer.batch_generation = watched

    def watch_updates(self, accelerator: Any) -> None:
        accumulate = accelerator.accumulate

        def watched(*models: Any) -> Any:
            if len(self.updates_began) < len(self.generated):
                self.updates_began.append(time.perf_counter())
            return accumulate(*models)

        accelerator.accumulate = watched

    def callback(self) -> TrainerCallback:
        watch = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch.ends.append(time.perf_counter())
                watch.processor_marks.append(time.process_time())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                watch.ends.append(time.perf_counter())
                watch.processor_marks.append(time.process_time())
                watch.peaks.append(peak_bytes())

        return Steps()

    def report(self) -> dict[str, Any]:
        steps = range(len(self.ends) - 1)
        return {
            "seconds": [self.ends[step + 1] - self.ends[step] for step in steps],
            "processor_seconds": [self.processor_marks[step + 1] - self.processor_marks[step] for step in steps],
            "seconds_generate": [self.generated[step][1] - self.generated[step][0] for step in steps],
            "seconds_score": [self.updates_began[step] - self.generated[step][1] for step in steps],
            "seconds_update": [self.ends[step + 1] - self.updates_began[step] for step in steps],
            "peak_bytes": self.peaks[-1],
            "tokens": self.tokens,
            "forbidden": self.forbidden,
            "positions": self.positions,
            "optimiser_steps": max(self.optimiser_steps.values()),
        }


def config(task: dict[str, Any], work: Path) -> PPOConfig:
    return PPOConfig(
        output_dir=str(work),
        per_device_train_batch_size=task["episodes"],
        gradient_accumulation_steps=1,
        num_mini_batches=task["minibatches"],
        num_ppo_epochs=task["passes"],
        total_episodes=task["episodes"] * task["steps"],
        local_rollout_forward_batch_size=task["episodes"],
        response_length=task["response_tokens"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=task["learning_rate"],
        optim="adamw_torch_fused",
        num_sample_generations=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def models(folder: Path, task: dict[str, Any], lora: bool) -> dict[str, Any]:
    shared: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    policy = AutoModelForCausalLM.from_pretrained(folder / "model", **shared)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, **shared)
    value = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, **shared)
    given: dict[str, Any] = {"model": policy, "reward_model": reward, "value_model": value, "ref_model": None}
    if lora:
        from peft import LoraConfig, TaskType, get_peft_model

        rank = {"r": task["lora_rank"], "lora_alpha": 2 * task["lora_rank"], "lora_dropout": 0.0, "target_modules": "all-linear"}
        given["peft_config"] = LoraConfig(task_type=TaskType.CAUSAL_LM, **rank)
        given["value_model"] = get_peft_model(value, LoraConfig(task_type=TaskType.SEQ_CLS, modules_to_save=["score"], **rank))
    return given


@torch.no_grad()
def checked(folder: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Of given episodes, under the models that training starts from, by TRL's own functions."""
    given = models(folder, task, lora=False)
    rows = torch.tensor([one["prompt"] + one["completion"] for one in task["checked"]])
    context, pad = len(task["checked"][0]["prompt"]), AutoTokenizer.from_pretrained(folder / "model").pad_token_id
    logits = ppo_trainer.forward(given["model"].eval(), rows, pad).logits[:, context - 1 : -1]
    values, scores, _ = get_reward(given["reward_model"].eval(), rows, pad, context)
    return {
        "logps": ppo_trainer.selective_log_softmax(logits, rows[:, context:]).tolist(),
        "values": values[:, context - 1 : -1].squeeze(-1).tolist(),
        "scores": scores.tolist(),
    }


def main(folder: Path, side: str, result: Path) -> None:
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    torch.set_num_threads(task["threads"])
    np.random.seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model", padding_side="left")
    repeated = [prompt for prompt in task["prompts"] for _ in range(task["samples"])]
    start, watch = peak_bytes(), Watch()
    trainer = PPOTrainer(
        args=config(task, folder / side),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"input_ids": repeated}),
        callbacks=[watch.callback()],
        **models(folder, task, side == "trl-lora"),
    )
    watch.watch_sampling([tokenizer.eos_token_id, tokenizer.pad_token_id])
    watch.watch_updates(trainer.accelerator)
    trainer.train()
    done = {**watch.report(), "start_bytes": start}
    done["trained_weights"] = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    del trainer
    result.write_text(json.dumps({**done, "checked": checked(folder, task)}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
