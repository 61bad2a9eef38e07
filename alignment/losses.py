"""Losses of a policy's log-probabilities against rankings: pure functions, without state.

One call serves every loss of `loss_kinds`, on B rankings of K completions with all their pairs. Each completion's log-probability enters
once; the pairs are differences of its log-ratios.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignment.loss_kinds import LOSS_KINDS
from alignment.options import DPOOptions
from alignment.pair_losses import PAIR_LOSSES, Pairs, divergence_score, logistic_losses
from alignment.transport import coupling
from rewardmodel.choices import Choices, choice_losses
from rewardmodel.losses import ranking_losses
from rewardmodel.tie_models import TIE_MODELS


@dataclass(frozen=True, slots=True)
class Compared:
    """B rankings of K completions: what the policy and the reference say, and what raters said. float32.

    logps, reference (B, K): log-probabilities in nats, summed over completion tokens (EOS among them);  tokens (B, K): lengths >= 1;
    wins (B, K, K): weight of "i is preferred to j";  ties (B, K, K): weight of "i and j are tied", upper triangle, for ties = rao_kupper
    and davidson;  best (B, K): weight of each completion in the best bands, for the NLL term;  margins (B, K, K): >= 0, of implicit reward;
    choices: of each place of a ranking, for plackett_luce;  strict (B, K, K): weights of preference
    pairs without any tied ones, for metrics;  shift: for kto, the KL that rewards are measured from, in nats.
    """

    logps: Tensor
    reference: Tensor
    tokens: Tensor
    wins: Tensor
    ties: Tensor | None = None
    best: Tensor | None = None
    margins: Tensor | None = None
    choices: Choices | None = None
    strict: Tensor | None = None
    shift: Tensor | float = 0.0

    def __post_init__(self) -> None:
        shape = self.logps.shape
        square = (*shape, shape[-1])
        wanted = ((self.reference, shape), (self.tokens, shape), (self.wins, square), (self.ties, square), (self.best, shape))
        for tensor, expected in (*wanted, (self.margins, square), (self.strict, square)):
            if tensor is not None and tensor.shape != expected:
                raise ValueError(f"shapes do not fit: {tuple(tensor.shape)} beside log-probabilities {tuple(shape)}")


def preference_losses(batch: Compared, options: DPOOptions) -> Tensor:
    """The loss of each ranking under `options.loss`, and its NLL term.

    Args:    batch: with what the loss asks for (`choices` for plackett_luce, `ties` for tied outcomes, `best` for an NLL term).
    Returns: losses (B,): sums over weighted pairs (or choices), not averaged over rankings. For a loss that takes a whole step (aot) only
             their sum has a meaning.
    Raises:  ValueError if something that the loss asks for is missing.
    Source:  each function below and in `pair_losses`; `loss_kinds` lists them."""
    weight = options.nll_weight if options.loss != "sft" else 1.0
    losses = torch.zeros(len(batch.logps), device=batch.logps.device)
    if options.loss != "sft":
        losses = losses + _preference_part(batch, options)
    if weight:
        if batch.best is None:
            raise ValueError("an NLL term needs `best`, the weights of the completions in the best bands")
        losses = losses + weight * nll_losses(batch.logps, batch.tokens, batch.best)
    return losses


def nll_losses(logps: Tensor, tokens: Tensor, best: Tensor) -> Tensor:
    """Negative log-likelihood per token of the best band's completions: (B,), in nats per token, each completion's mean counted by `best`.

    Source:  Pang et al. 2024 (RPO), arXiv:2404.19733, eq. 1: the second term."""
    return -(best * logps / tokens).sum(-1)


def log_ratios(batch: Compared, options: DPOOptions) -> Tensor:
    """(B, K): log-probabilities above the reference's, or as they are where the loss knows no reference; per token if so asked."""
    ratios = batch.logps - batch.reference if LOSS_KINDS[options.loss].reference else batch.logps
    return ratios / batch.tokens if options.length_normalised else ratios


def rewards(batch: Compared, options: DPOOptions) -> Tensor:
    """(B, K): the implicit reward that the loss compares, in its own units: beta times the score of the log-ratio (per token with per-token
    losses)."""
    scores = divergence_score(log_ratios(batch, options), options.f_divergence, options.alpha_divergence_coefficient)
    return options.beta * (scores / batch.tokens if LOSS_KINDS[options.loss].per_token else scores)


