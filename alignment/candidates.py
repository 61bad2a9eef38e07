"""Which of a policy's candidates are kept: the first, the best by a reward model, those that rejection sampling by it accepts, or those its
members disagree about most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.answers import Policy
from alignment.options import GenerateOptions
from alignment.rollout.sampling import Sample, Sampling
from alignment.selection import acceptance_number, rejected, tilted_kl
from rewardmodel.ensemble import disagreement, mean_disagreement, most_disputed
from rewardmodel.score import Scorer, require_members
from training.processes import Processes


@dataclass(frozen=True, slots=True)
class Kept:
    """One kept completion. `score` (`mean`, `spread`, `worst`, in normalised reward) is None without a reward model; `member_scores` (as
    trained: their differences are log-odds) and `disagreement` (of its prompt's kept completions, `rewardmodel.ensemble.disagreement`) are
    None without several members; `rejection` (`accepted`, and of its prompt `acceptance`, `above_highest_share`, `kl_estimate_nats`) is
    None where another rule chose."""

    sample: Sample
    score: dict[str, float] | None = None
    disagreement: float | None = None
    member_scores: list[float] | None = None
    rejection: dict[str, Any] | None = None


class Judge:
    """A reward model that looks at the candidates of each prompt.

    A prompt's candidates are scored by themselves, whatever else a block holds: which ones are kept then depends neither on where a run
    was resumed nor on the number of processes.
    """

    def __init__(self, scorer: Scorer, options: GenerateOptions, processes: Processes) -> None:
        self.scorer = scorer
        self.options = options
        self.processes = processes

    @classmethod
    def load(cls, reward_model: Any, options: GenerateOptions, processes: Processes) -> "Judge":
        """Raises:  InputError if the options ask for several members and the reward model has one."""
        scorer = Scorer.load(reward_model, device=processes.device)
        if options.keep == "uncertain" or options.most_uncertain_prompts:
            require_members(scorer.notes, "keep = uncertain and most_uncertain_prompts ask where members disagree")
        if options.keep in ("best", "rejection") and options.reward_view != "mean":
            require_members(scorer.notes, f"reward_view = {options.reward_view} looks at several members")
        return cls(scorer, options, processes)

    def choose(self, policy: Policy, sampling: Sampling, block: Sequence[tuple[int, list[Sample]]]) -> list[tuple[int, list[Kept]]]:
        """The kept completions of each prompt of a block, in order of choice; the work is shared, and every process has all of it."""
        mine = block[self.processes.rank :: self.processes.world]
        with self.processes.autocast():
            chosen = [(place, self._kept(policy, sampling, place, samples)) for place, samples in mine]
        return sorted((pair for part in self.processes.gather(chosen) for pair in part), key=lambda pair: pair[0])

    def _kept(self, policy: Policy, sampling: Sampling, place: int, samples: Sequence[Sample]) -> list[Kept]:
        texts = [policy.encoder.decode(sample.completion_ids) for sample in samples]
        messages = policy.prompts[place].messages
        raw = self.scorer.raw_scores(self.scorer.rows([(messages, text) for text in texts]))
        views = self.scorer.views(raw)
        pairs = disagreement(raw)
        count = self.options.samples
        scores = views.of(self.options.reward_view, self.options.spread_weight).tolist()
        notes: list[dict[str, Any]] | None = None
        if self.options.keep == "best":
            order = best_first(scores, texts)[:count]
        elif self.options.keep == "rejection":
            order, notes = self._not_rejected(scores, texts, [acceptance_number(sampling, place, sample.sample) for sample in samples])
        elif self.options.keep == "uncertain":
            order = most_disputed_texts(pairs, texts, count)
        else:
            order = list(range(count))
        several = self.scorer.members > 1
        disputed = mean_disagreement(pairs, order) if several else None
        numbers, members = torch.stack([views.mean, views.spread, views.worst], 1).tolist(), raw.tolist()
        return [
            Kept(
                samples[n],
                dict(zip(("mean", "spread", "worst"), numbers[n], strict=True)),
                disputed,
                members[n] if several else None,
                notes[rank] if notes else None,
            )
            for rank, n in enumerate(order)
        ]

    def _not_rejected(self, scores: list[float], texts: list[str], uniforms: list[float]) -> tuple[list[int], list[dict[str, Any]]]:
        """(candidates in order, what is noted of each)."""
        highest = max(scores) if self.options.highest_score is None else self.options.highest_score
        beta, best = self.options.rejection_beta, best_first(scores, texts)
        found = rejected(scores, best, uniforms, beta=beta, highest=highest, kept=self.options.samples)
        prompt = {"acceptance": found.acceptance, "above_highest_share": found.above, "kl_estimate_nats": tilted_kl(scores, beta)}
        return found.order, [{"accepted": rank < found.accepted, **prompt} for rank in range(len(found.order))]


def most_disputed_texts(pairs: Tensor, texts: Sequence[str], count: int) -> list[int]:
    """`most_disputed` among different texts; where they are too few, texts that came before fill the rest.

    Args:    pairs (K, K): of `disagreement`."""
    found: dict[str, int] = {}
    for index, text in enumerate(texts):
        found.setdefault(text, index)
    first = list(found.values())
    if len(first) > 1:
        places = torch.tensor(first)
        first = [first[place] for place in most_disputed(pairs[places][:, places], min(count, len(first)))]
    return [*first, *(index for index in range(len(texts)) if index not in found.values())][:count]


def best_first(scores: Sequence[float], texts: Sequence[str]) -> list[int]:
    """Indices from the highest score to the lowest, earlier ones first between equals; a text that came before goes behind all others,
    for raters need different ones."""
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    seen: set[str] = set()
    again = set()
    for index in order:
        if texts[index] in seen:
            again.add(index)
        seen.add(texts[index])
    return [index for index in order if index not in again] + [index for index in order if index in again]
