"""A policy's answers to many prompts, block by block, the work shared among processes: what `generate` and `evaluate` stand on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.prompts import EncodedPrompt
from alignment.rollout.engines import BuiltIn
from alignment.rollout.interface import Engine
from alignment.rollout.sampling import Sample, Sampling
from training.encode import Encoder
from training.errors import Stopped
from training.processes import Processes
from training.progress import stop_requested
from training.rundir import file_digest

SEQUENCES_PER_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Policy:
    """A loaded policy, its encoder, its prompts encoded by it, and who writes with it (None: the built-in engine)."""

    name: str
    model: Any
    encoder: Encoder
    prompts: Sequence[EncodedPrompt]
    engine: Engine | None = None


def weights_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each weight file of a model folder; empty for a hub name."""
    place = Path(folder)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) if place.is_dir() else []
    return {file.name: file_digest(file) for file in files}


def stream_of(folder: str | Path, purpose: str = "") -> int:
    """A number for the policy's random numbers, from its weights, wherever they lie, and what it writes for: two policies under one seed
    must not write with the same luck, or raters would be shown the same text twice."""
    text = ("".join(weights_digests(folder).values()) or str(folder)) + purpose
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def answers_in_blocks(
    policy: Policy, sampling: Sampling, processes: Processes, *, samples: int, first: int = 0
) -> Iterator[list[tuple[int, list[Sample]]]]:
    """(place of the prompt, its samples) of one block after another, in the order of the prompts, the same on every process.

    Args:    first: the prompt to begin with. What the built-in engine answers a prompt does not depend on it, nor on the blocks.
    Raises:  Stopped between blocks when SIGTERM asked for it.
    """
    engine = policy.engine or BuiltIn(policy.encoder, processes)
    engine.refresh(policy.model)
    size = max(1, SEQUENCES_PER_BLOCK // samples)
    for start in range(first, len(policy.prompts), size):
        (stop,) = processes.any(stop_requested())
        if stop:
            raise Stopped(f"stopped at prompt {start} of {len(policy.prompts)}")
        block = range(start, min(start + size, len(policy.prompts)))
        mine = processes.share(block, [float(len(policy.prompts[place].prompt_ids)) for place in block])
        drawn = engine.sample([policy.prompts[place].prompt_ids for place in mine], sampling, samples=samples, streams=mine)
        local = [(place, drawn[number * samples : (number + 1) * samples]) for number, place in enumerate(mine)]
        yield sorted((pair for part in processes.gather(local) for pair in part), key=lambda pair: pair[0])


def whole_lines(file: Path) -> list[str]:
    """The lines of a JSON lines file, each with its end; one cut short by a crash is left out. Only a newline ends a line: texts may hold
    the other characters that `str.splitlines` cuts at."""
    with file.open(encoding="utf-8", newline="\n", errors="replace") as opened:
        return [line for line in opened if line.endswith("\n")]


def distinct_share(texts: Sequence[str], size: int) -> float:
    """Different runs of `size` words among all such runs of all texts; 0 if there are none. (Li et al. 2016, arXiv:1510.03055.)"""
    runs = [tuple(words[place : place + size]) for text in texts if (words := text.split()) for place in range(len(words) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0
