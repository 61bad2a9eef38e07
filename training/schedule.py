"""Learning rate over a run: linear warm-up, then cosine, linear or constant."""

import math


def learning_rate_share(step: int, *, steps: int, warmup_steps: int, kind: str, final_share: float) -> float:
    """Share of the peak learning rate at a step, in (0, 1].

    Args:    step: from 0 to steps - 1;  warmup_steps: the share rises as (step + 1) / (warmup_steps + 1);
             kind: "cosine", "linear" or "constant";  final_share: what cosine and linear end at.
    Raises:  ValueError for an unknown kind or a step out of range.
    """
    if not 0 <= step < max(steps, 1):
        raise ValueError(f"step {step} is not in 0..{steps - 1}")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - (1.0 - final_share) * done
    if kind == "cosine":
        return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown schedule {kind!r}: use cosine, linear or constant")
