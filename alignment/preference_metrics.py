"""What preference training tells of itself: chosen and rejected apart, because a growing margin hides that both fall."""

import torch
from torch import Tensor

from alignment.loss_kinds import LOSS_KINDS
from alignment.losses import Compared, rewards
from alignment.options import DPOOptions
from training.processes import Sums
from training.rundir import RunDirectory

# Two log-probabilities of one completion that differ by less than this share are the same number, rounded differently: the policy and its
# reference are equal before the first step, but they are computed in other batches.
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-3}
# Chosen completions have become e times less likely than at the start: seen in training long before the text gets worse.
FALL_NATS = 1.0


def blur(batch: Compared, options: DPOOptions, *, dtype: str) -> Tensor:
    """(B, K): how far rounding alone may move each implicit reward. Two that are no further apart than both together are equal."""
    kind = LOSS_KINDS[options.loss]
    if not kind.reference:
        return torch.zeros_like(batch.logps)
    nats = ROUNDING[dtype] * batch.reference.abs()
    return options.beta * (nats / batch.tokens if kind.per_token or options.length_normalised else nats)


def preference_sums(batch: Compared, options: DPOOptions, *, dtype: str) -> Sums:
    """Numerators and denominators over the weighted preference pairs of a batch, detached; a sum over micro-batches and processes is right.

    accuracy: share of pairs with the higher implicit reward for the chosen one, equal ones count one half;  margin: difference of implicit
    rewards;  chosen_logps, rejected_logps: nats for a completion;  chosen_log_ratio, rejected_log_ratio: the same above the reference;
    nll: nats per token of the best bands. No tied pair is among them.
    """
    strict = batch.wins if batch.strict is None else batch.strict
    logps, ratios, weight = batch.logps.detach(), (batch.logps - batch.reference).detach(), strict.sum()
    points, rough = rewards(batch, options).detach(), blur(batch, options, dtype=dtype)
    margins = points[:, :, None] - points[:, None, :]
    signs = margins.sign() * (margins.abs() > rough[:, :, None] + rough[:, None, :])
    chosen, rejected = strict.sum(2), strict.sum(1)
    sums: Sums = {
        "accuracy": ((strict * (signs + 1) / 2).sum(), weight),
        "margin": ((strict * margins).sum(), weight),
        "chosen_logps": ((chosen * logps).sum(), weight),
        "rejected_logps": ((rejected * logps).sum(), weight),
        "chosen_log_ratio": ((chosen * ratios).sum(), weight),
        "rejected_log_ratio": ((rejected * ratios).sum(), weight),
    }
    if batch.best is not None:
        sums["nll"] = (-(batch.best * logps / batch.tokens).sum(), batch.best.sum())
    return sums


class ChosenWatch:
    """Warns, once, when the chosen completions have become clearly less likely than they were at the start."""

    def __init__(self, run: RunDirectory, *, start: float | None) -> None:
        """Args: start: chosen log-ratio at the start (0 where the reference is the policy's own start); None: as first reported."""
        self.run = run
        before = run.read_events()[0]  # of a run that resumes
        first: dict[str, float] = next((event["metrics"] for event in before if event["kind"] == "step"), {})
        self.start = first.get("chosen_log_ratio") if start is None else start
        self.warned = any(event.get("chosen_fell") for event in before)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """`metrics`: of a step event, over all processes."""
        now = metrics.get("chosen_log_ratio")
        if now is None or self.warned:
            return
        if self.start is None:
            self.start = now
        if now < self.start - FALL_NATS:
            self.warned = True
            self.run.event(
                "warning",
                chosen_fell=True,
                text=f"at step {step} the chosen completions are {self.start - now:.1f} nats less likely than at the start (rejected ones: "
                f"log-ratio {metrics['rejected_log_ratio']:.1f}). If the policy should write what was chosen: sft_weight of 0.1 to 1, "
                "loss = apo_zero, a higher beta, or a lower learning_rate.",
            )
