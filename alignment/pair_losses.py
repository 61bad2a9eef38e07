"""Losses of single preference pairs: pure functions of log-ratios, one for each name of `loss_kinds` that takes pairs.

Each takes the `Pairs` and returns (P,) float32, one loss for each pair in the units its equation has; nothing is averaged here. The range
of each option is checked by DPOOptions. In the equations, c and r are the log-ratios log(policy / reference) of the chosen and of the
rejected completion in nats, |c| and |r| their lengths in tokens, f'(.) the score of the f-divergence (the log-ratio itself under reverse
KL), s the logistic function, and m the margin asked for.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.options import DPOOptions

# exp() of more than this leaves float32 (TRL's DPOTrainer has the same bound).
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True, slots=True)
class Pairs:
    """P pairs of a chosen and a rejected completion; every tensor is (P,) float32, and one scalar.

    chosen, rejected: log-ratios in nats (log-probabilities where the loss knows no reference);  chosen_score, rejected_score: the same
    under the f-divergence;  chosen_tokens, rejected_tokens: lengths >= 1;  margins: >= 0, in units of the implicit reward (nats times
    beta), what the chosen one must be ahead by;  shift: KTO's reference point in nats, a scalar.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    margins: Tensor | float = 0.0
    shift: Tensor | float = 0.0

    def delta(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    def delta_per_token(self) -> Tensor:
        return self.chosen_score / self.chosen_tokens - self.rejected_score / self.rejected_tokens


def divergence_score(ratios: Tensor, divergence: str, coefficient: float) -> Tensor:
    """f'(policy / reference): what takes the place of the log-ratio in the implicit reward when another divergence holds the policy.

    reverse_kl: log t;  forward_kl: 1 - 1/t;  js_divergence: log(2t / (t + 1));  alpha_divergence: (t^(a-1) - 1) / (a - 1).

    Args:    ratios: log t in nats, any shape;  coefficient: a, of alpha_divergence alone (a = 1 is reverse KL).
    Raises:  ValueError for an unknown divergence.
    Source:  Wang et al. 2023, arXiv:2309.16240, in the form of TRL 1.16's DPOTrainer."""
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(coefficient - 1) < 1e-6):
        return ratios
    if divergence == "forward_kl":
        return 1 - torch.exp(-ratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratios)
    if divergence == "alpha_divergence":
        return (torch.exp(((coefficient - 1) * ratios).clamp(max=LARGEST_EXPONENT)) - 1) / (coefficient - 1)
    raise ValueError(f"unknown divergence {divergence!r}")


def logistic_losses(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x): the logistic loss where a share e of the preferences is taken to be the wrong way round."""
    losses = -F.logsigmoid(logits)
    return (1 - smoothing) * losses - smoothing * F.logsigmoid(-logits) if smoothing else losses


def sigmoid(pairs: Pairs, options: DPOOptions) -> Tensor:
    """DPO: -log s(beta (f'(c) - f'(r)) - m), smoothed as cDPO where `label_smoothing` says so.

    Source:  Rafailov et al. 2023, arXiv:2305.18290, eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences"; margin: Amini et
             al. 2024 (ODPO), arXiv:2402.10571."""
    return logistic_losses(options.beta * pairs.delta() - pairs.margins, options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: DPOOptions) -> Tensor:
    """Length-normalised DPO: -log s(beta (f'(c) / |c| - f'(r) / |r|) - m). Beta is of another size here: 5 is usual.

    Source:  Lambert et al. 2024 (Tulu 3), arXiv:2411.15124."""
    return logistic_losses(options.beta * pairs.delta_per_token() - pairs.margins, options.label_smoothing)


def hinge(pairs: Pairs, options: DPOOptions) -> Tensor:
    """max(0, 1 + m - beta (f'(c) - f'(r))).

    Source:  Liu et al. 2023 (RSO), arXiv:2309.06657, after SLiC, arXiv:2305.10425; 1 / beta is SLiC's margin."""
    return torch.relu(1 + pairs.margins - options.beta * pairs.delta())


def ipo(pairs: Pairs, options: DPOOptions) -> Tensor:
    """(f'(c) / |c| - f'(r) / |r| - 1 / (2 beta))^2: a margin to reach, not to grow for ever. Beta is the paper's tau.

    Per token, as the authors' own results have it (TRL 1.16 says so in DPOTrainer).
    Source:  Azar et al. 2023, arXiv:2310.12036, eq. 17."""
    return (pairs.delta_per_token() - 1 / (2 * options.beta)).square()


def robust(pairs: Pairs, options: DPOOptions) -> Tensor:
    """(-(1 - e) log s(x) + e log s(-x)) / (1 - 2e), x = beta (f'(c) - f'(r)) - m: its mean over flipped labels is DPO's loss of true ones.

    Source:  Chowdhury et al. 2024, arXiv:2403.00409; e is `label_smoothing`, the share of flipped labels."""
    smoothing, logits = options.label_smoothing, options.beta * pairs.delta() - pairs.margins
    return (smoothing * F.logsigmoid(-logits) - (1 - smoothing) * F.logsigmoid(logits)) / (1 - 2 * smoothing)


