"""A run in a process that has little memory: `python -m tests.training.short_of_memory RUN bytes N` or `... RUN rank R TOKENS`.

`bytes`: once everything is loaded, the operating system gives the process N bytes more and no others, so torch's own allocator fails.
`rank`: of several processes, number R alone runs out of memory, in the middle of the backward pass of more than TOKENS tokens.
"""

import os
import resource
import sys
from pathlib import Path

import alignment.dpo
import alignment.sft
import rewardmodel.train
from alignment.__main__ import main
from tests.training.narrow import narrow
from training.gradients import Gradients

OBJECTIVES = {"sft": alignment.sft.Demonstrations, "reward": rewardmodel.train.Scores, "dpo": alignment.dpo.Preferences}


def limit_bytes(more: int) -> None:
    rehearse = Gradients.rehearse

    def limited(self, batches):
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))
        rehearse(self, batches)

    Gradients.rehearse = limited


if __name__ == "__main__":
    run, kind, *numbers = sys.argv[1:]
    if kind == "bytes":
        limit_bytes(int(numbers[0]))
    elif int(os.environ["RANK"]) == int(numbers[0]):
        for objective in OBJECTIVES.values():
            narrow(objective, int(numbers[1]))
    sys.exit(main([run]))
