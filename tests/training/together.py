"""One of two processes that do several runs one after the other, so that a test pays for starting them once.

`python -m tests.training.together PLAN`: a JSON list of {kind, run, resume_from}; kind is how weights are shared ("none": not at all), or
"count-fsdp2" and the like: how often weights are gathered by one rollout. Its answer is `gathers.json` in the run directory.
"""

import importlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from alignment.__main__ import MODULES
from alignment.ppo.actors import load_actors
from alignment.ppo.options import PPOOptions
from alignment.ppo.train import read_inputs
from training.encode import Encoder
from training.optimiser import Optimiser
from training.options import parse_options
from training.processes import Processes
from training.rundir import RunDirectory
from training.sharding import entry_of

ASKED = {
    "none": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


class Collectives(TorchDispatchMode):
    """How often each collective operation is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_gathers(run: RunDirectory, kind: str) -> dict[str, int]:
    """Three prompts, so that the processes write different numbers of tokens."""
    os.environ.update(ASKED[kind])
    options = parse_options(PPOOptions, run.options)
    encoder, processes = Encoder.of(run.inputs["model"], options), Processes(options.dtype)
    prompts, _, _ = read_inputs(run, encoder, options)
    actors = load_actors(run, encoder, options, processes)
    for model in actors.voices.trained.values():
        Optimiser(model, options, steps=1).start(processes)
    with Collectives() as collectives:
        actors.experience([prompt.prompt_ids for prompt in prompts[:3]], 1, seed=0, step=0)
    voices = actors.voices
    models = {"policy": actors.policy, "reference": voices.reference, "value": voices.value, "reward": voices.scorer.model}
    parts = {name: len(entry.parts()) or len(list(model.parameters())) for name, model in models.items() if (entry := entry_of(model))}
    return {"gathers": collectives.counts["_allgather_base_"], **parts}


def main(plan: list[dict[str, str]]) -> None:
    torch.set_num_threads(1)
    main_process = os.environ["RANK"] == "0"
    for entry in plan:
        run = RunDirectory.open(entry["run"])
        if entry["kind"].startswith("count-"):
            told = count_gathers(run, entry["kind"].removeprefix("count-"))
            if main_process:
                (run.path / "gathers.json").write_text(json.dumps(told))
            continue
        if (source := entry.get("resume_from")) and main_process:
            shutil.copytree(Path(source), run.checkpoints / Path(source).name)
        if dist.is_initialized():
            dist.barrier()
        os.environ.update(ASKED[entry["kind"]])
        importlib.import_module(MODULES[run.method]).run(run)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.flush()
    os._exit(0)
