"""KL(policy || reference) on what the policy itself writes: measured once, when training is over."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alignment.rollout.built_in import sample_completions
from alignment.rollout.sampling import Sampling
from training.encode import Encoder
from training.errors import InputError, TrainingFailed
from training.gradients import ran_out_of_memory
from training.language_model import reference
from training.processes import Processes
from training.row_logps import row_logps

# One stream of random numbers, apart from those of generation and evaluation.
STREAM = 2**31 - 2


def own_kl(
    policy: Any,
    load_reference: Callable[[], Any | None],
    encoder: Encoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    budget: int,
    processes: Processes,
) -> dict[str, float]:
    """The estimator k1 over one completion a prompt, drawn from the policy: unbiased for the KL of whole completions.

    Units:   nats a completion.
    Args:    load_reference: gives the reference, or None: the policy with its adapter off;  prompts: token ids, the same on every process;
             sampling: exact, at the temperature whose distribution is meant;  budget: tokens of one forward pass.
    Returns: kl_k1_nats, kl_k1_nats_low, kl_k1_nats_high (95 %, normal; prompts are independent); {} without prompts.
    Raises:  InputError, on every process, for whatever keeps one of them from measuring: a model with recurrent layers, logits that are
             not finite, too little memory.
    Source:  J. Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    if not prompts:
        return {}
    sampling.require_exact()
    places = processes.share(range(len(prompts)), [float(len(prompt)) for prompt in prompts])
    mine: dict[int, float] = {}
    why = ""
    try:
        frozen = load_reference()
        drawn = sample_completions(
            policy,
            [prompts[place] for place in places],
            sampling,
            stop_ids=encoder.stop_ids,
            pad_id=encoder.pad_id,
            streams=places,
            processes=processes,
        )
        rows = [sample.row for sample in drawn]
        with torch.no_grad(), processes.autocast():
            # Both by the same kind of pass, so that equal models have a KL of exactly 0 in any dtype.
            ours = row_logps(policy, rows, encoder.pad_id, device=processes.device, budget=budget)
            with reference(policy, frozen) as model:
                theirs = row_logps(model, rows, encoder.pad_id, device=processes.device, budget=budget)
        mine = dict(zip(places, (ours - theirs).double().tolist(), strict=True))
    except (InputError, TrainingFailed) as known:
        why = str(known)
    except (RuntimeError, MemoryError) as crash:
        if not ran_out_of_memory(crash):
            raise
        why = "memory ran out"
    parts = processes.gather((mine, why))
    if reasons := [told for _, told in parts if told]:
        raise InputError(reasons[0])
    k1 = [value for _, value in sorted(pair for part, _ in parts for pair in part.items())]
    mean = sum(k1) / len(k1)
    error = math.sqrt(sum((value - mean) ** 2 for value in k1) / max(1, len(k1) - 1) / len(k1))
    return {"kl_k1_nats": mean, "kl_k1_nats_low": mean - 1.96 * error, "kl_k1_nats_high": mean + 1.96 * error}
