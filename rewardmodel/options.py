"""Options of the reward model's training. No torch here."""

from dataclasses import dataclass
from typing import Literal

from training.options import TrainingOptions, require


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardOptions(TrainingOptions):
    """`batch_rankings` rankings make one step; rankings of the same completions stay together, and each completion is encoded once."""

    batch_rankings: int = 32
    learning_rate: float = 1e-4
    epochs: float = 2.0
    loss: Literal["bradley_terry", "plackett_luce"] = "bradley_terry"  # all pairs, or the best, then the best of the rest
    # Tied completions: an outcome of its own, with a learned parameter (two models); half a win each way; or nothing.
    ties: Literal["davidson", "rao_kupper", "half", "drop"] = "davidson"
    tie_learning_rate: float = 0.01  # of the tie parameter, which starts from the share of ties
    label_smoothing: float = 0.0  # the probability that a rater meant the reverse of his ranking
    strength_margin: float = 0.0  # score units that each unit of stated strength asks for; 0: strengths are not used
    rater_weights: Literal["none", "agreement"] = "none"  # "agreement": by how far each agrees with others, on the training split
    centring: float = 0.0  # weight of (mean of a pair's scores)^2: keeps scores near 0
    ensemble_size: int = 1  # members: their mean is the score, their spread says how far to trust it
    ensemble: Literal["heads", "adapters"] = "heads"  # each a head over one backbone, or a LoRA adapter and a head
    bootstrap_samples: int = 1000  # for the intervals of the held-out figures
    learning_curve: tuple[float, ...] = (0.25, 0.5)  # shares of the training prompts that are trained on first, apart; empty: none
    train_share: float = 1.0  # train on this share of the training prompts: how the parts of a learning curve are run

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        require(self.batch_rankings >= 1, "batch_rankings must be at least 1.")
        require(self.tie_learning_rate > 0, "tie_learning_rate must be positive.")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing must be at least 0 and below 0.5.")
        require(self.strength_margin >= 0, "strength_margin must not be negative.")
        require(
            not (self.loss == "plackett_luce" and self.ties == "rao_kupper"),
            "ties = rao_kupper is a model of pairs: use it with loss = bradley_terry, or ties = davidson, half or drop with plackett_luce.",
        )
        require(self.centring >= 0, "centring must not be negative.")
        require(self.bootstrap_samples >= 100, "bootstrap_samples must be at least 100.")
        require(all(0 < share < 1 for share in self.learning_curve), "learning_curve must hold shares between 0 and 1.")
        require(len(set(self.learning_curve)) == len(self.learning_curve), "learning_curve must not name a share twice.")
        require(0 < self.train_share <= 1, "train_share must be above 0 and at most 1.")
        require(not self.learning_curve or self.train_share == 1, "learning_curve needs train_share = 1.")
        require(self.ensemble_size >= 1, "ensemble_size must be at least 1.")
        require(self.ensemble == "heads" or self.ensemble_size == 1 or self.lora_rank >= 1, "ensemble = 'adapters' needs lora_rank.")
