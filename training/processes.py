"""A thin layer over accelerate: rank, device, dtype, and sums over all processes.

Gradients are summed by one call after the last micro-batch, not by DistributedDataParallel: processes may then hold different numbers of
micro-batches (or none), and every loss is divided by denominators of the whole batch, so N processes compute what one would.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.errors import InputError
from training.launched import Sharding, take_sharding

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20

Sums = dict[str, tuple[float | Tensor, float | Tensor]]  # metric -> (numerator, denominator)


class Processes:
    """This process among its fellows. With one process every sum is the identity."""

    def __init__(self, dtype: str = "auto") -> None:
        """Args: dtype: "auto" (bfloat16 autocast where the device has it, float32 on CPU), "float32" or "bfloat16"."""
        several = int(os.environ.get("WORLD_SIZE", "1"))
        asked = take_sharding(os.environ)
        self.sharding: Sharding = asked if several > 1 else "none"
        self.accelerator = Accelerator(cpu=several > 1 and not torch.cuda.is_available())
        self.device = torch.device("cpu") if self.accelerator.device.type == "cpu" else self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        if self.world != several:  # else each process would be alone, do all of the work, and write over the others
            raise InputError(
                f"{several} processes were started, but {self.world} found each other.", remedy="Start them by accelerate launch."
            )
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        self.dtype = "bfloat16" if dtype == "bfloat16" or (dtype == "auto" and has_bf16) else "float32"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Around each forward pass: bfloat16 matrices on float32 weights where `dtype` says so."""
        if self.dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def share(self, items: Sequence[T], costs: Sequence[float]) -> list[T]:
        """This process's part of a batch: heaviest first, always to the process with the least so far. Same answer on every process."""
        if self.world == 1:
            return list(items)
        loads = [0.0] * self.world
        mine: list[T] = []
        for index in sorted(range(len(items)), key=lambda index: (-costs[index], index)):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            if rank == self.rank:
                mine.append(items[index])
        return mine

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over all processes (a new tensor)."""
        total = tensor.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum `.grad` over all processes, in buckets. A process that computed nothing takes part with zeros.

        Those of a sharded model were summed in the backward pass.
        """
        if self.world == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad and not isinstance(parameter, DTensor)]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        size = 0
        for index, parameter in enumerate(trained):
            assert parameter.grad is not None
            bucket.append(parameter.grad)
            size += parameter.grad.numel() * parameter.grad.element_size()
            if size >= BUCKET_BYTES or index == len(trained) - 1:
                flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
                dist.all_reduce(flat)
                for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                    gradient.copy_(summed.view_as(gradient))
                bucket, size = [], 0

    def metrics(self, sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """Numerators and denominators summed apart over all processes, then divided. A denominator of 0 leaves the metric out."""
        local = {name: (float(top), float(bottom)) for name, (top, bottom) in sums.items()}
        totals: dict[str, list[float]] = {}
        for part in self.gather(local):
            for name, (top, bottom) in part.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += top
                total[1] += bottom
        return {name: top / bottom for name, (top, bottom) in totals.items() if bottom}

    def gather(self, value: T) -> list[T]:
        """One picklable value of each process, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is set on any process: all of them then do the same."""
        if self.world == 1:
            return flags
        return tuple((self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device)) > 0).tolist())

    def same_start(self, modules: Iterable[nn.Module]) -> None:
        """Give every process the weights of process 0. What is sharded already had them when it was cut."""
        if self.world > 1:
            for module in modules:
                for tensor in [*module.parameters(), *module.buffers()]:
                    if not isinstance(tensor, DTensor):
                        dist.broadcast(tensor.detach(), src=0)

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.accelerator.end_training()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def add_sums(total: Sums, part: Mapping[str, tuple[Any, Any]]) -> None:
    """Add one micro-batch's sums to the running ones, in place."""
    for name, (top, bottom) in part.items():
        old_top, old_bottom = total.get(name, (0.0, 0.0))
        total[name] = (old_top + top, old_bottom + bottom)
