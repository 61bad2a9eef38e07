"""Options of PPO. No torch and no Django here: the command line checks them before anything starts."""

from dataclasses import dataclass
from typing import Literal

from alignment.ppo.guards import GuardOptions
from alignment.rollout.names import EngineName, require_engine
from training.options import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOOptions(GuardOptions):
    """One step samples `prompts_per_step` x `samples_per_prompt` episodes, scores them, and passes over them `passes` times, each time in
    `minibatches` optimiser steps. There are `max_steps` of them, or what `epochs` over the prompts hold. Rewards are in units of the
    reward model's spread."""

    prompts_per_step: int = 64
    samples_per_prompt: int = 4
    passes: int = 1  # over the episodes of one step ("PPO epochs")
    minibatches: int = 4  # optimiser steps in one pass

    # one, with adapters for policy and reward model and a value model, where that is possible; or four models
    backbone: Literal["auto", "shared", "separate"] = "auto"
    # the value model over one backbone: a head on the policy's states, beside the reward model; or an adapter, at twice the cost of updates
    shared_value: Literal["head", "adapter"] = "head"

    max_completion_tokens: int = 128  # longer completions are cut, and pay `missing_eos_penalty`
    temperature: float = 1.0  # in sampling and in log-probabilities alike
    top_k: int = 0  # refused: see __post_init__
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    missing_eos_penalty: float = 1.0  # taken from the score of a completion that was cut

    reward_view: Literal["mean", "worst", "mean_minus_spread"] = "mean"  # of the members' scores, where the reward model is an ensemble
    spread_weight: float = 1.0  # of the spread in mean_minus_spread

    advantage_estimator: Literal["gae", "rloo", "grpo", "dr_grpo"] = "gae"  # all but gae do without a value model

    kl_coefficient: float = 0.05  # reward per nat; the first one, where a target adapts it
    # a penalty of each token's reward; in the loss it misses what a token does to the KL of later ones
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # k1 in the reward; k2 or k3 in the loss
    kl_target_nats: float = 0.0  # KL of whole completions to keep to; 0: the coefficient stays fixed
    kl_horizon_episodes: int = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2  # 0: plain squared error
    whiten_rewards: bool = False
    whiten_advantages: bool = True  # gae alone: a group's advantages are compared within their group

    learning_rate: float = 1e-4
    value_learning_rate: float = 0.0  # 0: as learning_rate
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    warmup_share: float = 0.1  # without it Adam's first steps cost several nats and bring little reward
    adam_epsilon: float = 1e-5
    epochs: float = 1.0  # over the prompts

    # who writes completions: docs/data-flow.md, section on engines
    engine: EngineName = "built_in"
    engine_url: str = ""  # of a vLLM server
    importance_cap: float = 2.0  # of the weight that corrects a token for the engine's log-probability; 1 is no correction upwards

    cache_tokens: int = 65_536  # most tokens of prompts and completions held at once while sampling

    log_steps: int = 1
    evaluate_steps: int = 10
    evaluation_prompts: int = 64  # held-out ones, or of the training split where none are held out

    def __post_init__(self) -> None:
        GuardOptions.__post_init__(self)
        for name in (
            "prompts_per_step",
            "samples_per_prompt",
            "passes",
            "minibatches",
            "kl_horizon_episodes",
            "evaluation_prompts",
            "cache_tokens",
        ):
            require(getattr(self, name) >= 1, f"{name} must be at least 1.")
        for name in ("missing_eos_penalty", "kl_coefficient", "kl_target_nats", "value_clip_range", "value_learning_rate", "spread_weight"):
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
            self.kl_coefficient > 0 or not self.kl_target_nats, "kl_target_nats multiplies kl_coefficient: give one above 0 to start from."
        )
        self._check_estimator()
        require(self.importance_cap >= 1, "importance_cap must be at least 1, or tokens on which engine and trainer agree are cut.")
        require_engine(self.engine, self.engine_url)
        require(
            self.minibatches <= self.prompts_per_step * self.samples_per_prompt,
            "minibatches must not exceed the episodes of a step, prompts_per_step x samples_per_prompt.",
        )
        if self.on_alarm == "rollback":
            require(self.kl_coefficient > 0, "on_alarm = rollback doubles kl_coefficient, and twice 0 is 0: give one, or use stop.")
            require(self.evaluate_steps > 0, "on_alarm = rollback goes back to the last good evaluation: set evaluate_steps, or use stop.")

    @property
    def has_value_model(self) -> bool:
        return self.advantage_estimator == "gae"

    def _check_estimator(self) -> None:
        """Refuse what would train something else than it says, or what the estimator would pass over in silence."""
        require(
            self.kl_in != "reward" or self.kl_estimator == "k1",
            f"kl_estimator = {self.kl_estimator} in the reward has not the gradient of the KL: its expectation may be right, but a penalty "
            "of the reward needs the log-ratio itself. Use k1, or kl_in = loss.",
        )
        require(
            self.kl_in != "loss" or self.kl_estimator != "k1",
            "kl_estimator = k1 in the loss pulls nowhere: the expectation of its gradient is 0. Use k2 (the gradient of each "
            "token's own KL) or k3 (GRPO's; its gradient is that of the KL the other way round), or kl_in = reward.",
        )
        if self.has_value_model:
            possible = self.lora_rank > 0 and self.backbone != "separate"
            require(self.shared_value == "head" or possible, "shared_value would change nothing: it goes with lora_rank and one backbone.")
            return
        name = self.advantage_estimator
        require(
            self.samples_per_prompt >= 2,
            f"advantage_estimator = {name} compares the samples of a prompt: set samples_per_prompt = 2 or more.",
        )
        for option in ("shared_value", "gamma", "lam", "value_clip_range", "value_learning_rate", "whiten_rewards", "whiten_advantages"):
            usual = type(self).__dataclass_fields__[option].default
            require(
                getattr(self, option) == usual, f"{option} would change nothing: {name} has no value model, and compares within groups."
            )
