"""Runs that are killed again and again until they are done: `python -m tests.training.killed RUN SEED KILLS MORE_RUNS...`.

Each life is a process forked from this one, which has loaded everything and computed nothing, and dies by SIGKILL at a random moment, every
second time while a checkpoint lies half-written. Prints how often that was.
"""

import os
import random
import signal
import sys
import time

import alignment.dpo
import alignment.sft
import rewardmodel.train
from tests.training.tiny import events
from training.rundir import RunDirectory, checkpoint_folders

METHODS = {"sft": alignment.sft.run, "reward": rewardmodel.train.run, "dpo": alignment.dpo.run}


def live(run: RunDirectory) -> int:
    """Start one life; the process id."""
    child = os.fork()
    if child == 0:
        try:
            METHODS[run.method](run)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    return child


def kill(run: RunDirectory, child: int, generator: random.Random, *, writing: bool) -> bool:
    """Kill the life at a random moment after its start; True if a checkpoint was being written just then. It may have ended by itself."""
    started = len(events(run, "start"))
    while len(events(run, "start")) == started:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            raise SystemExit("a life ended before it began")
        time.sleep(0.002)
    time.sleep(generator.random() * 0.3)
    deadline = time.monotonic() + 20
    while writing and not list(run.checkpoints.glob(".step-*.new")) and time.monotonic() < deadline and run.result() is None:
        pass
    # Where nothing is half-written, something whole is there to go on from, however slow the machine.
    while not writing and not checkpoint_folders(run.checkpoints) and time.monotonic() < deadline and run.result() is None:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return bool(list(run.checkpoints.glob(".step-*.new")))


if __name__ == "__main__":
    first, seed, kills, *more = sys.argv[1:]
    generator = random.Random(int(seed))
    for folder in (first, *more):
        run = RunDirectory.open(folder)
        halves = sum(kill(run, live(run), generator, writing=number % 2 == 0) for number in range(int(kills)) if run.result() is None)
        status = os.waitpid(live(run), 0)[1] if run.result() is None else 0
        print(run.method, halves, len(events(run, "resume")), flush=True)
        if status:
            sys.exit(1)
