"""AdamW with a schedule, gradient clipping, and steps that are skipped when they are not finite."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.checkpoint import load_optimiser_state, optimiser_state
from training.errors import InputError, TrainingFailed
from training.options import TrainingOptions
from training.processes import Processes
from training.schedule import learning_rate_share
from training.sharding import clip_gradients, start_zero
from training.zero import Zero

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
        """Args: steps: of the whole run, for the schedule;  extra: (parameter, peak learning rate) outside the module.

        With DeepSpeed, `start` has to be called before the first pass."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay, "peak": options.learning_rate},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "peak": options.learning_rate},
            *({"params": [parameter], "weight_decay": 0.0, "peak": peak} for parameter, peak in extra),
        ]
        self.model = module
        self.zero: Zero | None = None
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

    def start(self, processes: Processes) -> None:
        """Hand the model to DeepSpeed, if the launcher asked for that.

        Raises: InputError where it cannot train all that is to be trained.
        """
        if processes.sharding.startswith("zero") and self.extra:
            raise InputError(
                "DeepSpeed trains a model's own weights only, and this loss has a parameter beside it.",
                remedy="Set ties = 'half' or 'drop', or launch with alignment/launch/fsdp2.yaml.",
            )
        self.zero = start_zero(self.model, self.adamw, processes, max_norm=self.options.max_gradient_norm)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint. Every process comes here."""
        return self.zero.state(keep=dist.get_rank() == 0) if self.zero else optimiser_state(self.adamw)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self.zero:
            self.zero.load_state(tensors)
        else:
            load_optimiser_state(self.adamw, tensors)

    def clear(self) -> None:
        """Throw this batch's gradients away."""
        if self.zero:
            self.zero.step(skip=True)
        else:
            self.adamw.zero_grad(set_to_none=True)

    def room(self) -> list[Tensor]:
        """Memory as much as the two moments will take that the first step makes."""
        return [torch.empty_like(parameter) for parameter in [*self.trained, *self.extra] for _ in range(2)]

    def step(self, step: int, processes: Processes, *, blame: str = "") -> Update:
        """Sum gradients over processes, clip, move, and clear them. `step` counts from 0 and sets the learning rate.

        Args:   blame: what is known to be not finite (a loss may be, and its gradients not): the step is then skipped.
        Raises: TrainingFailed after ten steps in a row that are not finite.
        """
        share = learning_rate_share(
            min(step, self.steps - 1),
            steps=self.steps,
            warmup_steps=round(self.options.warmup_share * self.steps),
            kind=self.options.schedule,
            final_share=self.options.final_learning_rate_share,
        )
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * share
        norm = self._move(processes, skip=bool(blame))
        reason = blame or ("" if math.isfinite(norm) else "its gradients are not finite")
        self.skipped += bool(reason)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if reason else 0
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingFailed(
                f"{self.skipped_in_a_row} steps in a row were not finite. The last, step {step + 1}: {reason}.",
                remedy="Lower learning_rate, or set dtype = float32; the newest checkpoint holds the last good weights.",
            )
        return Update(norm, self.options.learning_rate * share, bool(reason), reason)

    def _move(self, processes: Processes, *, skip: bool) -> float:
        """Sum, clip, move if all is finite, clear. Returns: the norm before clipping."""
        if self.zero:
            return self.zero.step(skip=skip)
        processes.sum_gradients([*self.trained, *self.extra])
        norm = float(clip_gradients([*self.trained, *self.extra], self.options.max_gradient_norm or float("inf")))
        if math.isfinite(norm) and not skip:
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm
