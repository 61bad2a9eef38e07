"""Checkpoints that are whole or absent, verified before use, and hold nothing that could run code: safetensors and JSON only."""

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.errors import InputError
from training.rundir import checkpoint_folders, file_digest, replace_folder, sync_folder
from training.sharding import cut_like, whole, zero_of
from training.zero import shape_of

CHECKPOINT_FORMAT = "rankloop.checkpoint/1"


@dataclass(slots=True)
class State:
    """Everything a run needs to go on: named groups of tensors (one safetensors file each) and plain values (state.json)."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(root: Path, step: int, state: State, *, keep: int = 2) -> Path:
    """Write `root/step-<step>` beside its place, flush it to disk, rename it, and remove all but the newest `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob(".step-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    beside, final = root / f".step-{step}.new", root / f"step-{step}"
    beside.mkdir()
    for name, tensors in state.tensors.items():
        cpu = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        save_file(cpu, beside / f"{name}.safetensors")
    (beside / "state.json").write_text(json.dumps(state.values, sort_keys=True), encoding="utf-8")
    files = {}
    for file in sorted(beside.iterdir()):
        files[file.name] = {"digest": file_digest(file), "bytes": file.stat().st_size}
        _sync_file(file)
    manifest = beside / "manifest.json"
    manifest.write_text(json.dumps({"format": CHECKPOINT_FORMAT, "step": step, "files": files}, indent=2, sort_keys=True), encoding="utf-8")
    _sync_file(manifest)
    sync_folder(beside)
    replace_folder(beside, final)
    for old in checkpoint_folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_checkpoint(folder: Path) -> tuple[int, State]:
    """(step, state). Raises ValueError if a file is missing or differs from its digest in the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if file_digest(folder / name) != expected["digest"]:
                raise ValueError(f"{name} differs from its digest in manifest.json")
        tensors = {Path(name).stem: load_file(folder / name) for name in manifest["files"] if name.endswith(".safetensors")}
        values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return int(manifest["step"]), State(tensors, values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is not a whole checkpoint: {error}") from error


def restore_newest(root: Path, warn: Callable[[str], None]) -> tuple[int, State] | None:
    """The newest checkpoint whose digests hold; each one that fails is told to `warn` and passed over. None if there is none."""
    _finish_replacing(root)
    for folder in reversed(checkpoint_folders(root)):
        try:
            return read_checkpoint(folder)
        except ValueError as error:
            warn(f"checkpoint passed over: {error}")
    return None


def _finish_replacing(root: Path) -> None:
    """A kill between the two renames of `replace_folder` leaves a checkpoint under neither name: the new one takes its place, or the
    old."""
    for suffix in ("new", "old"):
        for beside in root.glob(f".step-*.{suffix}"):
            final = beside.with_name(beside.name.removeprefix(".").removesuffix(f".{suffix}"))
            if (beside / "manifest.json").is_file() and not final.exists():
                with suppress(OSError):  # another process of the run was first
                    beside.rename(final)


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name; sharded ones whole, on process 0. Every process comes here."""
    zero = zero_of(module)
    return zero.whole_weights(_trained(module), keep=dist.get_rank() == 0) if zero else whole(_trained(module))


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def load_trained(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `trained_tensors` back. Raises InputError if names or shapes are not this module's."""
    own = _trained(module)
    if own.keys() != tensors.keys() or any(shape_of(own[name]) != tensors[name].shape for name in own):
        raise InputError("The checkpoint belongs to another model or other LoRA options.", remedy="Start a new run directory.")
    if zero := zero_of(module):
        zero.load_weights(own, tensors)
        return
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(cut_like(tensors[name], parameter))


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of each parameter, flattened to `<index>.<name>`. Learning rates are not state: the schedule sets them each step.

    Of sharded parameters it is whole, on process 0. Every process comes here.
    """
    tensors = {}
    for index, parameter in enumerate(_parameters(optimiser)):
        for name, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{index}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    return whole(tensors)


def load_optimiser_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = _parameters(optimiser)
    optimiser.state.clear()
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        optimiser.state[parameter][name] = cut_like(value.clone(), parameter)


def _parameters(optimiser: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def random_state() -> dict[str, Tensor]:
    """States of torch's, NumPy's and Python's generators as tensors."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),  # type: ignore[index, call-overload]
        "numpy_pos": torch.tensor(int(numpy_state["state"]["pos"])),  # type: ignore[index, call-overload]
    }
    if gauss is not None:
        state["python_gauss"] = torch.tensor(gauss, dtype=torch.float64)
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = float(state["python_gauss"]) if "python_gauss" in state else None
    random.setstate((version, tuple(internal), gauss))
    key = state["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(state["numpy_pos"]), 0, 0.0))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
