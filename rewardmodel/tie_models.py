"""What a pair may come to: win, loss, or tie. A model gives their log-probabilities of a difference of scores, with a learned parameter."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TieModel(Protocol):
    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned beside the scores."""

    @property
    def strength(self) -> Tensor:
        """The tie parameter as it is written in the papers."""

    def log_win(self, margins: Tensor) -> Tensor:
        """log P(i before j), elementwise, of s_i - s_j."""

    def log_tie(self, margins: Tensor) -> Tensor:
        """log P(i and j tied)."""


@dataclass(frozen=True, slots=True)
class NoTies:
    """Bradley and Terry 1952: P(i before j) = sigmoid(s_i - s_j)."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        return []

    @property
    def strength(self) -> Tensor:
        return torch.zeros(())

    def log_win(self, margins: Tensor) -> Tensor:
        return F.logsigmoid(margins)

    def log_tie(self, margins: Tensor) -> Tensor:
        raise ValueError("tied pairs need a model of ties (davidson or rao_kupper); or derive the pairs with ties = half or drop")


@dataclass(frozen=True, slots=True)
class Davidson:
    """P(i before j) = e^(d/2) / (e^(d/2) + e^(-d/2) + nu),  P(tie) = nu / (e^(d/2) + e^(-d/2) + nu).

    Source: Davidson 1970, J. Am. Stat. Assoc. 65(329), eq. 2.3."""

    log_nu: Tensor

    @staticmethod
    def start(share: float) -> float:
        """log nu that gives this share of ties between equals, nu / (2 + nu)."""
        return math.log(2 * share / (1 - share))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.log_nu] if isinstance(self.log_nu, nn.Parameter) else []

    @property
    def strength(self) -> Tensor:
        return self.log_nu.detach().exp()

    def log_win(self, margins: Tensor) -> Tensor:
        return margins / 2 - self._log_norm(margins)

    def log_tie(self, margins: Tensor) -> Tensor:
        return self.log_nu - self._log_norm(margins)

    def _log_norm(self, margins: Tensor) -> Tensor:
        return torch.logaddexp(torch.logaddexp(margins / 2, -margins / 2), self.log_nu)


@dataclass(frozen=True, slots=True)
class RaoKupper:
    """With theta = e^eta > 1:  P(i before j) = sigmoid(d - eta),  P(tie) = (theta^2 - 1) sigmoid(d - eta) sigmoid(-d - eta).

    eta, the difference that people do not notice, must be positive, hence its logarithm is what is learned.
    Source: Rao and Kupper 1967, J. Am. Stat. Assoc. 62(317), eq. 2.2."""

    log_eta: Tensor

    @staticmethod
    def start(share: float) -> float:
        """log eta that gives this share of ties between equals, (theta - 1) / (theta + 1)."""
        return math.log(math.log((1 + share) / (1 - share)))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.log_eta] if isinstance(self.log_eta, nn.Parameter) else []

    @property
    def strength(self) -> Tensor:
        return self.log_eta.detach().exp().exp()

    def log_win(self, margins: Tensor) -> Tensor:
        return F.logsigmoid(margins - self.log_eta.exp())

    def log_tie(self, margins: Tensor) -> Tensor:
        eta = self.log_eta.exp()
        # log(theta^2 - 1), without theta^2, which would overflow.
        scale = 2 * eta + torch.log(-torch.expm1(-2 * eta))
        return scale + F.logsigmoid(margins - eta) + F.logsigmoid(-margins - eta)


TIE_MODELS: dict[str, type[Davidson] | type[RaoKupper]] = {"davidson": Davidson, "rao_kupper": RaoKupper}


def tie_model(ties: str, *, pairs: float, tied: float, device: torch.device | str = "cpu") -> TieModel:
    """The model of that name with a learned parameter that starts at the observed share of ties between equals.

    Args:    ties: "davidson", "rao_kupper", or a treatment that leaves no tied pair;  pairs, tied: weights of preference and tied pairs.
             Where nothing is tied the parameter would run to its limit, so there the model is Bradley-Terry.
    """
    if ties not in TIE_MODELS or not tied:
        return NoTies()
    kind = TIE_MODELS[ties]
    return kind(nn.Parameter(torch.tensor(kind.start(min(tied / (pairs + tied), 0.99)), device=device)))
