"""What several reward models in one say together: mean, spread, a pessimistic score, and where they disagree. Pure functions.

The members differ because each starts at random and each weighs the training prompts in its own way. What they agree on is what the
rankings taught; where they differ, the rankings left it open, and a policy that is paid for it learns the error.

Sources: Coste et al. 2023, arXiv:2310.02743 (worst case, mean minus spread); Eisenstein et al. 2023, arXiv:2312.09244.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Views:
    """Scores of N completions over the members. Each (N,) float32, in normalised reward; `spread` is the standard deviation (over M, not
    M - 1: it is 0 for one member, and of two the worst is the mean minus the spread)."""

    mean: Tensor
    spread: Tensor
    worst: Tensor

    def of(self, view: str, spread_weight: float = 1.0) -> Tensor:
        """(N,): `mean`, `worst`, or `mean_minus_spread` (mean - spread_weight x spread)."""
        if view == "mean_minus_spread":
            return self.mean - spread_weight * self.spread
        if view not in ("mean", "worst"):
            raise ValueError(f"unknown view {view!r}: use mean, worst or mean_minus_spread")
        return self.mean if view == "mean" else self.worst


def views(scores: Tensor) -> Views:
    """Args: scores (N, M) float32, each member normalised by itself."""
    spread = scores.std(-1, correction=0) if len(scores) else scores.mean(-1)  # of no completion torch would warn
    return Views(scores.mean(-1), spread, scores.amin(-1))


def bootstrap_weights(prompts: Sequence[str], members: int, *, seed: int) -> Tensor:
    """How much each member learns from each prompt: independent draws from the exponential distribution of mean 1.

    This is the Bayesian bootstrap: weights of all prompts, divided by their sum, are uniform on the simplex. Mean and variance are those
    of the Poisson(1) counts of drawing prompts with replacement, but no prompt is lost to a member, which matters where prompts are
    few. A prompt's weights depend on (seed, member, prompt) alone: not on order, batches or processes.

    Args:    prompts: N digests (equal ones get equal weights);  members: M; one member learns from everything alike.
    Returns: (N, M) float32.
    Source:  Rubin 1981, Ann. Statist. 9(1); Osband et al. 2016, arXiv:1602.04621 (bootstrapped heads over one network).
    """
    if members == 1:
        return torch.ones(len(prompts), 1)
    drawn = np.empty((len(prompts), members), dtype=np.float32)
    for place, prompt in enumerate(prompts):
        identity = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")
        drawn[place] = np.random.default_rng([seed, identity]).exponential(size=members)
    return torch.from_numpy(drawn)


def member_losses(scores: Tensor, weights: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over members of each member's weighted losses.

    Shapes:  B prompts of K completions, M members.
    Args:    scores (B, K, M);  weights (B, M): of `bootstrap_weights`;  loss_of: scores of one member (B, K) -> losses (B,).
    Returns: (B,).
    """
    return torch.stack([loss_of(scores[..., member]) * weights[:, member] for member in range(scores.shape[-1])]).mean(0)


def disagreement(scores: Tensor) -> Tensor:
    """How much the members differ about each pair: the variance over members of P(i before j) = sigmoid(s_i - s_j). 0 to 1/4.

    The raters' answer on such a pair tells most about which member is right.

    Shapes:  K completions of one prompt, M members.
    Args:    scores (K, M) float32, as trained (not normalised): their differences are log-odds.
    Returns: (K, K) float32, symmetric, 0 on the diagonal and for M = 1.
    Source:  the infomax exploration of Dwaracherla et al. 2024, arXiv:2402.00396.
    """
    points = scores.double()
    return (points[:, None, :] - points[None, :, :]).sigmoid().var(-1, correction=0).float()


def most_disputed(pairs: Tensor, count: int) -> list[int]:
    """`count` of K completions whose pairs are disputed most: the most disputed pair, then, one by one, what adds most. Earlier ones win
    between equals.

    Args:    pairs (K, K): of `disagreement`;  count: 2 to K.
    """
    size = len(pairs)
    if not 2 <= count <= size:
        raise ValueError(f"count must be 2 to {size}, not {count}")
    upper = pairs.triu(1) - torch.ones_like(pairs).tril()  # the lower triangle and the diagonal can never be the largest
    first, second = divmod(int(upper.flatten().argmax()), size)
    chosen = [first, second]
    while len(chosen) < count:
        gains = pairs[:, chosen].sum(1)
        gains[chosen] = -1.0
        chosen.append(int(gains.argmax()))
    return chosen


def mean_disagreement(pairs: Tensor, chosen: Sequence[int]) -> float:
    """Mean over the pairs of the chosen completions; 0 where there is none."""
    if len(chosen) < 2:
        return 0.0
    index = torch.tensor(list(chosen))
    among = pairs[index][:, index]
    return float(among.sum() / (len(chosen) * (len(chosen) - 1)))


def spread_report(odds: Sequence[Tensor], scores: Sequence[Tensor], wins: Sequence[np.ndarray]) -> dict[str, float]:
    """How far the members differ, and whether that tells where they are wrong.

    Pairs are sorted by `disagreement`, not by the spread of their margin: the members' scales differ too, so that spread grows with the
    margin, and clear pairs have most of it.

    Args:    for each held-out prompt, the members' scores (K, M) as trained (differences are log-odds) and normalised by member, and
             wins (K, K): how many rankings put i before j.
    Returns: `spread`: mean standard deviation over members of a completion's normalised score;  `accuracy_low_disagreement`,
             `accuracy_high_disagreement`: share of preference pairs that the members' mean orders as people did (equal scores half), among
             the third of the pairs that they dispute least, and the third that they dispute most. {} for one member or fewer than three
             pairs.
    """
    disputes, right, counted = [], [], []
    for trained, points, won in zip(odds, scores, wins, strict=True):
        if points.shape[-1] == 1:
            return {}
        means = points.double().mean(-1)
        first, second = np.nonzero(won)
        disputes.append(disagreement(trained).numpy()[first, second])
        right.append((((means[:, None] - means[None, :]).sign() + 1) / 2).numpy()[first, second])
        counted.append(won[first, second])
    if sum(map(len, disputes)) < 3:
        return {}
    dispute, alike, weight = (np.concatenate(parts) for parts in (disputes, right, counted))
    order = np.argsort(dispute, kind="stable")
    third = len(order) // 3
    low, high = order[:third], order[-third:]
    return {
        "spread": float(torch.cat([points.std(-1, correction=0) for points in scores]).double().mean()),
        "accuracy_low_disagreement": float(np.average(alike[low], weights=weight[low])),
        "accuracy_high_disagreement": float(np.average(alike[high], weights=weight[high])),
    }
