"""How big the demo is: everything that costs time, in one place, and the hyper-parameters that were tuned for it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSizes:
    """The facts project. `options` has one table per method, as `manage.py align --set` would take them."""

    corpus_rows: int = 22_000
    vocabulary: int = 512
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    prompts: int = 480
    held_out_percent: int = 25
    overlap: int = 3
    samples: int = 4  # completions per prompt: for the raters, and for the measurement
    seed: int = 1
    options: Mapping[str, Options] = field(default_factory=lambda: DEMO_OPTIONS)
    # Seconds that each stage took on two idle cores: the first guess of the time left, corrected as stages end.
    expected_seconds: Mapping[str, float] = field(default_factory=lambda: EXPECTED_SECONDS)

    @property
    def digest(self) -> str:
        """Names the demo that these sizes make; progress on another one cannot be gone on with."""
        told = {name: value for name, value in asdict(self).items() if name != "expected_seconds"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


# Notices and slips are short; a shorter limit makes a text that never ends cheap.
LENGTHS = {"max_prompt_tokens": 96, "max_completion_tokens": 80}
# Chosen by trials. DPO: with beta 0.1 as many facts are said, but nearly twice as many are invented as with 0.5. PPO: the reward
# model sees inventions less well than omissions, so the policy is kept nearer to SFT than usual and stops before the reward is exhausted.
DEMO_OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {**LENGTHS, "max_steps": 700, "batch_rows": 32, "learning_rate": 6e-3, "adam_beta2": 0.98, "max_held_out_rows": 256},
    "reward": {**LENGTHS, "epochs": 4.0, "batch_rankings": 24, "learning_rate": 1e-3},
    "dpo": {**LENGTHS, "epochs": 2.0, "batch_rankings": 24, "learning_rate": 3e-4, "beta": 0.5},
    "ppo": {
        **LENGTHS,
        "max_steps": 16,
        "prompts_per_step": 64,
        "samples_per_prompt": 4,
        "passes": 1,
        "minibatches": 2,
        "warmup_share": 0.0,
        "learning_rate": 5e-4,
        "kl_coefficient": 0.15,
        "evaluate_steps": 0,
    },
    "generate": {**LENGTHS},
    "evaluate": {**LENGTHS, "samples": 2},
}
EXPECTED_SECONDS: dict[str, float] = {"prepare": 6.0, "sft": 110.0, "write": 12.0, "rank": 18.0, "learn": 130.0, "report": 1.0}

MINIATURE_OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {**LENGTHS, "max_steps": 6, "batch_rows": 8, "learning_rate": 3e-3},
    "reward": {**LENGTHS, "epochs": 1.0, "batch_rankings": 8, "learning_rate": 1e-3},
    "dpo": {**LENGTHS, "epochs": 1.0, "batch_rankings": 8, "learning_rate": 1e-4},
    "ppo": {**LENGTHS, "max_steps": 1, "prompts_per_step": 4, "samples_per_prompt": 2, "minibatches": 1, "evaluation_prompts": 2},
    "generate": {"max_prompt_tokens": 96, "max_completion_tokens": 12},
    "evaluate": {"max_prompt_tokens": 96, "max_completion_tokens": 12, "samples": 2},
}
MINIATURE = DemoSizes(
    corpus_rows=60,
    vocabulary=320,
    hidden_size=16,
    layers=1,
    heads=2,
    prompts=12,
    held_out_percent=40,
    overlap=2,
    samples=3,
    options=MINIATURE_OPTIONS,
    expected_seconds=dict.fromkeys(EXPECTED_SECONDS, 8.0),
)
