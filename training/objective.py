"""What a method (SFT, the reward model, DPO) adds to the loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.processes import Sums

# Rows whose log-probabilities or scores show that a saved model is the trained one.
PROBED_ROWS = 4


class Objective(Protocol):
    """Items are known by index; each process knows all of them."""

    budget: int
    """Most tokens of one forward pass with gradients. The loop lowers it where memory runs out."""

    copies: int
    """How often each token of an item is computed, and held: once, or once for each adapter of an ensemble."""

    @property
    def keys(self) -> Sequence[str]:
        """What each item is called in its data file, for errors."""

    @property
    def weights(self) -> Sequence[float]:
        """How much of a batch each item is: its rankings, or 1."""

    @property
    def costs(self) -> Sequence[int]:
        """Tokens of each item."""

    @property
    def extra(self) -> Sequence[tuple[nn.Parameter, float]]:
        """Trained parameters outside the model, with their learning rates."""

    def denominator(self, indices: Sequence[int]) -> float:
        """What the summed loss of a whole batch is divided by. Depends on the items alone, so every process knows it."""

    def forward(self, indices: Sequence[int]) -> tuple[Tensor, Sums]:
        """Summed loss of these items, and sums for metrics (detached). May be called again for the same items: it counts nothing."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out items; the same on every process."""

    def evaluate_at_end(self) -> dict[str, float]:
        """More metrics, measured once, when training is over and the optimiser's memory is free; the same on every process."""

    def notes(self) -> dict[str, Any]:
        """JSON files that belong beside the model."""

    def load(self, folder: Path, device: torch.device) -> Any:
        """The saved model, as those who use it load it."""

    def probe(self, model: Any) -> Tensor:
        """What a model (the trained one, or a loaded one) says of a few rows: log-probabilities or scores, float32, without gradients."""
