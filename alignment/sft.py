"""Supervised fine-tuning: a model learns to write the demonstrations' completions, their end among them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignment.options import SFTOptions
from training.encode import Encoder, Message
from training.language_model import Lora, load_policy
from training.ledger import Ledger
from training.loop import Training, train
from training.objective import PROBED_ROWS
from training.options import parse_options
from training.pack import Row
from training.processes import Processes, Sums
from training.rankings import Demonstration, EncodedDemonstration, encode_demonstrations, read_demonstrations
from training.row_logps import measured, row_logps
from training.rundir import RunDirectory


def run(run_directory: RunDirectory) -> None:
    """Inputs: `model`, `data` (demonstrations), and, if wanted, `held_out` (more of them)."""
    options = parse_options(SFTOptions, run_directory.options)
    processes = Processes(options.dtype)
    run_directory.is_writer = processes.is_main
    encoder = Encoder.of(run_directory.inputs["model"], options)
    train_rows, held_out_rows = _read(run_directory, options)
    train_items, counts = _encode(train_rows, encoder, options)
    held_out_items, held_out_counts = _encode(held_out_rows, encoder, options) if held_out_rows else ([], {})
    both = {"train": counts, "held_out": held_out_counts, "boundary_moves": encoder.boundary_moves}
    run_directory.event("counts", **both)
    model = load_policy(
        run_directory.inputs["model"],
        device=processes.device,
        lora=Lora.of(options),
        gradient_checkpointing=options.gradient_checkpointing,
        seed=run_directory.seed,
    )
    objective = Demonstrations(model, encoder, processes, options, items=train_items, held_out=held_out_items)
    train(Training(run_directory, processes, options, model, encoder, objective, both), batch=options.batch_rows)


class Demonstrations:
    """The SFT objective: minus the log-probability of completion tokens, averaged over all tokens of a batch."""

    def __init__(
        self,
        model: Any,
        encoder: Encoder,
        processes: Processes,
        options: SFTOptions,
        *,
        items: Sequence[EncodedDemonstration],
        held_out: Sequence[EncodedDemonstration],
    ) -> None:
        self.model = model
        self.pad_id = encoder.pad_id
        self.processes = processes
        self.budget, self.copies = options.tokens_per_micro_batch, 1
        self.keys = [item.key for item in items]
        self.rows = [Row(item.prompt_ids, item.completion_ids) for item in items]
        self.held_out = [Row(item.prompt_ids, item.completion_ids) for item in held_out[: options.max_held_out_rows]]
        self.weights = [1.0] * len(items)
        self.costs = [len(row) for row in self.rows]
        self.extra: list[tuple[nn.Parameter, float]] = []

    def denominator(self, indices: Sequence[int]) -> float:
        return float(sum(len(self.rows[index].completion_ids) for index in indices))

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        loss = -self._logps([self.rows[index] for index in indices]).sum()
        return loss, {"loss": (loss.detach(), self.denominator(indices))}

    def evaluate(self) -> dict[str, float]:
        """`held_out_loss` in nats a token, and `held_out_tokens`; nothing without held-out rows."""
        if not self.held_out:
            return {}
        tokens = sum(len(row.completion_ids) for row in self.held_out)
        logps = measured(self.held_out, self.processes, self._logps)
        return {"held_out_loss": float(-logps.double().sum() / tokens), "held_out_tokens": float(tokens)}

    def evaluate_at_end(self) -> dict[str, float]:
        return {}

    def notes(self) -> dict[str, Any]:
        return {}

    def load(self, folder: Path, device: torch.device) -> Any:
        return load_policy(folder, device=device)

    def probe(self, model: Any) -> Tensor:
        with torch.no_grad():
            return row_logps(model, self.rows[:PROBED_ROWS], self.pad_id, device=model.device, budget=self.budget)

    def _logps(self, rows: Sequence[Row]) -> Tensor:
        return row_logps(self.model, rows, self.pad_id, device=self.processes.device, budget=self.budget)


def is_held_out(messages: Sequence[Message], share: float) -> bool:
    """Whether a prompt is kept out of training: decided by the hash of its messages alone, so all its rows go together."""
    digest = hashlib.sha256(json.dumps(list(messages), sort_keys=True, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _read(run_directory: RunDirectory, options: SFTOptions) -> tuple[list[Demonstration], list[Demonstration]]:
    rows = read_demonstrations(run_directory.data_file())
    if "held_out" in run_directory.inputs:
        return rows, read_demonstrations(run_directory.data_file("held_out"))
    apart = [is_held_out(row.messages, options.held_out_share) for row in rows]
    return [row for row, out in zip(rows, apart, strict=True) if not out], [row for row, out in zip(rows, apart, strict=True) if out]


def _encode(rows: list[Demonstration], encoder: Encoder, options: SFTOptions) -> tuple[list[EncodedDemonstration], dict[str, Any]]:
    ledger = Ledger("demonstrations")
    items = encode_demonstrations(rows, encoder, ledger)
    ledger.enforce(options.max_dropped_share)
    return items, ledger.counts()
