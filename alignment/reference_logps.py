"""Log-probabilities under the reference: computed once for each completion, and shared by all runs that ask for the same.

The cache is content-addressed: `logps/<digest of model, encoder and dtype>/*.safetensors`, each file a table of (digest of prompt and
completion tokens, log-probability). Files are written beside and renamed and never changed, so any number of jobs may read and write at
once; two that compute the same row both write it, and the older file holds. What is computed is written every half minute, so a run that
is stopped or killed meanwhile goes on where it was.

A row is always computed together with the other completions of its prompt and nothing else, so its last bits do not depend on what
the cache held, on the batch, or on the number of processes. (They do when an earlier snapshot had the same completion beside others.) What
a run used is also kept in its own directory: a run that resumes reads that, whatever became of the cache.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import Stopped
from training.language_model import is_adapted, reference, unwrap
from training.pack import Row
from training.processes import Processes
from training.progress import stop_requested
from training.row_logps import row_logps
from training.rundir import RunDirectory, sync_folder

REFERENCE_FILE = "reference_logps.safetensors"
# Not the option: a prompt of many completions is cut by it, and the last bits should not depend on a run's memory.
UNIT_TOKENS = 8192
UNITS_AT_A_TIME = 32  # for each process, between two looks at whether to stop
SECONDS_BETWEEN_WRITES = 30.0
# How a model was loaded, not what it computes.
VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id", "architectures"}


def cache_folder(run: RunDirectory) -> Path | None:
    """RANKLOOP_CACHE, else `cache/` beside the folder `runs/` that the run lies in, else none."""
    named = os.environ.get("RANKLOOP_CACHE")
    if named:
        return Path(named)
    return run.path.parent.parent / "cache" if run.path.parent.name == "runs" else None


def row_digest(row: Row) -> bytes:
    """SHA-256 of the tokens of a prompt and a completion, apart."""
    parts = [np.asarray(ids, dtype=np.int64).tobytes() for ids in (row.prompt_ids, row.completion_ids)]
    return hashlib.sha256(len(parts[0]).to_bytes(8, "little") + parts[0] + parts[1]).digest()


def model_digest(model: Any) -> str:
    """SHA-256 of configuration and weights; of a model with LoRA, those of the model below the adapter."""
    config = {key: value for key, value in unwrap(model).config.to_dict().items() if key not in VOLATILE}
    content = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in unwrap(model).state_dict().items() if ".lora_" not in name}
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


class LogpCache:
    """The tables of one reference model. `warn` is told of files that cannot be used."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.warn = warn

    def read(self, wanted: set[bytes]) -> dict[bytes, float]:
        """What is known of the rows `wanted`. The oldest file that has a row holds; files that are not whole are passed over."""
        known: dict[bytes, float] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    rows, logps = opened.get_tensor("rows"), opened.get_tensor("logps")
                    whole = (opened.metadata() or {}).get("sha256") == _digest(rows, logps)
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                self.warn(f"{file} is not whole: its log-probabilities are computed again")
                continue
            for digest, logp in zip((row.tobytes() for row in rows.numpy()), logps.tolist(), strict=True):
                if digest in wanted:
                    known.setdefault(digest, logp)
        return known

    def write(self, values: dict[bytes, float]) -> None:
        """Add one file, whole or not at all. A cache that cannot be written is told of, and costs nothing but time."""
        if not values:
            return
        rows = torch.from_numpy(np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 32).copy())
        logps = torch.tensor(list(values.values()), dtype=torch.float32)
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_whole({"rows": rows, "logps": logps}, self.folder / name, {"sha256": _digest(rows, logps)})
        except (OSError, SafetensorError) as error:
            self.warn(
                f"log-probabilities under the reference could not be kept in {self.folder} ({error}): the next run computes them again"
            )


def _digest(rows: Tensor, logps: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes() + logps.numpy().tobytes()).hexdigest()


