"""The engines by name, for options: no torch here."""

from typing import Literal

from training.options import require

EngineName = Literal["built_in", "continuous", "vllm", "vllm_server"]


def require_engine(engine: str, engine_url: str) -> None:
    """Raises:  OptionError where the address of a server is missing, or is given to an engine that is none."""
    require(
        (engine == "vllm_server") == bool(engine_url),
        "engine_url is the address of a vLLM server: engine = vllm_server needs one (http://host:8000), and no other engine takes one.",
    )