def exo_pair(pairs: Pairs, options: DPOOptions) -> Tensor:
    """KL((q, 1 - q) || (1 - e, e)) with q = s(beta (f'(c) - f'(r))): EXO-pref for two completions, reverse KL from policy to preference.

    Source:  Ji et al. 2024, arXiv:2402.00856, eq. 16; e is `label_smoothing` > 0, 0.001 in the paper."""
    logits = options.beta * pairs.delta()
    wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-options.label_smoothing))
    return wins + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(options.label_smoothing))


def discopop(pairs: Pairs, options: DPOOptions) -> Tensor:
    """(1 - w) * -log s(x) + w * e^-x, x = beta (f'(c) - f'(r)), w = s(x / tau): the log-ratio modulated loss that a language model found.

    It is not monotone: with tau = 0.05 it rises from x = -0.12 to 0.07, so that equal completions are first pushed the wrong way.
    Source:  Lu et al. 2024, arXiv:2406.08414, eq. 5; tau is `discopop_tau`, 0.05 in the paper."""
    logits = options.beta * pairs.delta()
    share = torch.sigmoid(logits / options.discopop_tau)
    return -F.logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def nca_pair(pairs: Pairs, options: DPOOptions) -> Tensor:
    """-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2: the likelihood of the chosen itself is held up, not the difference alone.

    Source:  Chen et al. 2024, arXiv:2402.05369 for two completions."""
    chosen, rejected = options.beta * pairs.chosen, options.beta * pairs.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, options: DPOOptions) -> Tensor:
    """-log s(beta c) - log s(-beta r): a classifier of good and bad whose logit is the implicit reward.

    Source:  Jung et al. 2024, arXiv:2404.04656, with reward shift 0, as TRL 1.16's `bco_pair`."""
    return -F.logsigmoid(options.beta * pairs.chosen) - F.logsigmoid(-options.beta * pairs.rejected)


def sppo_hard(pairs: Pairs, options: DPOOptions) -> Tensor:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2: self-play with a win probability of 1 for the chosen and 0 for the rejected.

    Source:  Wu et al. 2024, arXiv:2405.00675, eq. 4.7."""
    return (pairs.chosen - 0.5 / options.beta).square() + (pairs.rejected + 0.5 / options.beta).square()


def apo_zero(pairs: Pairs, options: DPOOptions) -> Tensor:
    """1 - s(beta c) + s(beta r): chosen up and rejected down; for chosen ones that are better than what the policy writes.

    Source:  D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    return torch.sigmoid(-options.beta * pairs.chosen) + torch.sigmoid(options.beta * pairs.rejected)


def apo_down(pairs: Pairs, options: DPOOptions) -> Tensor:
    """s(beta c) + 1 - s(beta (c - r)): both down, the rejected more; for chosen ones that are worse than what the policy writes.

    Source:  D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8."""
    return torch.sigmoid(options.beta * pairs.chosen) + torch.sigmoid(-options.beta * (pairs.chosen - pairs.rejected))


def kto(pairs: Pairs, options: DPOOptions) -> Tensor:
    """(lambda_D (1 - s(beta (c - z))) + lambda_U (1 - s(beta (z - r)))) / 2, z the estimated KL to the reference (`shift`), no gradient.

    In each pair the better completion is desirable and the worse one undesirable; one that is above as many as it is below adds a constant
    (with lambda_D = lambda_U), so no gradient. The halves make it the mean over completions, as the paper and TRL have it.
    Source:  Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7; lambdas are `desirable_weight` and `undesirable_weight`."""
    desirable = options.desirable_weight * torch.sigmoid(-options.beta * (pairs.chosen - pairs.shift))
    return 0.5 * (desirable + options.undesirable_weight * torch.sigmoid(-options.beta * (pairs.shift - pairs.rejected)))


def simpo(pairs: Pairs, options: DPOOptions) -> Tensor:
    """-log s(beta (c / |c| - r / |r|) - gamma - m), c and r log-probabilities: no reference. Beta is 2 to 2.5 in the paper.

    Source:  Meng et al. 2024, arXiv:2405.14734, eq. 6; gamma is `simpo_gamma`."""
    return logistic_losses(options.beta * pairs.delta_per_token() - options.simpo_gamma - pairs.margins, options.label_smoothing)


def cpo(pairs: Pairs, options: DPOOptions) -> Tensor:
    """-log s(beta (c - r) - m), c and r log-probabilities: DPO with a uniform reference. Its NLL term is `sft_weight`, here 1 by default.

    Source:  Xu et al. 2024, arXiv:2401.08417, eq. 3."""
    return logistic_losses(options.beta * pairs.delta() - pairs.margins, options.label_smoothing)


def orpo(pairs: Pairs, options: DPOOptions) -> Tensor:
    """-beta log s(log odds(p_c) - log odds(p_r)), p = e^(mean log-probability of a token), odds p / (1 - p). Beta is the paper's lambda.

    The paper's NLL term is `sft_weight`, here 1 by default.
    Source:  Hong et al. 2024, arXiv:2403.07691, eq. 4, 6 and 7."""
    return -options.beta * F.logsigmoid(_log_odds(pairs.chosen / pairs.chosen_tokens) - _log_odds(pairs.rejected / pairs.rejected_tokens))


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p < 0; a p of 1 in float32 is taken for the number below it."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


PAIR_LOSSES: dict[str, Callable[[Pairs, DPOOptions], Tensor]] = {
    function.__name__: function
    for function in (
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, discopop, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down),
        *(kto, simpo, cpo, orpo),
    )
}
