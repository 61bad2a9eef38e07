"""Options of the policy methods. No torch and no Django here: the command line checks them before anything starts."""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOOptions(TrainingOptions):
    """One step samples `prompts_per_step` x `samples_per_prompt` episodes, scores them, and passes over them `passes` times, each time in
    `minibatches` optimiser steps. There are `max_steps` of them, or what `epochs` over the prompts hold. Rewards are in units of the
    reward model's spread."""

    prompts_per_step: int = 64
    samples_per_prompt: int = 4
    passes: int = 1  # over the episodes of one step ("PPO epochs")
    minibatches: int = 4  # optimiser steps in one pass

    max_completion_tokens: int = 128  # longer completions are cut, and pay `missing_eos_penalty`
    temperature: float = 1.0  # in sampling and in log-probabilities alike
    top_k: int = 0  # refused: see __post_init__
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    missing_eos_penalty: float = 1.0  # taken from the score of a completion that was cut

    kl_coefficient: float = 0.05  # reward per nat of k1; the first one, where a target adapts it
    kl_target_nats: float = 0.0  # KL of whole completions to keep to; 0: the coefficient stays fixed
    kl_horizon_episodes: int = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2  # 0: plain squared error
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    learning_rate: float = 1e-4
    value_learning_rate: float = 0.0  # 0: as learning_rate
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_share: float = 0.1  # without it Adam's first steps cost several nats and bring little reward
    adam_epsilon: float = 1e-5
    epochs: float = 1.0  # over the prompts

    log_steps: int = 1
    evaluate_steps: int = 10
    evaluation_prompts: int = 64  # held-out ones, or of the training split where none are held out

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        for name in ("prompts_per_step", "samples_per_prompt", "passes", "minibatches", "kl_horizon_episodes", "evaluation_prompts"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1.")
        for name in ("missing_eos_penalty", "kl_coefficient", "kl_target_nats", "value_clip_range", "value_learning_rate"):
            require(getattr(self, name) >= 0, f"{name} must not be negative.")
        for name in ("temperature", "clip_range"):
            require(getattr(self, name) > 0, f"{name} must be positive.")
        for name in ("gamma", "lam"):
            require(0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1.")
        require(
            not self.top_k and self.top_p == 1 and self.repetition_penalty == 1,
            "top_k, top_p and repetition_penalty are refused in training: the tokens would be drawn from another distribution than the one "
            "whose log-probabilities are trained, so ratios and KL would be wrong without a sign of it. Use temperature.",
        )
        require(
            self.minibatches <= self.prompts_per_step * self.samples_per_prompt,
            "minibatches must not exceed the episodes of a step, prompts_per_step x samples_per_prompt.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """`samples` completions of each prompt of a split. Here top_k and top_p are allowed: nothing is trained on their log-probabilities."""

    samples: int = 4
    split: Literal["all", "train", "held_out"] = "all"
    max_prompts: int = 0  # the first so many; 0: all
    temperature: float = 1.0
    greedy: bool = False  # the most likely token each time; then one sample is all there is
    top_k: int = 0
    top_p: float = 1.0
    template: Literal["", "chat", "plain"] = ""
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 256
    max_dropped_share: float = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cache_tokens: int = 65_536  # most tokens of prompts and completions held at once

    def __post_init__(self) -> None:
        _check_sampling(self)
        require(not self.greedy or self.samples == 1, "greedy writes the same text each time: set samples = 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """`samples` completions of each prompt by each policy, at one temperature, from the whole distribution (KL needs that)."""

    samples: int = 4
    split: Literal["auto", "all", "train", "held_out"] = "auto"  # auto: held_out, or all where no prompt is held out
    max_prompts: int = 0
    temperature: float = 1.0
    template: Literal["", "chat", "plain"] = ""
    max_prompt_tokens: int = 512
    max_completion_tokens: int = 256
    max_dropped_share: float = 0.02
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cache_tokens: int = 65_536
    tokens_per_micro_batch: int = 8192
    table_samples: int = 50  # rows of samples.jsonl for each policy

    def __post_init__(self) -> None:
        _check_sampling(self)
        require(self.tokens_per_micro_batch >= 1, "tokens_per_micro_batch must be at least 1.")
        require(self.table_samples >= 0, "table_samples must not be negative.")


def _check_sampling(options: GenerateOptions | EvaluateOptions) -> None:
    for name in ("samples", "max_prompt_tokens", "max_completion_tokens", "cache_tokens"):
        require(getattr(options, name) >= 1, f"{name} must be at least 1.")
    require(options.temperature > 0, "temperature must be positive (set greedy = true for the most likely text).")
    require(options.max_prompts >= 0, "max_prompts must not be negative.")
    require(0 <= options.max_dropped_share <= 1, "max_dropped_share must be between 0 and 1.")
    if isinstance(options, GenerateOptions):
        require(options.top_k >= 0 and 0 < options.top_p <= 1, "top_k must not be negative; top_p must be above 0 and at most 1.")
