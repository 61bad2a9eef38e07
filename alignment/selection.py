"""Best-of-n and rejection sampling: aligning by choice among candidates. What is kept, and how far its distribution is from the policy's.

The policy writes n candidates of a prompt, independently; k of them are kept. Then, whatever the rule of choice, a kept text y (a random
one of the k) has P(y) <= (n / k) policy(y), for it is one of n candidates, each distributed as the policy: KL(kept || policy) <=
log(n / k). Each rule has a tighter bound below. Nothing is trained, so both are baselines of what a reward model is worth. Pure functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignment.rollout.sampling import Sampling

# Sets the uniform numbers of acceptance apart from those by which the same sequence's tokens are drawn.
ACCEPTANCE_STREAM = 1


def best_of_n_kl_bound(candidates: int, kept: int = 1) -> float:
    """Upper bound of KL(kept || policy) of the best `kept` of `candidates` texts.

    Units:   nats.
    Args:    candidates n >= kept k >= 1.
    Returns: log n - (n - 1) / n for k = 1: the value for scores without ties, which ties only lower, so it is no estimate. For k > 1
             log(n / k), which also holds where equal texts stand behind different ones.
    Raises:  ValueError unless n >= k >= 1.
    Source:  Beirami et al. 2024, arXiv:2401.01879, theorem 3.1; before as an equality in Stiennon et al. 2020, arXiv:2009.01325."""
    if not candidates >= kept >= 1:
        raise ValueError(f"candidates must be >= kept >= 1; got {candidates} and {kept}.")
    if kept > 1:
        return math.log(candidates / kept)
    return math.log(candidates) - (candidates - 1) / candidates


def acceptance_probabilities(scores: Sequence[float], beta: float, highest: float) -> list[float]:
    """Probability with which each candidate is accepted: exp((score - highest) / beta), 1 above `highest`.

    While no score exceeds `highest` an accepted text has the distribution policy(y) exp(score(y) / beta) / Z, the optimum of
    reward - beta KL: P(y accepted) = policy(y) exp(score(y) / beta) exp(-highest / beta), and the last factor cancels in P(y | accepted).

    Units:   scores and `highest` in normalised reward;  beta in reward per nat.
    Raises:  ValueError if beta <= 0.
    Source:  Liu et al. 2023, arXiv:2309.06657 (statistical rejection sampling), where `highest` is that of the candidates."""
    if beta <= 0:
        raise ValueError(f"beta must be > 0; got {beta}.")
    return [math.exp(min(0.0, (score - highest) / beta)) for score in scores]


def rejection_kl_bound(acceptance: float, candidates: int, kept: int = 1) -> float:
    """Upper bound of KL(kept || policy) where `kept` of `candidates` texts are kept: the first that were accepted, then, if they were too
    few, others by any rule.

    A candidate y is accepted with probability w(y) <= 1; a = E[w] under the policy. Of accepted texts alone P(y) = policy(y) w(y) / a, so
    the KL is E[log(w / a)] <= log(1 / a). With the others: the i-th candidate, being y, is kept if it is accepted and fewer than k before
    it were, or, not accepted, at most if fewer than k of all n - 1 others were, which is no likelier. Hence
    P(y) / policy(y) <= (1 / k) sum over i < n of P(Binomial(i, a) < k), which is at most 1 / a and at most n / k; its log bounds the KL.

    Units:   nats.
    Args:    acceptance a in [0, 1]: the mean acceptance probability of the prompt;  candidates n >= kept k >= 1.
    Raises:  ValueError for numbers out of range."""
    if not (candidates >= kept >= 1 and 0 <= acceptance <= 1):
        raise ValueError(f"needs candidates >= kept >= 1 and acceptance in [0, 1]; got {candidates}, {kept} and {acceptance}.")
    accepted = np.zeros(kept)  # accepted[j] = P(j of the candidates so far were accepted), for j < k
    accepted[0] = 1.0
    total = 0.0
    for _ in range(candidates):
        total += float(accepted.sum())
        accepted[1:] = accepted[1:] * (1 - acceptance) + accepted[:-1] * acceptance
        accepted[0] *= 1 - acceptance
    return math.log(total / kept)


def tilted_kl(scores: Sequence[float], beta: float) -> float:
    """Estimate of KL(policy exp(score / beta) / Z || policy) from n candidates of the policy: log n minus the entropy of their weights.

    Units:   nats.   Returns: E_w[log w] - log E[w] with both means over the candidates: consistent, at most log n, so too low where the
             KL is near log n or beyond it.
    Source:  self-normalised importance sampling, Owen 2013, "Monte Carlo theory, methods and examples", chapter 9."""
    weights = np.exp((np.asarray(scores) - max(scores)) / beta)
    shares = weights / weights.sum()
    return float(math.log(len(shares)) + (shares * np.log(np.maximum(shares, 1e-300))).sum())


def acceptance_number(sampling: Sampling, stream: int, sample: int) -> float:
    """The uniform number in [0, 1) that decides about one candidate: it depends on (seed, step, stream, sample) alone."""
    return float(np.random.default_rng([sampling.seed, sampling.step, stream, sample, ACCEPTANCE_STREAM]).random())


@dataclass(frozen=True, slots=True)
class Rejection:
    """What rejection sampling did with one prompt. `order`: the kept candidates, accepted ones first, as they were drawn (their order says
    nothing of their scores); `accepted`: how many of them were accepted; `acceptance`: mean probability over all candidates;
    `above`: share of the candidates with a score above `highest`."""

    order: list[int]
    accepted: int
    acceptance: float
    above: float


def rejected(
    scores: Sequence[float], best: Sequence[int], uniforms: Sequence[float], *, beta: float, highest: float, kept: int
) -> Rejection:
    """Keep the first `kept` accepted candidates; where they are too few, the best of the others fill the rest.

    Filled up rather than left out: whoever compares policies by their prompts must not lose the hard ones, and the best is what the
    baseline would show. They are counted, since they are not from the tilted distribution.

    Args:    scores (n,);  best (n,): the candidates from best to worst;  uniforms (n,) in [0, 1);  beta, highest as in
             `acceptance_probabilities`."""
    probabilities = acceptance_probabilities(scores, beta, highest)
    accepted = [place for place, probability in enumerate(probabilities) if uniforms[place] < probability][:kept]
    order = [*accepted, *(place for place in best if place not in accepted)][:kept]
    above = sum(score > highest for score in scores) / len(scores)
    return Rejection(order, len(accepted), sum(probabilities) / len(probabilities), above)