def save_whole(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file that is there in full or not at all."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(tensors, beside, metadata=metadata)
    with beside.open("rb") as written:
        os.fsync(written.fileno())
    beside.replace(file)
    sync_folder(file.parent)


@dataclass(frozen=True, slots=True)
class Reference:
    """Where log-probabilities come from. `load` gives the model (the policy itself, whose adapter is then switched off, or another one)."""

    load: Callable[[], Any]
    encoder_digest: str
    pad_id: int


def reference_logps(
    run: RunDirectory, source: Reference, units: Sequence[Sequence[Row]], processes: Processes
) -> tuple[list[Tensor], dict[str, int]]:
    """Log-probability of each row under the reference, from the run's own file, else from the cache, else computed.

    Args:    units: rows that are computed together: those of one prompt.
    Returns: for each unit (rows,) float32 in nats, on the CPU of every process;  how many distinct rows were reused and computed.
    """
    digests = [[row_digest(row) for row in unit] for unit in units]
    distinct = dict.fromkeys(digest for unit in digests for digest in unit)
    key = hashlib.sha256(b"".join(distinct) + source.encoder_digest.encode() + processes.dtype.encode()).hexdigest()
    file = run.path / REFERENCE_FILE
    (kept,) = processes.gather(_read_kept(file, key) if processes.is_main else None)[:1]
    if kept is None:
        values, reused = _cached_or_computed(run, source, (units, digests), processes)
        kept = [values[digest] for digest in distinct], reused
        if processes.is_main:
            save_whole({"logps": torch.tensor(kept[0])}, file, {"key": key, "reused": str(reused)})
    numbers, reused = kept
    values = dict(zip(distinct, numbers, strict=True))
    counts = {"reference_reused": reused, "reference_computed": len(distinct) - reused}
    return [torch.tensor([values[digest] for digest in unit]) for unit in digests], counts


def _cached_or_computed(
    run: RunDirectory, source: Reference, parts: tuple[Sequence[Sequence[Row]], list[list[bytes]]], processes: Processes
) -> tuple[dict[bytes, float], int]:
    """Value of each distinct row, and how many came from the cache."""
    units, digests = parts
    model = source.load()
    folder = cache_folder(run)
    cache = None
    if folder is not None and processes.is_main:
        made_by = f"{processes.dtype} {processes.device.type} torch {torch.__version__} transformers {transformers.__version__}"
        name = hashlib.sha256(f"{model_digest(model)} {source.encoder_digest} {made_by}".encode()).hexdigest()
        cache = LogpCache(folder / "logps" / name, lambda text: run.event("warning", text=text))
    (known,) = processes.gather(cache.read({digest for unit in digests for digest in unit}) if cache else {})[:1]
    missing = [place for place, unit in enumerate(digests) if any(digest not in known for digest in unit)]
    values: dict[bytes, float] = dict(known)
    unwritten: dict[bytes, float] = {}
    started = written = time.monotonic()
    size = UNITS_AT_A_TIME * processes.world
    for first in range(0, len(missing), size):
        places = missing[first : first + size]
        for place, logps in zip(places, _compute(model, source.pad_id, [units[place] for place in places], processes), strict=True):
            for digest, logp in zip(digests[place], logps, strict=True):
                if digest not in values:
                    values[digest] = unwritten[digest] = logp
        done = first + len(places)
        (stop,) = processes.any(stop_requested())
        if cache and (stop or done == len(missing) or time.monotonic() - written > SECONDS_BETWEEN_WRITES):
            cache.write(unwritten)
            unwritten, written = {}, time.monotonic()
        left = (time.monotonic() - started) / done * (len(missing) - done)
        run.event("part", what="reference", step=done, steps=len(missing), eta_seconds=round(left, 1))
        if stop and done < len(missing):
            run.event("end", status="stopped", step=0)
            raise Stopped(f"stopped in the reference's pass, at prompt {done} of {len(missing)}")
    return values, len(known)


def _compute(model: Any, pad_id: int, units: Sequence[Sequence[Row]], processes: Processes) -> list[list[float]]:
    """Log-probabilities of each unit's rows, a unit at a time, the units shared among processes."""
    mine = []
    with reference(model, None if is_adapted(model) else model) as frozen, processes.autocast():
        for unit in units[processes.rank :: processes.world]:
            logps = row_logps(frozen, unit, pad_id, device=processes.device, budget=UNIT_TOKENS)
            mine.append(logps.float().tolist())
    computed: list[list[float]] = [[]] * len(units)
    for rank, part in enumerate(processes.gather(mine)):
        computed[rank :: processes.world] = part
    return computed


def _read_kept(file: Path, key: str) -> tuple[list[float], int] | None:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return (opened.get_tensor("logps").tolist(), int(metadata["reused"])) if metadata.get("key") == key else None
    except (OSError, SafetensorError, KeyError):
        return None
