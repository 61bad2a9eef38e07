"""What each method takes and makes. Neither torch nor Django: commands, services and pages read it.

`required` and `optional` are the names in a run's `inputs`. `data` says what kind of file `inputs["data"]` is: `rankings` (a snapshot),
`prompts` or `demonstrations`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from training.options import parse_options

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_NOT_FOUND, EXIT_STOPPED = 0, 1, 2, 3, 4
CHILD_BAD_INPUT, CHILD_STOPPED = 2, 75


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    title: str
    options: str  # module:class
    data: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    makes: str = ""  # "policy", "reward" or nothing that is a model

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "sft",
            "Teach a policy by demonstrations",
            "alignment.options:SFTOptions",
            "demonstrations",
            ("model", "data"),
            ("held_out",),
            makes="policy",
        ),
        Method(
            "reward", "Learn to predict how people rank", "rewardmodel.options:RewardOptions", "rankings", ("model", "data"), makes="reward"
        ),
        Method(
            "dpo",
            "Learn a policy straight from rankings",
            "alignment.options:DPOOptions",
            "rankings",
            ("model", "data"),
            ("reference",),
            makes="policy",
        ),
        Method(
            "ppo",
            "Learn a policy against a reward model",
            "alignment.ppo.options:PPOOptions",
            "prompts",
            ("model", "reward_model", "data"),
            ("reference",),
            makes="policy",
        ),
        Method(
            "generate",
            "Write new completions",
            "alignment.options:GenerateOptions",
            "prompts",
            ("model", "data"),
            ("reward_model",),
        ),
        Method(
            "evaluate",
            "Compare two policies",
            "alignment.options:EvaluateOptions",
            "prompts",
            ("model", "baseline", "data"),
            ("reward_model", "reference"),
        ),
    )
}


def options_class(method: str) -> type:
    module, _, name = METHODS[method].options.partition(":")
    return getattr(importlib.import_module(module), name)


def options_check(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method with their values, given and default. Raises OptionError (an InputError) that names the near option."""
    return asdict(parse_options(options_class(method), options, where=method))
