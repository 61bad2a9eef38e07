"""Weights spread over the processes of a run (FSDP2, or DeepSpeed: `training.zero`), and gathered where they are needed whole.

Two rules make N processes compute what one would. **In training** every pass through a sharded model gathers and frees the weights block by
block, all processes at once: so all make the same number of passes, and one with nothing left to do makes passes over two tokens whose
result nobody takes (`in_step`). **Without gradients** (rollouts, evaluations, saving) the weights are gathered once and stay whole
meanwhile, so that processes may do different work (`gathered`).

Gradients are summed, not averaged: losses are divided by denominators of the whole batch. A process holds each model whole while it is
loaded and while it is gathered: 4 bytes a parameter; gradients and optimiser states are never whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.errors import InputError
from training.processes import Processes
from training.zero import Zero, require_deepspeed

T = TypeVar("T")
P = ParamSpec("P")
ENTRY = "_rankloop_entry"


class Entry(nn.Module):
    """The root that FSDP2 sees. A model is called in parts (backbone, then head), which a root around `forward` alone would not hold
    together: embeddings and head, tied or not, would be parts of different groups. Here the parts run inside one call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.zero: Zero | None = None  # DeepSpeed's engine, once there is an optimiser
        self.whole = False  # gathered, for as long as `gathered` says
        self.inside = False  # in a pass

    def forward(self, compute: Callable[[], T]) -> T:
        return compute()

    def run(self, compute: Callable[[], T]) -> T:
        return (self.zero.engine if self.zero else self)(compute)

    def parts(self) -> list[Any]:
        """Everything that is gathered by itself: the blocks, and what is left."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]


def shard(model: Any, processes: Processes) -> None:
    """Spread a model's weights over the processes, block by block, as the launcher asked (else nothing is done).

    Every process comes here with the model loaded on its device, before an optimiser sees its parameters.
    Raises:  InputError for quantised weights.
    """
    if processes.sharding == "none" or entry_of(model) is not None:
        return
    if processes.sharding != "fsdp2":
        _leave_to_zero(model, processes)
        return
    plain = _inside(model)
    if getattr(plain, "hf_quantizer", None) is not None:
        raise InputError("Quantised weights cannot be sharded.", remedy="Leave out quantise, or launch with alignment/launch/ddp.yaml.")
    processes.same_start([model])
    entry = Entry(plain)
    hooks = {module: set(module._state_dict_pre_hooks) for module in plain.modules()}
    mesh = dist.init_device_mesh(processes.device.type, (processes.world,))
    for block in blocks(plain):
        fully_shard(block, mesh=mesh)
    fully_shard(entry, mesh=mesh)
    for part in entry.parts():
        part.set_gradient_divide_factor(1.0)
        if processes.device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # Between two passes everything is in shards, so that the optimiser never meets a whole weight.
    _parts_of(entry).set_reshard_after_forward(True)
    plain.__dict__[ENTRY] = entry  # not as a submodule: the entry holds the model, not the other way round
    with torch.no_grad():
        entry(lambda: None)  # the first to be called is the root
    for module, own in hooks.items():  # FSDP2's would cut gathered weights again while they are saved
        for key in set(module._state_dict_pre_hooks) - own:
            del module._state_dict_pre_hooks[key]


def _leave_to_zero(model: Any, processes: Processes) -> None:
    """DeepSpeed cuts a model when its optimiser is there (`start_zero`), and models that are trained only."""
    require_deepspeed(processes.sharding)
    plain = _inside(model)
    if getattr(plain, "hf_quantizer", None) is not None:
        raise InputError("Quantised weights cannot be sharded.", remedy="Leave out quantise, or launch with alignment/launch/ddp.yaml.")
    if any(parameter.requires_grad for parameter in model.parameters()):
        processes.same_start([model])
        entry = plain.__dict__[ENTRY] = Entry(plain)
        entry.whole = True


def start_zero(model: Any, adamw: torch.optim.Optimizer, processes: Processes, *, max_norm: float) -> Zero | None:
    """DeepSpeed's engine over a model that `shard` left to it; None for any other."""
    entry = entry_of(model)
    if entry is None or processes.sharding not in ("zero2", "zero3"):
        return None
    entry.zero = Zero(entry, adamw, stage=int(processes.sharding[-1]), world=processes.world, max_norm=max_norm)
    entry.whole = False
    return entry.zero


