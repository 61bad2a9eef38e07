"""Guards of a PPO run: what ruins a policy is seen while it happens, and named with a remedy. Pure: numbers in, alarms out.

Each guard says its alarm once, and again only after it had gone away by a margin: a number that trembles around its limit is one alarm.
What the guards remember is plain JSON and belongs into the checkpoint, so that a resumed run raises the alarms of one that never ended.

Sources: Gao et al. 2022, arXiv:2210.10760 (over-optimisation); Coste et al. 2023, arXiv:2310.02743 (ensembles that show it).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.options import TrainingOptions, require

# An alarm has gone away when its number is a tenth better than the limit.
MARGIN = 0.1
# Non-finite updates are counted over so many steps; before there are as many, the missing ones count as good.
WINDOW_STEPS = 20
# In units of the reward model's spread over its training completions: a smaller fall of the pessimistic score is the draw of the prompts.
LEAST_FALL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions(TrainingOptions):
    """When PPO raises an alarm, and what follows. 0 switches a guard off.

    The limits are those at which no ordinary run arrives; a run that must not go so far has a tighter one set, with `on_alarm`."""

    # warn: say it and go on. stop: checkpoint and end as failed. rollback: back to the weights, optimisers and KL coefficient of the last
    # evaluation without an alarm, on with the next prompts and twice the KL coefficient. Warn by default: only a person knows the task.
    on_alarm: Literal["warn", "stop", "rollback"] = "warn"
    most_rollbacks: int = 2  # of a run; what is wrong after two doublings is not the KL coefficient, and the next alarm stops it
    # k1 of whole completions. The benchmarks' runs end at 2 and 5 nats, and choosing the best of a thousand samples costs 6.
    kl_limit_nats: float = 30.0
    # Mean length of an evaluation against the first, either way. The benchmarks' runs change it by a tenth; a policy that has found out
    # that length pays (arXiv:2310.03716), or that saying nothing does, goes on to the limit.
    length_drift_ratio: float = 3.0
    # Share of the first evaluation's entropy per token. To learn a preference is to lose some; at a fifth there is hardly a choice left.
    entropy_floor_share: float = 0.2
    # Share of an evaluation's texts that were different from all others at the first evaluation and now are not: a task whose right answers
    # repeat ("yes", "no") begins with equal texts and is measured from there.
    duplicate_limit_share: float = 0.5
    # Evaluations in a row, each with a higher mean and a lower pessimistic score (mean - spread_weight x spread) than the one before.
    # Both move together in an ordinary run; once may be chance, three times is not. Says nothing of a reward model of one member.
    over_optimisation_patience: int = 3
    # Updates skipped because they were not finite, of those of the last 20 steps. One or two a run are bad luck.
    skipped_limit_share: float = 0.05

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        for name in ("most_rollbacks", "kl_limit_nats", "over_optimisation_patience"):
            require(getattr(self, name) >= 0, f"{name} must not be negative.")
        for name in ("entropy_floor_share", "duplicate_limit_share", "skipped_limit_share"):
            require(0 <= getattr(self, name) < 1, f"{name} must be at least 0 (off) and below 1.")
        require(self.length_drift_ratio == 0 or self.length_drift_ratio > 1, "length_drift_ratio must be above 1, or 0 (off).")


@dataclass(frozen=True, slots=True)
class Alarm:
    """`seen`: what was measured, with its numbers;  `remedy`: what a person can do."""

    name: str
    step: int
    seen: str
    remedy: str


def duplicate_share(texts: Sequence[str]) -> float:
    """Share of texts that stand more than once, but for white space: 0 where all differ, 1 where each has its like. 0 of none."""
    counts = Counter(" ".join(text.split()) for text in texts)
    return sum(count for count in counts.values() if count > 1) / len(texts) if texts else 0.0


class Guards:
    """What a run's guards remember, and what they say of a step and of an evaluation. Equal metrics give equal alarms on every process."""

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self.active: list[str] = []
        self.start: dict[str, float] = {}  # metrics of the first evaluation
        self.apart: list[list[float]] = []  # [step, mean, pessimistic] of the evaluations since the two scores last moved together
        self.skipped: list[float] = []  # of each of the last steps

    def state(self) -> dict[str, Any]:
        """Plain JSON, a copy."""
        return {
            "active": list(self.active),
            "start": dict(self.start),
            "apart": [list(point) for point in self.apart],
            "skipped": list(self.skipped),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.active = list(state["active"])
        self.start = dict(state["start"])
        self.apart = [list(point) for point in state["apart"]]
        self.skipped = list(state["skipped"])

    def rearm(self, alarms: Sequence[Alarm]) -> None:
        """Let these be said again while they last: a run that they stopped is stopped again when it is resumed as it was."""
        said = {alarm.name for alarm in alarms}
        self.active = [name for name in self.active if name not in said]

    @property
    def calm(self) -> bool:
        """Whether a rollback may come back here: no alarm lasts, and none is on its way."""
        return not self.active and len(self.apart) <= 1

    def check_step(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Args:  metrics: `kl_k1_nats`; `skipped_now` and `updates_now`, of all models of the step."""
        found = [self._kl(step, metrics["kl_k1_nats"]), self._skipped(step, metrics["skipped_now"], metrics["updates_now"])]
        return [alarm for alarm in found if alarm]

    def check_evaluation(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The first one is what later ones are measured against.

        Args:  metrics: `kl_k1_nats`, `length_tokens`, `entropy_nats`, `duplicate_share`; of an ensemble `reward_mean` and
               `reward_pessimistic`, whatever view pays the policy."""
        if not self.start:
            self.start = {name: metrics[name] for name in ("length_tokens", "entropy_nats", "duplicate_share") if name in metrics}
        found = [
            self._kl(step, metrics["kl_k1_nats"], clears=False),
            self._length(step, metrics["length_tokens"]),
            self._entropy(step, metrics.get("entropy_nats")),
            self._duplicates(step, metrics["duplicate_share"]),
        ]
        if "reward_pessimistic" in metrics:
            found.append(self._over_optimisation(step, metrics["reward_mean"], metrics["reward_pessimistic"]))
        return [alarm for alarm in found if alarm]

    def _said(self, alarm: Alarm, *, wrong: bool, over: bool) -> Alarm | None:
        """The alarm where it begins. `over`: it is gone by a margin; between the two it is as it was."""
        if wrong and alarm.name not in self.active:
            self.active.append(alarm.name)
            return alarm
        if over and not wrong and alarm.name in self.active:
            self.active.remove(alarm.name)
        return None

    def _kl(self, step: int, nats: float, *, clears: bool = True) -> Alarm | None:
        """Args:  clears: false of an evaluation. It has other prompts than the steps have: what one of the two says must not be called
        off and said again by the other."""
        limit = self.options.kl_limit_nats
        if not limit:
            return None
        alarm = Alarm(
            "kl_limit",
            step,
            f"The policy is {nats:.3g} nats a completion (k1) away from its reference; kl_limit_nats is {limit:g}.",
            "Raise kl_coefficient, set kl_target_nats, or lower learning_rate. If the task needs the distance, raise kl_limit_nats.",
        )
        return self._said(alarm, wrong=not nats <= limit, over=clears and nats <= limit * (1 - MARGIN))  # NaN is wrong

    def _skipped(self, step: int, skipped: float, updates: float) -> Alarm | None:
        self.skipped = [*self.skipped, skipped][-WINDOW_STEPS:]
        limit, share = self.options.skipped_limit_share, sum(self.skipped) / (WINDOW_STEPS * updates)
        if not limit:
            return None
        alarm = Alarm(
            "skipped_updates",
            step,
            f"{sum(self.skipped):.0f} of the {WINDOW_STEPS * updates:.0f} updates that {WINDOW_STEPS} steps have were skipped lately: "
            f"their gradients are not finite. skipped_limit_share is {limit:g}.",
            "Lower learning_rate or max_gradient_norm, raise warmup_share, or set dtype = float32.",
        )
        return self._said(alarm, wrong=share > limit, over=share <= limit * (1 - MARGIN))

    def _length(self, step: int, tokens: float) -> Alarm | None:
        limit, first = self.options.length_drift_ratio, self.start["length_tokens"]
        if not limit or not first:
            return None
        ratio = max(tokens / first, first / max(tokens, 1e-9))
        longer = tokens > first
        alarm = Alarm(
            "length_drift",
            step,
            f"Completions are {tokens:.3g} tokens long, {first:.3g} at the first evaluation: {ratio:.3g} times as "
            f"{'long' if longer else 'short'}; length_drift_ratio is {limit:g}.",
            "Read the samples. The reward model may pay for length: its page shows how its scores go with it. "
            + ("Raise missing_eos_penalty, lower max_completion_tokens, " if longer else "Raise kl_coefficient, ")
            + "or rank outputs of this policy and train the reward model again.",
        )
        return self._said(alarm, wrong=not ratio <= limit, over=ratio <= limit * (1 - MARGIN))

    def _entropy(self, step: int, nats: float | None) -> Alarm | None:
        floor, first = self.options.entropy_floor_share, self.start.get("entropy_nats", 0.0)
        if nats is None or not floor or not first > 0:  # not every engine tells entropies
            return None
        alarm = Alarm(
            "entropy_collapse",
            step,
            f"The policy's entropy is {nats:.3g} nats a token, {first:.3g} at the first evaluation: {nats / first:.2g} of it; "
            f"entropy_floor_share is {floor:g}.",
            "It has stopped trying different things and learns nothing more. Raise kl_coefficient or samples_per_prompt, or lower "
            "learning_rate.",
        )
        return self._said(alarm, wrong=not nats >= floor * first, over=nats >= floor * (1 + MARGIN) * first)

    def _duplicates(self, step: int, share: float) -> Alarm | None:
        limit, first = self.options.duplicate_limit_share, self.start["duplicate_share"]
        if not limit or first >= 1:
            return None
        lost = (share - first) / (1 - first)
        alarm = Alarm(
            "duplicate_outputs",
            step,
            f"{share:.0%} of the texts equal the text of another prompt, {first:.0%} at the first evaluation: {max(0.0, lost):.0%} of "
            f"those that were their own. duplicate_limit_share is {limit:g}.",
            "Read the samples: one text may please the reward model whatever was asked. Raise kl_coefficient; rank such outputs and train "
            "the reward model again.",
        )
        return self._said(alarm, wrong=lost > limit, over=lost <= limit * (1 - MARGIN))

    def _over_optimisation(self, step: int, mean: float, pessimistic: float) -> Alarm | None:
        rises = bool(self.apart) and mean > self.apart[-1][1] and pessimistic < self.apart[-1][2]
        self.apart = [*self.apart, [float(step), mean, pessimistic]] if rises else [[float(step), mean, pessimistic]]
        patience = self.options.over_optimisation_patience
        if not patience or not (math.isfinite(mean) and math.isfinite(pessimistic)):
            return None
        then, mean_then, pessimistic_then = self.apart[0]
        alarm = Alarm(
            "over_optimisation",
            step,
            f"Since step {then:.0f} the mean score rose from {mean_then:.3g} to {mean:.3g} while the pessimistic one fell from "
            f"{pessimistic_then:.3g} to {pessimistic:.3g}, at {len(self.apart) - 1} evaluations in a row.",
            "The policy is paid for what the reward model's members disagree about. Set reward_view = mean_minus_spread or worst, raise "
            f"kl_coefficient, or end at step {then:.0f}; then rank outputs of this policy and train the reward model again.",
        )
        wrong = len(self.apart) > patience and pessimistic_then - pessimistic >= LEAST_FALL
        return self._said(alarm, wrong=wrong, over=len(self.apart) == 1)
