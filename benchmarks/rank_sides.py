"""One side of the comparison with TRL in a process of its own: steps are timed, peak memory and losses are kept.

    python -m benchmarks.rank_sides FOLDER ours|trl|trl-precomputed|trl-accumulated RESULT.json

Both sides start from FOLDER/model, read FOLDER/rankings.jsonl in the same order, in the dtype of FOLDER/row.json, and do its steps with the
same AdamW. Rankloop runs a whole run directory; its step events give the times. TRL is given every pair of the same rankings, as the same
tokens, through its own trainer, dataset preparation and collator; gradient checkpointing, logging and saving are off.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import alignment.dpo
import rewardmodel.train
from benchmarks.rank_data import Row, named_tokenizer, word
from training.encode import Encoder
from training.gradients import Gradients
from training.ledger import Ledger
from training.loop import plan
from training.options import parse_options
from training.progress import memory_bytes
from training.rankings import EncodedRanking, encode_rankings, read_rankings
from training.rundir import RunDirectory, file_digest

SEED = 0
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-6}
BETA = 0.1
LONGEST = 4096
ACCUMULATE = 4


class Positions:
    """Token positions that went through the embedding, with and without gradients: what a side really computes."""

    def __init__(self) -> None:
        self.trained = 0
        self.other = 0
        nn.modules.module.register_module_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            if torch.is_grad_enabled():
                self.trained += given[0].numel()
            else:
                self.other += given[0].numel()


def peak_bytes(row: Row) -> int:
    """Of this process, or of the accelerator where the row runs on one: as the product's own step events say it."""
    return memory_bytes(torch.device(row.device))


def options(row: Row) -> dict[str, Any]:
    return {
        "dtype": row.dtype,
        "epochs": 1.0,
        "batch_rankings": row.rankings,
        "learning_rate": row.learning_rate,
        "schedule": "constant",
        "warmup_share": 0.0,
        "weight_decay": 0.0,
        "max_gradient_norm": 1.0,
        "max_prompt_tokens": LONGEST,
        "max_completion_tokens": LONGEST,
        "max_dropped_share": 0.0,
        "tokens_per_micro_batch": row.micro_batch_tokens,
        "log_steps": 1,
        "checkpoint_seconds": 0.0,
        **({"beta": BETA} if row.method == "dpo" else {"ties": "drop", "learning_curve": []}),  # DPO drops ties unless told otherwise
        **ADAM,
    }


def parsed_options(row: Row) -> Any:
    from alignment.options import DPOOptions
    from rewardmodel.options import RewardOptions

    return parse_options(RewardOptions if row.method == "reward" else DPOOptions, options(row))


def encoded(folder: Path, row: Row) -> tuple[Encoder, list[EncodedRanking]]:
    encoder = Encoder.of(folder / "model", parsed_options(row))
    return encoder, encode_rankings(read_rankings(folder / "rankings.jsonl"), encoder, Ledger("completions"))


# -- Rankloop


def ours(folder: Path, row: Row, work: Path) -> dict[str, Any]:
    data = folder / "rankings.jsonl"
    inputs = {"model": str(folder / "model"), "data": {"path": str(data), "digest": file_digest(data)}}
    run = RunDirectory.create(work / "run", method=row.method, seed=SEED, inputs=inputs, options=options(row), code={})
    start, positions, spent = peak_bytes(row), Positions(), clock_reference()
    forget_rehearsal(positions)
    (rewardmodel.train.run if row.method == "reward" else alignment.dpo.run)(run)
    events = [event for event in run.read_events()[0] if event["kind"] == "step"]
    marks = [0.0, *(event["seconds"] for event in events)]
    result = {
        "seconds": [after - before for before, after in pairwise(marks)],
        "losses": [event["metrics"]["loss"] for event in events],
        "peak_bytes": events[-1]["memory_bytes"],
        "start_bytes": start,
        "positions": positions.trained,
        "weights": str(run.model_folder / "model.safetensors"),
    }
    if row.method == "dpo":
        result["reference_seconds"] = sum(spent)
    return result


def forget_rehearsal(positions: Positions) -> None:
    """What a run computes once before its first step, to see whether it fits into memory, is no step's."""
    rehearse = Gradients.rehearse

    def forgotten(*arguments: Any) -> None:
        rehearse(*arguments)
        positions.trained = 0

    Gradients.rehearse = forgotten  # type: ignore[method-assign]