def zero_of(model: Any) -> Zero | None:
    """DeepSpeed's engine of a model whose weights are cut (or would be, in stage 3)."""
    entry = entry_of(model)
    return entry.zero if entry and not entry.whole else None


def backward(model: Any, loss: Tensor) -> None:
    """`loss.backward()`, by the engine where the model has one."""
    if zero := zero_of(model):
        zero.backward(loss)
    else:
        loss.backward()


def blocks(plain: nn.Module) -> list[nn.Module]:
    """The repeated layers: those the architecture names as never to be split, else the members of its longest list of modules."""
    named = set(getattr(plain, "_no_split_modules", None) or ())
    found = [module for module in plain.modules() if type(module).__name__ in named]
    within = {id(inner) for module in found for inner in module.modules() if inner is not module}
    found = [module for module in found if id(module) not in within]
    lists = [list(module) for module in plain.modules() if isinstance(module, nn.ModuleList)]
    return found or max(lists, key=len, default=[])


def entry_of(model: Any) -> Entry | None:
    """None for a model that every process holds whole."""
    return _inside(model).__dict__.get(ENTRY)


def _inside(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parts_of(entry: Entry) -> Any:
    return entry  # `fully_shard` made it an FSDPModule, which its class does not say


def one_pass(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """For a function whose first argument is a model: everything in it is one pass, which a sharded model's weights are there for.

    It may call the backbone several times, if `in_step` says how often. Gradients flow through what it returns.
    """

    @wraps(function)
    def run(model: Any, *args: P.args, **given: P.kwargs) -> T:
        entry = entry_of(model)
        if entry is None or entry.whole or entry.inside:
            return function(model, *args, **given)
        entry.inside = True
        try:
            # In a closure: FSDP2 looks through arguments, and would copy long lists of rows.
            return entry.run(lambda: function(model, *args, **given))
        finally:
            entry.inside = False
            if (
                not entry.zero and not torch.is_grad_enabled()
            ):  # no backward pass will tidy up; what is left would make it fetch the wrong blocks
                _parts_of(entry).reset_iter_state()

    return run


def in_step(model: Any, parts: Sequence[T]) -> list[T | None]:
    """The parts of a loop over passes, and None for each pass that is made only because another process has one more part."""
    entry = entry_of(model)
    if entry is None or entry.whole:
        return list(parts)
    most = torch.tensor(len(parts), device=next(entry.parameters()).device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [*parts, *[None] * (int(most) - len(parts))]


def keeps_step(model: Any) -> bool:
    """Whether passes with gradients are made by all processes at once."""
    entry = entry_of(model)
    return entry is not None and not entry.whole


@contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """The whole weights on every process, gathered once, until the end of the block; no gradients inside. Every process comes here.

    Models that are not sharded (or are gathered already, or None) stay as they are.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for model in models:
            entry = None if model is None else entry_of(model)
            if entry is not None and not entry.whole:
                stack.enter_context(entry.zero.gathered() if entry.zero else _unsharded(entry))
                entry.whole = True
                stack.callback(setattr, entry, "whole", False)
        yield


@contextmanager
def _unsharded(entry: Entry) -> Iterator[None]:
    for part in entry.parts():
        part.unshard()
    _parts_of(entry).set_reshard_after_forward(False)
    try:
        yield
    finally:
        _parts_of(entry).set_reshard_after_forward(True)
        _parts_of(entry).reset_iter_state()  # also cuts the weights again


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors as whole ones on the CPU of process 0 (elsewhere empty), one after the other. Every process comes here."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return dict(tensors)
    main = dist.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor
        found[name] = full.to("cpu") if main else torch.empty(0)
        del full
    return found


def cut_like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's part of a whole tensor that every process has, cut as `other` is; without any communication."""
    placed = tensor.to(other.device)
    if isinstance(other, DTensor) and placed.shape == other.shape:
        return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None).clone()  # not a view of the whole
    return placed


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `limit`. Returns: the norm before, the same on every process."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    rest = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    norms = []
    for group in (sharded, rest):
        if gradients := [parameter.grad for parameter in group if parameter.grad is not None]:
            norm = nn.utils.get_total_norm(gradients)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).square().sum().sqrt() if norms else torch.zeros(())
    scale = min(1.0, limit / (float(total) + 1e-6)) if bool(total.isfinite()) else 1.0  # a step that is not finite is skipped
    if scale < 1.0:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return total
