"""AdamW with a schedule, gradient clipping, and steps that are skipped when they are not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.errors import TrainingFailed
from training.options import TrainingOptions
from training.processes import Processes
from training.schedule import learning_rate_share
from training.sharding import clip_gradients

MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did. `gradient_norm` is before clipping; a skipped step changed nothing, for the `reason`."""

    gradient_norm: float
    learning_rate: float
    skipped: bool
    reason: str = ""


class Optimiser:
    """Steps over all trained parameters of a module, and over `extra` ones at a learning rate of their own."""

    def __init__(
        self, module: nn.Module, options: TrainingOptions, *, steps: int, extra: Sequence[tuple[nn.Parameter, float]] = ()
    ) -> None:
        """Args: steps: of the whole run, for the schedule;  extra: (parameter, peak learning rate) outside the module."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay, "peak": options.learning_rate},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "peak": options.learning_rate},
            *({"params": [parameter], "weight_decay": 0.0, "peak": peak} for parameter, peak in extra),
        ]
        self.trained = trained
        self.extra = [parameter for parameter, _ in extra]
        self.options = options
        self.steps = steps
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            fused=True,
        )

    def room(self) -> list[Tensor]:
        """Memory as much as the two moments will take that the first step makes."""
        return [torch.empty_like(parameter) for parameter in [*self.trained, *self.extra] for _ in range(2)]

    def step(self, step: int, processes: Processes, *, blame: str = "") -> Update:
        """Sum gradients over processes, clip, move, and clear them. `step` counts from 0 and sets the learning rate.

        Args:   blame: what is known to be not finite (a loss may be, and its gradients not): the step is then skipped.
        Raises: TrainingFailed after ten steps in a row that are not finite.
        """
        processes.sum_gradients([*self.trained, *self.extra])
        limit = self.options.max_gradient_norm or float("inf")
        norm = float(clip_gradients([*self.trained, *self.extra], limit))
        share = learning_rate_share(
            min(step, self.steps - 1),
            steps=self.steps,
            warmup_steps=round(self.options.warmup_share * self.steps),
            kind=self.options.schedule,
            final_share=self.options.final_learning_rate_share,
        )
        reason = blame or ("" if math.isfinite(norm) else "its gradients are not finite")
        if not reason:
            for group in self.adamw.param_groups:
                group["lr"] = group["peak"] * share
            self.adamw.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.adamw.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"{self.skipped_in_a_row} steps in a row were not finite. The last, step {step + 1}: {reason}.",
                remedy="Lower learning_rate, or set dtype = float32; the newest checkpoint holds the last good weights.",
            )
        return Update(norm, self.options.learning_rate * share, bool(reason), reason)