def clock_reference() -> list[float]:
    """From now on the seconds of each pass of the reference that a DPO run makes before its first step, loading included."""
    spent: list[float] = []
    compute = alignment.dpo.reference_logps

    def clocked(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        done = compute(*arguments, **named)
        spent.append(time.perf_counter() - started)
        return done

    alignment.dpo.reference_logps = clocked
    return spent


# -- TRL


def all_pairs(folder: Path, row: Row) -> tuple[list[dict[str, str]], int]:
    """Every pair of every ranking, in the order in which Rankloop's steps take the rankings, and the number of steps."""
    _, items = encoded(folder, row)
    batches = plan([float(len(item.rankings)) for item in items], parsed_options(row), batch=row.rankings, seed=SEED)

    def text(ids: list[int]) -> str:
        return " ".join(map(word, ids))

    pairs = []
    for item in (items[index] for batch in batches for index in batch):
        for ranking in item.rankings:
            levels = [[(level, item.places[completion]) for completion in band] for level, band in enumerate(ranking.bands)]
            ranked = [one for level in levels for one in level]
            for level, chosen in ranked:
                for below, rejected in ranked:
                    if level < below:
                        texts = {"chosen": text(item.rows[chosen][:-1]), "rejected": text(item.rows[rejected][:-1])}
                        pairs.append({"prompt": text(item.prompt_ids) + " ", **texts})
    return pairs, len(batches)


def trl_config(row: Row, work: Path, *, pairs: int, steps: int, kind: str) -> Any:
    from trl import DPOConfig, RewardConfig

    parts = ACCUMULATE if kind == "trl-accumulated" else 1
    # Transformers 5 calls a count of warm-up steps `warmup_steps`; its default is none.
    shared: dict[str, Any] = {
        "output_dir": str(work / "trl"),
        "per_device_train_batch_size": -(-pairs // (steps * parts)),
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "learning_rate": row.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "max_length": 2 * LONGEST,
        "pad_to_multiple_of": None,
        "disable_dropout": True,
        "use_cpu": row.device == "cpu",
        "bf16": row.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        **ADAM,
    }
    if row.method == "reward":
        return RewardConfig(**shared)
    return DPOConfig(**shared, beta=BETA, padding_free=False, precompute_ref_log_probs=kind == "trl-precomputed")


def trl_trainer(row: Row, config: Any, given: dict[str, Any]) -> tuple[Any, dict[str, float]]:
    """TRL's own trainer; for DPO with references computed beforehand, the seconds that took."""
    from trl import DPOTrainer, RewardTrainer

    spent = {"reference_seconds": 0.0}
    if row.method == "reward":
        return RewardTrainer(args=config, **given), spent

    class Clocked(DPOTrainer):
        def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            done = super()._precompute_ref_logps(*arguments, **named)
            spent["reference_seconds"] += time.perf_counter() - started
            return done

    return Clocked(args=config, **given), spent


def clock(row: Row) -> tuple[Any, list[float], list[int]]:
    """A callback that writes down when the training began and when each step ended, and the peak memory then."""
    from transformers import TrainerCallback

    marks: list[float] = []
    peaks: list[int] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())
            peaks.append(peak_bytes(row))

    return Clock(), marks, peaks


def keep_losses(trainer: Any) -> list[float]:
    """The loss of each micro-batch, as TRL's own training_step returns it."""
    losses: list[float] = []
    step: Callable[..., Any] = trainer.training_step

    def kept(*arguments: Any, **named: Any) -> Any:
        loss = step(*arguments, **named)
        losses.append(float(loss))
        return loss

    trainer.training_step = kept
    return losses


def trl(folder: Path, row: Row, work: Path, kind: str) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    pairs, steps = all_pairs(folder, row)
    config = trl_config(row, work, pairs=len(pairs), steps=steps, kind=kind)
    start, positions = peak_bytes(row), Positions()
    auto: Any = AutoModelForSequenceClassification if row.method == "reward" else AutoModelForCausalLM
    model = auto.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = named_tokenizer(row.size.words)
    callback, marks, peaks = clock(row)
    given = {"model": model, "train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer, "callbacks": [callback]}
    trainer, spent = trl_trainer(row, config, given)
    losses = keep_losses(trainer)
    trainer.train()
    trainer.model.save_pretrained(work / "model")
    parts = config.gradient_accumulation_steps
    return {
        "seconds": [after - before for before, after in pairwise(marks)],
        "losses": [sum(losses[place : place + parts]) for place in range(0, len(losses), parts)],
        "peak_bytes": peaks[-1],
        "start_bytes": start,
        "positions": positions.trained,
        "weights": str(work / "model" / "model.safetensors"),
        "pairs": len(pairs),
        **(spent if kind == "trl-precomputed" else {}),
    }


def main(folder: Path, side: str, result: Path) -> None:
    row = Row.read(folder)
    torch.set_num_threads(row.threads)
    work = folder / side
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    done = ours(folder, row, work) if side == "ours" else trl(folder, row, work, side)
    result.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
