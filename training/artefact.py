"""A saved model is the trained model: shown after every run, not believed."""

import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from training.encode import Encoder
from training.errors import InputError, TrainingFailed
from training.gradients import free_memory, ran_out_of_memory
from training.language_model import is_quantised, save_model

# Differences allowed, as a share of the largest value: rounding of merged adapters; and of bfloat16 products with quantised weights.
ROUNDING = 1e-4
ROUNDING_QUANTISED = 2e-2


class Spoken(Protocol):
    """What a model says of a few rows, as those who use it would hear it."""

    def load(self, folder: Path, device: torch.device) -> Any:
        """The saved model."""

    def probe(self, model: Any) -> Tensor:
        """Log-probabilities or scores of a few rows by the trained model, or by the loaded one: float32, without gradients."""


def save_verified(
    spoken: Spoken, model: Any, encoder: Encoder, folder: Path, *, notes: dict[str, Any] | None = None, verify: bool = True
) -> tuple[str, str] | None:
    """Write the model's folder. Returns: None, or, if what was written is not the trained model, the error and its remedy; then it stands
    in `<folder>.refused` and the folder is not there."""
    save_model(model, encoder, folder, notes=notes)
    if not verify:
        return None
    try:
        verify_saved(spoken, model, folder, device=next(model.parameters()).device)
    except (TrainingFailed, InputError) as error:
        refused = refused_folder(folder)
        shutil.rmtree(refused, ignore_errors=True)
        folder.rename(refused)
        return f"{error} It stands in {refused}.", error.remedy
    return None


def refused_folder(folder: Path) -> Path:
    """Where a model is put that is not the trained one."""
    return folder.with_name(f"{folder.name}.refused")


def verify_saved(spoken: Spoken, model: Any, folder: Path, *, device: torch.device) -> None:
    """Load the folder again and compare what both models say of a few rows.

    The copy takes four bytes a parameter on `device`; where they are not to be had, it is loaded on the CPU.
    Raises: TrainingFailed if the saved model says something else, or cannot be loaded.
    """
    expected = spoken.probe(model).float().cpu()
    found = _said(spoken, folder, device)
    if found is None:
        free_memory()
        found = _said(spoken, folder, torch.device("cpu"))
    share = ROUNDING_QUANTISED if is_quantised(model) else ROUNDING
    allowed = share * float(expected.abs().max()) + 1e-6
    if found is None or found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
        said = "cannot be loaded in the memory there is" if found is None else f"gives other scores: {_some(found)}, not {_some(expected)}"
        raise TrainingFailed(
            f"The saved model {said}.",
            remedy="The newest checkpoint holds the trained weights. Ask for it again with other lora_targets, or verify_saved = false.",
        )


def _said(spoken: Spoken, folder: Path, device: torch.device) -> Tensor | None:
    """None where the memory for a second model is not there."""
    try:
        return spoken.probe(spoken.load(folder, device)).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return None


def _some(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values.flatten()[:4].tolist()) + "]"
