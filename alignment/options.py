"""Options of the policy methods. No torch and no Django here: the command line checks them before anything starts."""

import difflib
from dataclasses import dataclass, fields
from typing import Literal

from alignment.loss_kinds import LOSS_KINDS
from alignment.rollout.names import EngineName, require_engine
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
    """`batch_rankings` rankings make one step; each is the mean over its pairs. `loss` is a name of `loss_kinds`."""

    batch_rankings: int = 32
    learning_rate: float = 1e-4
    loss: str = "sigmoid"
    beta: float = 0.1  # its size depends on the loss: 0.1 with sigmoid, 2 with simpo, 5 with sigmoid_norm
    ties: Literal["drop", "half", "rao_kupper", "davidson"] = "drop"  # no pair; half a win each way; an outcome with a probability
    tie_probability: float = 0.5  # between equals, with rao_kupper and davidson (0.5 is nu = 3 and nu = 1)
    label_smoothing: float = 0.0  # the share of preferences taken to be the wrong way round
    length_normalised: bool = False  # log-probabilities per token instead of summed
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    alpha_divergence_coefficient: float = 0.5
    strength_margin: float = 0.0  # implicit reward to be ahead by, for one unit of stated strength
    rater_weights: Literal["none", "agreement"] = "none"
    sft_weight: float | None = None  # of the NLL per token of the best band; None: 1 with orpo and cpo, 0 with all others
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0
    kl_prompts: int = 64  # held-out prompts that the trained policy answers once, to measure its KL to the reference; 0: not measured

    @property
    def nll_weight(self) -> float:
        return LOSS_KINDS[self.loss].sft_weight if self.sft_weight is None else self.sft_weight

    def __post_init__(self) -> None:
        TrainingOptions.__post_init__(self)
        near = difflib.get_close_matches(self.loss, LOSS_KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        require(self.loss in LOSS_KINDS, f"there is no loss {self.loss!r}.{hint} Known: {', '.join(LOSS_KINDS)}.")
        require(self.batch_rankings >= 1, "batch_rankings must be at least 1.")
        require(self.kl_prompts >= 0, "kl_prompts must not be negative.")
        for name in ("beta", "discopop_tau"):
            require(getattr(self, name) > 0, f"{name} must be positive.")
        for name in ("strength_margin", "nll_weight", "desirable_weight", "undesirable_weight"):
            require(getattr(self, name) >= 0, f"{name.replace('nll', 'sft')} must not be negative.")
        require(0 < self.tie_probability < 1, "tie_probability must be above 0 and below 1.")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing must be at least 0 and below 0.5.")
        self._check_combination()

    def _check_combination(self) -> None:
        """Refuse what the chosen loss would pass over in silence, or what has no meaning."""
        kind = LOSS_KINDS[self.loss]
        _refuse(self.label_smoothing > 0 and not kind.smoothing, self.loss, "label_smoothing", "has no term for flipped preferences")
        _refuse(
            self.f_divergence != "reverse_kl" and not kind.divergence,
            self.loss,
            "f_divergence",
            "needs rewards whose unknown constant cancels between two completions; only reverse_kl fits",
        )
        _refuse(self.strength_margin > 0 and not kind.margin, self.loss, "strength_margin", "has no margin that could be taken off")
        require(
            not self.length_normalised or (not kind.per_token and self.loss != "sft"),
            f"loss = {self.loss} is per token by itself: leave length_normalised out.",
        )
        _refuse(
            self.length_normalised and self.loss == "kto", "kto", "length_normalised", "measures rewards from the KL of whole completions"
        )
        for name, wanted, holds in (
            ("simpo_gamma", "loss = simpo", self.loss == "simpo"),
            ("discopop_tau", "loss = discopop", self.loss == "discopop"),
            ("desirable_weight", "loss = kto", self.loss == "kto"),
            ("undesirable_weight", "loss = kto", self.loss == "kto"),
            ("tie_probability", "ties = rao_kupper or davidson", self.ties in ("rao_kupper", "davidson")),
            ("alpha_divergence_coefficient", "f_divergence = alpha_divergence", self.f_divergence == "alpha_divergence"),
            ("beta", "a loss of preferences", self.loss != "sft"),
        ):
            usual = next(one.default for one in fields(self) if one.name == name)
            require(holds or getattr(self, name) == usual, f"{name} would change nothing: it goes with {wanted}. Leave it out.")
        require(self.loss != "exo_pair" or self.label_smoothing > 0, "loss = exo_pair needs label_smoothing above 0 (0.001 in its paper).")
        require(self.loss != "sft" or self.sft_weight is None, "loss = sft is the NLL of the best band alone: leave sft_weight out.")
        require(
            self.loss != "sft" or self.ties == "drop",
            "loss = sft looks at the best band alone, and ties cannot change it: use ties = drop.",
        )
        if self.ties in ("rao_kupper", "davidson"):
            reason = f"ties = {self.ties} is a likelihood of its own, of win, tie and loss: it stands in place of loss = sigmoid"
            require(self.loss == "sigmoid", f"{reason}. Use loss = sigmoid, or ties = drop or half.")
            _refuse(self.label_smoothing > 0, f"sigmoid with ties = {self.ties}", "label_smoothing", "has no term for flipped preferences")
            _refuse(self.strength_margin > 0, f"sigmoid with ties = {self.ties}", "strength_margin", "would no longer be a probability")


def _refuse(when: bool, loss: str, option: str, reason: str) -> None:
    require(not when, f"{option} cannot go with loss = {loss}, which {reason}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """`samples` completions of each prompt of a split. Here top_k and top_p are allowed: nothing is trained on their log-probabilities.
    With a reward model more `candidates` may be drawn than are kept."""

    samples: int = 4
    candidates: int = 0  # drawn for each prompt, `samples` of them kept; 0: as samples
    # best: by score. rejection: accepted with probability exp((score - highest) / rejection_beta). uncertain: the set whose order the
    # reward model's members dispute most.
    keep: Literal["first", "best", "rejection", "uncertain"] = "first"
    reward_view: Literal["mean", "worst", "mean_minus_spread"] = "mean"  # of the members' scores, for best and rejection
    spread_weight: float = 1.0
    rejection_beta: float = 0.5  # normalised reward per nat: the kl_coefficient whose optimum is drawn from
    highest_score: float | None = None  # no score is above it; without it, that of the prompt's candidates: then nearly the optimum
    most_uncertain_prompts: int = 0  # keep only so many prompts, the most disputed ones; 0: all
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
    engine: EngineName = "built_in"  # who writes: docs/data-flow.md, section on engines
    engine_url: str = ""  # of a vLLM server

    def __post_init__(self) -> None:
        _check_sampling(self)
        require(not self.greedy or self.drawn == 1, "greedy writes the same text each time: set samples = 1, and no candidates.")
        require(self.candidates == 0 or self.candidates >= self.samples, "candidates must be at least samples (0: as samples).")
        require(
            (self.keep == "first") == (self.drawn == self.samples),
            "keep = best, rejection or uncertain chooses `samples` of more `candidates`: give both, or neither.",
        )
        require(self.rejection_beta > 0, "rejection_beta must be positive.")
        require(self.highest_score is None or self.keep == "rejection", "highest_score goes with keep = rejection: leave it out.")
        require(self.spread_weight >= 0, "spread_weight must not be negative.")
        require_engine(self.engine, self.engine_url)
        require(
            self.engine == "built_in" or not (self.greedy or self.top_k or self.top_p < 1),
            f"engine = {self.engine} draws from the whole distribution alone: greedy, top_k and top_p need engine = built_in.",
        )
        require(self.most_uncertain_prompts >= 0, "most_uncertain_prompts must not be negative.")
        disputes = self.keep == "uncertain" or self.most_uncertain_prompts
        require(not disputes or self.samples >= 2, "a dispute is about pairs: set samples = 2 or more.")

    @property
    def drawn(self) -> int:
        """Completions drawn for each prompt."""
        return self.candidates or self.samples

    @property
    def needs_reward_model(self) -> bool:
        return self.keep != "first" or bool(self.most_uncertain_prompts)


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
    table_samples: int = 50  # prompts of samples.jsonl for each policy
    table_whole: bool = False  # every sample of those prompts, not the first alone

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
