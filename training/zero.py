"""DeepSpeed's ZeRO, stages 2 and 3, behind the same calls as FSDP2 (`training.sharding`): an engine for each trained model.

Stage 2 cuts optimiser states and gradients; stage 3 the weights too. DeepSpeed is an optional package, and is imported here only.
Gradients go through `backward`, because DeepSpeed averages over processes where Rankloop sums. Clipping, and passing over steps that are
not finite, are DeepSpeed's own here, over one norm of all weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from training.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
NEEDED = "deepspeed>=0.19"  # the first that leaves the number of micro-batches to its caller


def require_deepspeed(sharding: str) -> Any:
    """The package. Raises InputError where it is not installed."""
    if find_spec("deepspeed") is None:
        raise InputError(
            f"The launcher asks for {sharding}, and DeepSpeed is not installed.",
            remedy=f"pip install '{NEEDED}', or launch with alignment/launch/fsdp2.yaml, which needs nothing more.",
        )
    import deepspeed

    return deepspeed


class Zero:
    """One trained model's engine."""

    def __init__(self, root: nn.Module, adamw: torch.optim.Optimizer, *, stage: int, world: int, max_norm: float) -> None:
        """Args: root: the module all passes go through;  adamw: over the model's whole parameters, none of it stepped yet;
        max_norm: of the gradients, 0: no clipping."""
        deepspeed = require_deepspeed(f"zero{stage}")
        self.stage, self.world = stage, world
        self.parameters = [parameter for group in adamw.param_groups for parameter in group["params"]]
        self.adamw = adamw
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # `step` ends a batch, however many micro-batches it had
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,  # torch's AdamW, as everywhere else
            # Blocks of few tokens: nothing stays whole because it is small.
            "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        }
        self.engine = deepspeed.initialize(model=root, optimizer=adamw, config=config, dist_init_required=False)[0]
        self.zero = self.engine.optimizer
        self.gather = deepspeed.zero.GatheredParameters

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.world)

    def step(self, *, skip: bool) -> float:
        """End the batch. Returns: the norm of its gradients before clipping, not finite where nothing was changed.

        Args: skip: throw the gradients away although they may be finite (a loss was not)."""
        name = "scaled_global_norm" if self.stage == 2 else "_get_norm_groups"
        if skip:
            never = torch.tensor(float("nan"))
            setattr(self.zero, name, lambda *_, **__: never if self.stage == 2 else [never])
        try:
            self.engine.step()
        finally:
            if skip:
                delattr(self.zero, name)
        return float("nan") if self.zero.overflow else float(self.engine.get_global_grad_norm())

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Stage 3: all weights whole, gathered by one call, with the hooks that would free them again off. Stage 2: they are whole."""
        if self.stage == 2:
            yield
            return
        offload = self.zero.parameter_offload
        for parameter in offload.module.parameters():
            parameter.ds_active_sub_modules.clear()
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with self.gather(list(offload.module.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()

    def whole_weights(self, parameters: Mapping[str, nn.Parameter], *, keep: bool) -> dict[str, Tensor]:
        """On the CPU, one after the other. Every process comes here; those that do not `keep` them get empty tensors."""
        found = {}
        for name, parameter in parameters.items():
            with self.gather([parameter], enabled=self.stage == 3):
                found[name] = parameter.detach().to("cpu", copy=True) if keep else torch.empty(0)
        return found

    @torch.no_grad()
    def load_weights(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Both copies that ZeRO has: those the passes read, and those the optimiser moves."""
        for name, parameter in parameters.items():
            with self.gather([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(tensors[name])
            self._put(parameter, tensors[name], None)

    def state(self, *, keep: bool) -> dict[str, Tensor]:
        """As `training.checkpoint.optimiser_state`: `<index>.<name>`, whole. Every process comes here."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = next(iter(self.adamw.state.values()), None)
        if not flat:
            return {}
        self._link()
        tensors = {}
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, name)
                tensors[f"{index}.{name}"] = whole.reshape(shape_of(parameter)).cpu() if keep else torch.empty(0)
            tensors[f"{index}.step"] = flat["step"].detach().clone()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if not tensors:
            return
        flats = self.zero.single_partition_of_fp32_groups if self.stage == 2 else self.zero.fp32_partitioned_groups_flat
        for flat in flats:
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            self.adamw.state[flat] = {"step": tensors["0.step"].clone().to(flat.device), **moments}
        self._link()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                self._put(parameter, tensors[f"{index}.{name}"], name)

    def _link(self) -> None:
        """Stage 2 finds a parameter's moments by links that it makes after its first step, of the first group of parameters only."""
        if self.stage == 2:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _put(self, parameter: nn.Parameter, whole: Tensor, name: str | None) -> None:
        """This process's part of a moment, or (None) of the weights that the optimiser moves."""
        whole = whole.to(self.engine.device)
        if self.stage == 2:
            if parameter._hp_mapping is not None:  # type: ignore[attr-defined]  # None: another process has all of it
                parameter.set_full_hp_param(whole, name)  # type: ignore[attr-defined]
            return
        place = self.zero._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=name)[0]
        first = place.numel() * self.zero._get_param_partition_rank(parameter)
        part = whole.flatten()[first : first + place.numel()]
        place[: part.numel()].copy_(part)  # the last part may be filled up


def shape_of(parameter: Any) -> Sequence[int]:
    """Of the whole weight: while it is cut, stage 3 leaves an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)
