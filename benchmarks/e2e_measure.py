"""What policies say on held-out prompts: slots said, reward, KL, length, and whether one collapsed. Every uncertainty resamples meanings,
for samples of one meaning are not independent."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignment.answers import distinct_share
from benchmarks.e2e_stages import BEST_OF, SAMPLES, json_lines
from benchmarks.slots import slots_said
from rewardmodel.score import Scorer

RESAMPLES = 2000
LEAST_DISTINCT, LEAST_WORDS, MOST_WORDS, MORE_EMPTY, MORE_UNFINISHED = 0.5, 0.67, 1.5, 0.01, 0.02


@dataclass(frozen=True, slots=True)
class Said:
    """One text of a policy. `kl_nats` is k1 of the whole completion; NaN where it was not measured."""

    meaning: str
    text: str
    score: float
    kl_nats: float = math.nan
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Texts:
    """What a policy says: means over texts, with their standard errors. `sums` has (slots said, slots asked for) of each meaning."""

    slots_said: float
    slots_said_error: float
    reward: float
    reward_error: float
    kl_nats: float
    kl_nats_error: float
    words: float
    distinct_2: float
    empty_share: float
    unfinished_share: float
    texts: int
    sums: dict[str, tuple[float, float]]

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "sums"}


def evaluated(file: Path, policy: str) -> Texts:
    """What one policy said in an evaluation, by its `samples.jsonl`."""
    return measure([_said(row) for row in json_lines(file) if row["policy"] == policy], each=SAMPLES)


def _said(row: dict[str, Any]) -> Said:
    return Said(row["messages"][-1]["content"], row["text"], row["score"], row["kl_k1_nats"], row["finished"])


def measure(said: Sequence[Said], each: int = 1) -> Texts:
    """Args:  each: how many texts of a prompt follow each other. Different pairs of words are counted in the first ones alone, for their
    share falls with the number of texts."""
    counts = np.array([slots_said(one.meaning, one.text) for one in said], dtype=float)
    meanings = [one.meaning for one in said]
    scores, kls = np.array([one.score for one in said]), np.array([one.kl_nats for one in said])
    sums = {meaning: (float(top), float(bottom)) for meaning, (top, bottom) in _sums(meanings, counts).items()}
    return Texts(
        slots_said=float(counts[:, 0].sum() / counts[:, 1].sum()),
        slots_said_error=_error(list(sums.values())),
        reward=float(scores.mean()),
        reward_error=_mean_error(meanings, scores),
        kl_nats=float(kls.mean()),
        kl_nats_error=_mean_error(meanings, kls),
        words=float(np.mean([len(one.text.split()) for one in said])),
        distinct_2=distinct_share([one.text for one in said[::each]], 2),
        empty_share=float(np.mean([not one.text.strip() for one in said])),
        unfinished_share=float(np.mean([not one.finished for one in said])),
        texts=len(said),
        sums=sums,
    )


def gain(policy: Texts, start: Texts) -> tuple[float, float]:
    """(slots said above the start's, standard error), both on the same resampled meanings."""
    names = sorted(policy.sums)
    ours, theirs = (np.array([texts.sums[name] for name in names]) for texts in (policy, start))
    draws = np.random.default_rng(0).integers(0, len(names), size=(RESAMPLES, len(names)))
    first, second = (values[draws].sum(axis=1) for values in (ours, theirs))
    return policy.slots_said - start.slots_said, float(np.std(first[:, 0] / first[:, 1] - second[:, 0] / second[:, 1]))


def collapse(policy: Texts, start: Texts) -> list[str]:
    """Why a policy counts as collapsed; nothing where it does not.

    It says fewer slots than SFT by more than a standard error; of a hundred texts, one more than SFT's is empty, or two more have no end;
    it has less than half of SFT's different pairs of words; or its texts are not two thirds to one and a half times as long."""
    more, error = gain(policy, start)
    found = {
        f"slots said {more:+.3f} ±{error:.3f}": more < -error,
        f"empty texts {policy.empty_share:.4f}": policy.empty_share > start.empty_share + MORE_EMPTY,
        f"distinct pairs {policy.distinct_2:.3f} of {start.distinct_2:.3f}": policy.distinct_2 < LEAST_DISTINCT * start.distinct_2,
        f"words {policy.words:.1f} of {start.words:.1f}": not LEAST_WORDS <= policy.words / start.words <= MOST_WORDS,
        f"unfinished {policy.unfinished_share:.3f}": policy.unfinished_share > start.unfinished_share + MORE_UNFINISHED,
    }
    return [reason for reason, holds in found.items() if holds]


def best_of(file: Path, count: int) -> Texts:
    """The best of every `count` samples of a prompt, as the reward model sees it, from one file of BEST_OF samples each: 1 is SFT itself.

    Its KL to SFT is not measured but bounded: log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879)."""
    by_prompt: dict[str, list[Said]] = {}
    bound = math.log(count) - (count - 1) / count
    for row in json_lines(file):
        one = Said(row["messages"][-1]["content"], row["text"], row["score"]["mean"], bound, row["sampling"]["finished"])
        by_prompt.setdefault(row["key"], []).append(one)
    starts = range(0, BEST_OF, count)
    best = [max(said[start : start + count], key=lambda one: one.score) for said in by_prompt.values() for start in starts]
    return measure(best, each=len(starts))


def along(run: Path) -> list[dict[str, Any]]:
    """What a PPO run wrote at each of its evaluations: one text of each held-out prompt. `reward` is the score that it was paid by."""
    by_step: dict[int, list[Said]] = {}
    for row in json_lines(run / "samples.jsonl"):
        by_step.setdefault(row["step"], []).append(_said(row))
    found = []
    first = measure(by_step[0])
    for step, said in sorted(by_step.items()):
        texts = measure(said)
        more, error = gain(texts, first)
        found.append({"step": step, **texts.as_json(), "gain": more, "gain_error": error})
    return found


def score_texts(reward_model: Path, rows: Sequence[tuple[str, str]]) -> list[float]:
    return Scorer.load(reward_model).score([([{"role": "user", "content": meaning}], text) for meaning, text in rows])


def _sums(meanings: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for meaning, value in zip(meanings, values, strict=True):
        found[meaning] = found.get(meaning, np.zeros_like(value)) + value
    return found


def _error(sums: Iterable[tuple[float, float]]) -> float:
    """Standard error of a ratio of sums that resamples its terms."""
    values = np.array(list(sums), dtype=float)
    draws = np.random.default_rng(0).integers(0, len(values), size=(RESAMPLES, len(values)))
    resampled = values[draws].sum(axis=1)
    return float(np.std(resampled[:, 0] / resampled[:, 1]))


def _mean_error(meanings: Sequence[str], values: np.ndarray) -> float:
    pairs = np.stack([values, np.ones_like(values)], axis=1)
    return _error((float(top), float(bottom)) for top, bottom in _sums(meanings, pairs).values())
