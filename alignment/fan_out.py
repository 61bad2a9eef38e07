"""One run in several processes on this machine: `python -m alignment RUN_DIR --processes N`.

`accelerate launch --cpu --num_processes N` starts a single process without a word (accelerate 1.15 leaves the rest to mpirun). A run
that finds itself so started reads N, and the config file, from its parent's command line and fans out here. Unlike the launchers of
accelerate and torch, this one passes on the exit status, so that 75 (stopped at a checkpoint) arrives.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.launched import of_config_file

GRACE_SECONDS = 60.0  # for the others, once one process has failed or ended


def asked_of_accelerate(environment: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """(N, what its config file says about sharding) of `accelerate launch --cpu --config_file FILE --num_processes N`, where accelerate has
    started one process only, and told it nothing of the file; else (1, {}).

    Raises: InputError where the config file cannot be read.
    """
    alone = "WORLD_SIZE" not in environment and "MASTER_PORT" in environment
    if not alone or environment.get("ACCELERATE_USE_CPU", "").lower() not in ("true", "1"):
        return 1, {}
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return 1, {}
    config = _option(words, "__config_file")
    count, variables = of_config_file(Path(config)) if config else (1, dict[str, str]())
    number = _option(words, "__num_processes")
    return int(number) if number.isdigit() else count, variables


def _option(words: Sequence[str], wanted: str) -> str:
    for place, word in enumerate(words):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == wanted:
            return value or (words[place + 1] if place + 1 < len(words) else "")
    return ""


def fan_out(arguments: Sequence[str], count: int, variables: Mapping[str, str] | None = None) -> int:
    """Start `python -m alignment *arguments` `count` times as ranks of one group, given `variables`; signals are passed on.

    Returns: the first exit status that is not 0, or 0. Once one process fails, the others, which would wait for it for ever, are ended.
    """
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    children = []
    for rank in range(count):
        environment = {**os.environ, **(variables or {}), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(subprocess.Popen([sys.executable, "-m", "alignment", *arguments], env=environment))

    def pass_on(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    status, deadline = 0, None
    while any(child.poll() is None for child in children):
        ended = [child.returncode for child in children if child.returncode is not None]
        status = status or next((code for code in ended if code), 0)
        if ended and deadline is None:
            deadline = time.monotonic() + (GRACE_SECONDS if status in (0, 75) else 5.0)
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    return status or next((child.returncode for child in children if child.returncode), 0)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
