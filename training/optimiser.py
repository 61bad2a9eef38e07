"""AdamW with a schedule, gradient clipping, and steps that are skipped when they are not finite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from training.errors import TrainingFailed
from training.options import TrainingOptions
from training.processes import Processes
from training.schedule import learning_rate_share

MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Update:
    """What one step did. `gradient_norm` is before clipping; a skipped step changed nothing."""

    gradient_norm: float
    learning_rate: float
    skipped: bool


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

    def step(self, step: int, processes: Processes) -> Update:
        """Sum gradients over processes, clip, move, and clear them. `step` counts from 0 and sets the learning rate.

        Raises: TrainingFailed after ten steps in a row without finite gradients.
        """
        processes.sum_gradients([*self.trained, *self.extra])
        limit = self.options.max_gradient_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_([*self.trained, *self.extra], limit))
        share = learning_rate_share(
            min(step, self.steps - 1),
            steps=self.steps,
            warmup_steps=round(self.options.warmup_share * self.steps),
            kind=self.options.schedule,
            final_share=self.options.final_learning_rate_share,
        )
        finite = norm - norm == 0.0
        if finite:
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
                f"{MOST_SKIPPED_IN_A_ROW} steps in a row had gradients that are not finite (the last: step {step + 1}).",
                remedy="Lower learning_rate, or set dtype = float32; the newest checkpoint holds the last good weights.",
            )
        return Update(norm, self.options.learning_rate * share, not finite)
