"""`python -m alignment RUN_DIR`: do what the run directory's config.json says. Exit statuses: docs/data-flow.md, section 2.

Several processes: `python -m alignment RUN_DIR --processes 2`, or `accelerate launch --num_processes 2 -m alignment RUN_DIR` (with
`--cpu` where there is no accelerator). Add `--config_file alignment/launch/fsdp2.yaml` to either, and they share the weights.
"""

import os

# Before any of these libraries is imported: no telemetry, no thread pools that deadlock in a fork, and threads that sleep while they wait:
# on a machine shared with the site and its database, threads that spin were measured at half the speed.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib
import logging
import sys
import traceback
from pathlib import Path

from alignment.fan_out import asked_of_accelerate, fan_out
from training.errors import InputError, Stopped, TrainingFailed
from training.launched import of_config_file
from training.rundir import RunDirectory

MODULES = {
    "sft": "alignment.sft",
    "reward": "rewardmodel.train",
    "dpo": "alignment.dpo",
    "ppo": "alignment.ppo.train",
    "generate": "alignment.generate",
    "evaluate": "alignment.evaluate",
}
DONE, CRASHED, BAD_INPUT, STOPPED = 0, 1, 2, 75


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignment", description="Do what a run directory's config.json says.")
    parser.add_argument("run_directory")
    parser.add_argument("--processes", type=int, default=0, help="Start this many on this machine. Default: as the launcher says, else 1.")
    parser.add_argument("--config_file", type=Path, help="Of accelerate: how many processes, and how they share the weights.")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        run = RunDirectory.open(given.run_directory)
    except InputError as error:
        sys.stderr.write(f"{error} {error.remedy}\n")
        return BAD_INPUT
    if run.result() is not None:
        sys.stderr.write(f"{run.path} has its result already.\n")
        return DONE
    try:
        count, variables = of_config_file(given.config_file) if given.config_file else asked_of_accelerate(os.environ)
    except InputError as error:
        return _failed(run, BAD_INPUT, str(error), error.remedy)
    processes = given.processes or count
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return fan_out([given.run_directory], processes, variables)
    run.is_writer = os.environ.get("RANK", "0") == "0"
    return guarded(run)


def guarded(run: RunDirectory) -> int:
    """Run the method; whatever goes wrong is in `error.json`, with a remedy where one is known."""
    from training.progress import listen_for_stop
    from training.quiet import quieten

    listen_for_stop()
    quieten()
    try:
        importlib.import_module(MODULES[run.method]).run(run)
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return STOPPED
    except InputError as error:
        return _failed(run, BAD_INPUT, str(error), error.remedy)
    except TrainingFailed as error:
        return _failed(run, CRASHED, str(error), error.remedy)
    except Exception as error:
        remedy = ""
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            remedy = "Lower tokens_per_micro_batch (the update stays the same), or set gradient_checkpointing = true."
        return _failed(run, CRASHED, f"{type(error).__name__}: {error}", remedy)
    return DONE


def _failed(run: RunDirectory, status: int, error: str, remedy: str) -> int:
    detail = traceback.format_exc()
    sys.stderr.write(f"{detail}\n{error} {remedy}\n")
    if run.is_writer:
        run.write_error(error, remedy, detail)
    run.event("end", status="failed")
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # one process that failed must not wait for its fellows in a collective operation at exit
