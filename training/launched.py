"""What a launcher asks for: how weights are spread over the processes of a run. Read from the environment that `accelerate launch` makes.

No torch here: the process that fans out reads it too.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

from training.errors import InputError

Sharding = Literal["none", "fsdp2", "zero2", "zero3"]

FSDP, FSDP_VERSION = "ACCELERATE_USE_FSDP", "FSDP_VERSION"
DEEPSPEED, ZERO_STAGE = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"
# Options of the launcher that would move weights elsewhere. Rankloop does not, and says so rather than running out of memory later.
OFFLOADS = ("FSDP_OFFLOAD_PARAMS", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE")
SHIPPED = "alignment/launch/{ddp,fsdp2,zero2,zero3}.yaml"


def take_sharding(environment: MutableMapping[str, str]) -> Sharding:
    """What is asked for; the two switches are then gone from the environment. Left there, accelerate and transformers would each begin
    to shard in their own way: by plugins, and by loading weights on the first process only.

    Raises: InputError for FSDP 1, another stage of ZeRO, or offloading.
    """
    asked = sharding_asked(environment)
    for name in (FSDP, DEEPSPEED):
        environment.pop(name, None)
    return asked


def sharding_asked(environment: Mapping[str, str]) -> Sharding:
    fsdp, deepspeed = (environment.get(name, "").lower() in ("true", "1") for name in (FSDP, DEEPSPEED))
    if not (fsdp or deepspeed):
        return "none"
    for name in OFFLOADS:
        if (value := environment.get(name, "none").lower()) not in ("", "none", "false", "0"):
            raise InputError(f"The launcher asks for {name} = {value}; nothing is offloaded here.", remedy=f"Launch with one of {SHIPPED}.")
    if fsdp:
        version = environment.get(FSDP_VERSION, "1")
        if version != "2":
            raise InputError(f"The launcher asks for FSDP {version}; there is FSDP 2 only.", remedy="Set fsdp_version: 2.")
        return "fsdp2"
    stage = environment.get(ZERO_STAGE, "")
    if stage not in ("2", "3"):
        raise InputError(
            f"The launcher asks for ZeRO stage {stage or '(none)'}; there are 2 and 3.", remedy=f"Launch with one of {SHIPPED}."
        )
    return "zero2" if stage == "2" else "zero3"


def of_config_file(file: Path) -> tuple[int, dict[str, str]]:
    """`num_processes` of a config file of accelerate, and the environment that it stands for (`accelerate launch --cpu` leaves that out).

    Raises: InputError where the file cannot be read.
    """
    import yaml  # comes with accelerate; here, because a run in one process does not need it

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        kind, count = str(config.get("distributed_type", "NO")), int(config.get("num_processes", 1))
    except (OSError, yaml.YAMLError, AttributeError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}", remedy=f"Launch with one of {SHIPPED}.") from error
    if kind == "FSDP":
        options: dict[str, Any] = config.get("fsdp_config") or {}
        return count, {FSDP: "true", FSDP_VERSION: str(options.get("fsdp_version", 1))}
    if kind == "DEEPSPEED":
        options = config.get("deepspeed_config") or {}
        return count, {DEEPSPEED: "true", ZERO_STAGE: str(options.get("zero_stage", ""))}
    return count, {}
