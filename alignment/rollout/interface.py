"""What the trainer asks of whoever writes completions, and what an engine needs to know of the run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from alignment.rollout.sampling import Sample, Sampling
from training.encode import Encoder
from training.errors import TrainingFailed
from training.processes import Processes


class Engine(Protocol):
    """`exact`: whether its log-probabilities are those that the trainer itself would compute, but for rounding."""

    exact: bool

    def refresh(self, model: Any) -> None:
        """Write with the weights that `model` has now: before the first completions, and whenever they have changed."""

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, streams: Sequence[int] | None = None
    ) -> list[Sample]:
        """`samples` completions of each prompt, in the order of the prompts; arguments as in `built_in.sample_completions`."""

    def close(self) -> None:
        """Let go of what it holds. Nothing may be asked of it afterwards."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine works. `model`: the folder or name that training starts from;  `scratch`: a folder for weights on their way, which
    a server must see under the same path;  `url`: of a server."""

    model: str
    encoder: Encoder
    processes: Processes
    scratch: Path
    url: str = ""


def unknown_entropies(length: int) -> torch.Tensor:
    """Engines that do not tell entropies give NaN, which no mean takes for a number."""
    return torch.full((length,), math.nan)


def stream_seed(sampling: Sampling, stream: int) -> int:
    """A seed below 2^31 for one prompt of one step: it depends on (seed, step, stream) alone."""
    return int(np.random.SeedSequence([sampling.seed, sampling.step, stream]).generate_state(1)[0]) >> 1


def checked_sample(number: int, prompt: Sequence[int], ids: list[int], logps: Sequence[float], stop_ids: Any) -> Sample:
    """A Sample of what another engine answered.

    Raises:  TrainingFailed if that is not a completion with a finite log-probability for each token.
    """
    values = torch.tensor([math.nan if value is None else float(value) for value in logps], dtype=torch.float32)
    if not ids or len(ids) != len(values) or not bool(values.isfinite().all()):
        raise TrainingFailed(
            f"The engine answered {len(ids)} tokens with {int(values.isfinite().sum())} finite log-probabilities.",
            remedy="Set engine = 'built_in', or look at the engine's own log.",
        )
    return Sample(
        sample=number,
        prompt_ids=prompt,
        completion_ids=ids,
        logps=values,
        entropies=unknown_entropies(len(ids)),
        finished=ids[-1] in stop_ids,
    )
