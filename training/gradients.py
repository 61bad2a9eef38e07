"""Gradients of one batch, a micro-batch at a time; where memory runs out, in smaller micro-batches.

The update does not depend on how a batch is cut, so a batch that did not fit is done again from its start with half the tokens a
micro-batch, and so is everything after it. All processes go down together, before gradients are summed; with a sharded model, whose
passes all processes make at once, the run ends instead, and says what to set.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from training.checkpoint import random_state, set_random_state
from training.errors import TrainingFailed
from training.objective import Objective
from training.optimiser import Optimiser
from training.pack import micro_batches
from training.processes import Processes, Sums, add_sums
from training.rundir import RunDirectory
from training.sharding import backward, in_step, keeps_step

NAMED_ITEMS = 5  # in one warning
# How allocators other than CUDA's own say it: torch's on the CPU, C++, and the libraries of matrices.
SIGNS_OF_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "could not create a memory",
)


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether less to compute at once could mend this error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_NO_MEMORY)


def free_memory() -> None:
    """Give back what a failed attempt left: cycles that an exception's frames are part of, then the allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(slots=True)
class Attempt:
    """One pass over a process's micro-batches. `failed` is the one that did not fit; `not_finite` are those of infinite or NaN loss."""

    sums: Sums = field(default_factory=dict)
    failed: list[int] | None = None
    not_finite: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Accumulated:
    """Gradients of this process's part of a batch lie on the parameters. `blame` says which items' loss is not finite, on any process."""

    sums: Sums
    tokens: float
    blame: str


class Gradients:
    """Makes the gradients of batches; `objective.budget` and `out_of_memory` (how often it was halved) are part of a checkpoint."""

    def __init__(self, model: Any, objective: Objective, processes: Processes, optimiser: Optimiser, run: RunDirectory) -> None:
        self.model = model
        self.objective = objective
        self.processes = processes
        self.optimiser = optimiser
        self.run = run
        self.out_of_memory = 0

    def accumulate(self, indices: Sequence[int], *, step: int) -> Accumulated:
        """Raises: TrainingFailed where a single item does not fit. `step` counts from 1."""
        mine = self._mine(indices)
        denominator, before = self.objective.denominator(indices), self.objective.budget
        while True:
            attempt = self._attempt(self._cut(mine), denominator)
            ran_out, wrong = self.processes.any(attempt.failed is not None, bool(attempt.not_finite))
            if not ran_out:
                break
            self._halve(attempt.failed, before, where=f"at step {step}")
        blame = self._blame(attempt.not_finite) if wrong else ""
        return Accumulated(attempt.sums, float(sum(self.objective.costs[index] for index in mine)), blame)

    def rehearse(self, batches: Sequence[Sequence[int]]) -> None:
        """Forward and backward of the heaviest micro-batch of all, thrown away: too little memory shows in the first second.

        Room for the optimiser's state, which the first step makes, is held meanwhile. Nothing that a step depends on is changed.
        """
        before, budget = random_state(), self.objective.budget
        shares = [self._mine(batch) for batch in batches]
        while True:
            attempt = self._attempt([max((part for share in shares for part in self._cut(share)), key=self._weight, default=[])], 1.0, True)
            self._clear()
            (ran_out,) = self.processes.any(attempt.failed is not None)
            if not ran_out:
                break
            self._halve(attempt.failed, budget, where="before step 1")
        set_random_state(before)

    def _mine(self, indices: Sequence[int]) -> list[int]:
        return self.processes.share(indices, [self.objective.costs[index] for index in indices])

    def _cut(self, mine: Sequence[int]) -> Iterator[list[int]]:
        budget = max(1, self.objective.budget // self.objective.copies)
        for places in micro_batches([self.objective.costs[index] for index in mine], budget=budget):
            yield [mine[place] for place in places]

    def _weight(self, part: Sequence[int]) -> tuple[int, int]:
        costs = [self.objective.costs[index] for index in part]
        return sum(costs), max(costs)

    def _attempt(self, parts: Sequence[list[int]] | Iterator[list[int]], denominator: float, rehearsal: bool = False) -> Attempt:
        attempt = Attempt()
        losses: list[tuple[Tensor, list[int]]] = []
        held: list[Tensor] = []
        for part in in_step(self.model, [part for part in parts if part]):  # none: fewer items than processes
            try:
                if rehearsal and not held:
                    held = self.optimiser.room()
                with self.processes.autocast():
                    loss, sums = self.objective.forward(part or self._lightest())
                backward(self.model, loss / denominator if part else 0.0 * loss)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                self._refuse_alone(part, rehearsal)
                attempt.failed = part
                return attempt
            if not part:
                continue
            losses.append((loss.detach(), part))
            add_sums(attempt.sums, sums)
        attempt.not_finite = [part for loss, part in losses if not torch.isfinite(loss)]
        return attempt

    def _lightest(self) -> list[int]:
        """What a process passes through a sharded model, and drops, while others still have micro-batches."""
        return [min(range(len(self.objective.costs)), key=self.objective.costs.__getitem__)]

    def _refuse_alone(self, failed: list[int] | None, rehearsal: bool) -> None:
        """A pass through a sharded model is made by all processes at once: one that breaks off cannot be made again by itself."""
        if keeps_step(self.model):
            raise TrainingFailed(
                f"Memory ran out {'before step 1' if rehearsal else 'in a step'}: {self._names(failed or self._lightest())}.",
                remedy=f"Set tokens_per_micro_batch below {self.objective.budget} (the update stays the same), or more processes.",
            )

    def _halve(self, failed: list[int] | None, before: int, *, where: str) -> None:
        """Every process comes here once one of them ran out of memory; `failed` is this one's micro-batch that did not fit, if any, and
        `before` the budget of earlier steps, which a run that ends here is resumed with."""
        self._clear()
        free_memory()
        copies = self.objective.copies
        mine = None if failed is None else (copies * sum(self.objective.costs[index] for index in failed), self._names(failed))
        told = [heard for heard in self.processes.gather(mine) if heard is not None]
        self.out_of_memory += 1
        objective = self.objective
        if objective.budget == 1:
            tokens, name = told[0]
            objective.budget = before
            raise TrainingFailed(
                f"Memory ran out {where}: {name} ({tokens} tokens) does not fit even alone.",
                remedy="Set gradient_checkpointing = true or lora_rank, lower max_prompt_tokens or max_completion_tokens.",
            )
        objective.budget = max(1, min(objective.budget, max(tokens for tokens, _ in told)) // 2)
        text = f"memory ran out {where}: from now on micro-batches of {objective.budget} tokens; the update stays the same"
        self.run.event("warning", text=text, out_of_memory=self.out_of_memory)

    def _clear(self) -> None:
        self.optimiser.clear()

    def _blame(self, parts: list[list[int]]) -> str:
        names = [self._names(part) for part in parts]
        return "the loss of " + ", ".join(name for told in self.processes.gather(names) for name in told) + " is not finite"

    def _names(self, part: Sequence[int]) -> str:
        more = len(part) - NAMED_ITEMS
        return ", ".join(self.objective.keys[index] for index in part[:NAMED_ITEMS]) + (f" and {more} more" if more > 0 else "")
