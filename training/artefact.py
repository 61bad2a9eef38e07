"""A saved model is the trained model: shown after every run of SFT, reward and DPO, not believed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import TrainingFailed
from training.gradients import free_memory, ran_out_of_memory
from training.language_model import is_quantised
from training.objective import Objective

# Differences allowed, as a share of the largest value: rounding of merged adapters; and of bfloat16 products with quantised weights.
ROUNDING = 1e-4
ROUNDING_QUANTISED = 2e-2


def refused_folder(folder: Path) -> Path:
    """Where a model is put that is not the trained one."""
    return folder.with_name(f"{folder.name}.refused")


def verify_saved(objective: Objective, model: Any, folder: Path, *, device: torch.device) -> None:
    """Load the folder again and compare what both models say of a few rows.

    The copy takes four bytes a parameter on `device`; where they are not to be had, it is loaded on the CPU.
    Raises: TrainingFailed if the saved model says something else, or cannot be loaded.
    """
    expected = objective.probe(model).float().cpu()
    found = _said(objective, folder, device)
    if found is None:
        free_memory()
        found = _said(objective, folder, torch.device("cpu"))
    share = ROUNDING_QUANTISED if is_quantised(model) else ROUNDING
    allowed = share * float(expected.abs().max()) + 1e-6
    if found is None or found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
        said = "cannot be loaded in the memory there is" if found is None else f"gives other scores: {_some(found)}, not {_some(expected)}"
        raise TrainingFailed(
            f"The saved model {said}.",
            remedy="The newest checkpoint holds the trained weights. Ask for it again with other lora_targets, or verify_saved = false.",
        )


def _said(objective: Objective, folder: Path, device: torch.device) -> Tensor | None:
    """None where the memory for a second model is not there."""
    try:
        return objective.probe(objective.load(folder, device)).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return None


def _some(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values.flatten()[:4].tolist()) + "]"
