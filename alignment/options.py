"""Options of the policy methods. No torch and no Django here: the command line checks them before anything starts."""

from dataclasses import dataclass

from training.options import TrainingOptions, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTOptions(TrainingOptions):
    """`batch_rows` demonstrations make one step; the loss is the mean over the completion tokens of all of them."""

    batch_rows: int = 32
    learning_rate: float = 5e-4
    held_out_share: float = 0.05  # of the prompts, chosen by their hash, where inputs.held_out names no file
    max_held_out_rows: int = 1000

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        require(self.batch_rows >= 1, "batch_rows must be at least 1.")
        require(0 <= self.held_out_share <= 0.5, "held_out_share must be between 0 and 0.5.")
        require(self.max_held_out_rows >= 1, "max_held_out_rows must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOOptions(TrainingOptions):
    """`batch_rankings` rankings make one step; each is the mean over its preference pairs, and ties are left out and counted."""

    batch_rankings: int = 32
    learning_rate: float = 1e-4
    beta: float = 0.1
    label_smoothing: float = 0.0  # the share of preferences taken to be the wrong way round
    length_normalised: bool = False  # log-probabilities per token instead of summed

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        require(self.batch_rankings >= 1, "batch_rankings must be at least 1.")
        require(self.beta > 0, "beta must be positive.")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing must be at least 0 and below 0.5.")
