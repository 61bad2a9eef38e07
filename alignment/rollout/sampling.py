"""How completions are drawn, and what comes of it: shared by every engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from training.pack import Row

CACHE_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw. `require_exact` refuses everything under which the drawn tokens would not follow the trained distribution.

    Units: temperature dimensionless;  top_k in tokens, 0 off;  top_p in (0, 1], 1 off;  cache_tokens: most tokens held at once.
    """

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    step: int = 0
    cache_tokens: int = CACHE_TOKENS

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "Sampling needs max_new_tokens >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1 "
                f"(greedy=True takes the most likely token); got {self}."
            )

    @property
    def truncates(self) -> bool:
        """Whether some tokens are kept from being drawn."""
        return bool(self.top_k) or self.top_p < 1

    def require_exact(self) -> None:
        if self.greedy or self.truncates:
            raise ValueError(
                "Training samples from the whole distribution at one temperature: with greedy, top_k or top_p the importance ratio and the "
                "KL would be those of another policy than the one that wrote the tokens. Set temperature alone."
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. `completion_ids` ends in a stop token if `finished`, else it was cut at the length limit.

    Shapes: T tokens.   Units: nats.
    logps (T,) float32: log-probability of each token under softmax(logits / temperature), also where top-k or top-p drew it;
    entropies (T,) float32: of the same distribution at each token.
    """

    sample: int
    prompt_ids: Sequence[int]
    completion_ids: list[int]
    logps: Tensor
    entropies: Tensor
    finished: bool

    @property
    def row(self) -> Row:
        return Row(self.prompt_ids, self.completion_ids)
