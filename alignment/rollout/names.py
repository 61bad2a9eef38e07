"""The engines by name, for options: no torch here."""

from typing import Literal
from urllib.parse import urlsplit

from training.errors import InputError
from training.options import OptionError, require

EngineName = Literal["built_in", "continuous", "vllm", "vllm_server"]
KEY = "VLLM_API_KEY"  # the variable that vLLM's own server reads


def checked_url(url: str) -> str:
    """Scheme, host and path of a server.

    Raises:  InputError if it is no plain http or https address. It does not quote it: what stands before an @ is somebody's password."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:  # of a port or brackets
        plain = False
    if not plain or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise InputError(
            "engine_url is not the plain address of a server.",
            remedy=f"Write it as http://host:8000, without user, password or key: a key goes into the variable {KEY}.",
        )
    return url.rstrip("/").removesuffix("/v1")


def require_engine(engine: str, engine_url: str) -> None:
    """Raises:  OptionError where the address of a server is missing, is none, or is given to an engine that has none."""
    require(
        (engine == "vllm_server") == bool(engine_url),
        "engine_url is the address of a vLLM server: engine = vllm_server needs one (http://host:8000), and no other engine takes one.",
    )
    if engine_url:
        try:
            checked_url(engine_url)
        except InputError as error:
            raise OptionError(str(error), remedy=error.remedy) from None