def _preference_part(batch: Compared, options: DPOOptions) -> Tensor:
    ratios = log_ratios(batch, options)
    if options.ties in ("rao_kupper", "davidson"):
        return tie_losses(rewards(batch, options), batch.wins, batch.ties, model=options.ties, tie_probability=options.tie_probability)
    if options.loss == "plackett_luce":
        return plackett_luce(options.beta * ratios, batch.choices)
    # Only pairs that weigh something: elsewhere stand numbers of other rankings, whose infinities would spoil gradients.
    owner, better, worse = batch.wins.nonzero(as_tuple=True)
    if not len(owner):
        return 0.0 * ratios.sum(-1)
    wins = batch.wins[owner, better, worse]
    if LOSS_KINDS[options.loss].takes == "step" and options.loss != "kto":
        return _transported(batch, ratios, (owner, better, worse), wins, options)
    scores = divergence_score(ratios, options.f_divergence, options.alpha_divergence_coefficient)
    pairs = Pairs(
        chosen=ratios[owner, better],
        rejected=ratios[owner, worse],
        chosen_score=scores[owner, better],
        rejected_score=scores[owner, worse],
        chosen_tokens=batch.tokens[owner, better],
        rejected_tokens=batch.tokens[owner, worse],
        margins=0.0 if batch.margins is None else batch.margins[owner, better, worse],
        shift=batch.shift,
    )
    return _of_rankings(wins * PAIR_LOSSES[options.loss](pairs, options), owner, len(ratios))


def _of_rankings(losses: Tensor, owner: Tensor, count: int) -> Tensor:
    """(count,): the sum of the losses (P,) of each ranking's pairs."""
    return torch.zeros(count, device=losses.device).index_add(0, owner, losses)


def _transported(batch: Compared, ratios: Tensor, places: tuple[Tensor, Tensor, Tensor], wins: Tensor, options: DPOOptions) -> Tensor:
    """AOT over all weighted pairs of the batch, which has to be the whole step."""
    owner, better, worse = places
    if options.loss == "aot_unpaired":
        above, below = ratios[owner, better], ratios[owner, worse]
    else:
        policy, reference = ((t / batch.tokens if options.length_normalised else t) for t in (batch.logps, batch.reference))
        above = policy[owner, better] - policy[owner, worse]
        below = reference[owner, better] - reference[owner, worse]
    first, second, mass = coupling(above.detach(), below.detach(), wins, wins)
    logits = options.beta * (above[first] - below[second])
    return _of_rankings(mass * logistic_losses(logits, options.label_smoothing), owner[first], len(ratios))


def tie_losses(rewards: Tensor, wins: Tensor, ties: Tensor | None, *, model: str, tie_probability: float) -> Tensor:
    """Minus the log-likelihood of wins and ties under a model in which a tie is an outcome: tied completions are pulled together.

    Rao-Kupper, with a = log nu:  P(i before j) = s(d - a),  P(tie) = (nu^2 - 1) s(d - a) s(-d - a),  d = reward of i - reward of j.
    Davidson:  P(i before j) = 1 / (1 + e^-d + 2 nu e^(-d / 2)),  P(tie) = 2 nu e^(-d / 2) P(i before j).

    Shapes:  B rankings of K completions.
    Args:    rewards (B, K): beta * log-ratio;  wins, ties (B, K, K) weights;  model: "rao_kupper" or "davidson";
             tie_probability: of two equals, in (0, 1): nu = (1 + p) / (1 - p) under Rao-Kupper, nu = p / (1 - p) under Davidson.
    Returns: losses (B,).
    Source:  Chen et al. 2024, arXiv:2409.17431 (DPO-RK and DPO-D; p = 0.5 is their nu = 3 and nu = 1);
             Rao and Kupper 1967; Davidson 1970."""
    if model not in TIE_MODELS:
        raise ValueError(f"unknown model of ties {model!r}")
    kind = TIE_MODELS[model]
    return ranking_losses(rewards, wins, ties, model=kind(torch.tensor(kind.start(tie_probability), device=rewards.device)))


def plackett_luce(rewards: Tensor, asked: Choices | None) -> Tensor:
    """-log of the probability of a ranking when each place is drawn by softmax of the rewards of what is left.

    Each choice weighs the same and all of a ranking weigh 1, so that a long ranking counts like a short one; times their number it is the
    paper's sum. Ties: `rewardmodel.choices`. For two completions it is DPO's loss.

    Shapes:  B rankings of K completions.   Args: rewards (B, K): beta * log-ratio;  asked: (B, S, ...).   Returns: losses (B,).
    Raises:  ValueError without `asked`.
    Source:  Rafailov et al. 2023, arXiv:2305.18290, appendix A.3, eq. 18 to 20."""
    if asked is None:
        raise ValueError("plackett_luce needs `choices`")
    return choice_losses(rewards, asked)
