"""Being asked to stop, and telling how a run goes: seconds, tokens, memory, and when it will be done."""

import resource
import signal
import sys
import time
from collections import deque
from pathlib import Path
from types import FrameType

import torch

from training.processes import Processes, Sums
from training.rundir import RunDirectory

_asked = {"to stop": False}


def listen_for_stop() -> None:
    """From now on SIGTERM and SIGINT ask for a stop at the next step instead of ending the process."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)


def stop_requested() -> bool:
    return _asked["to stop"]


def _ask(_number: int, _frame: FrameType | None) -> None:
    _asked["to stop"] = True


def memory_bytes(device: torch.device) -> int:
    """Most memory this process has used so far: of the accelerator where there is one, else of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Not ru_maxrss: Linux lets a new program begin with the peak of the one that started it.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Progress:
    """Step events, with speed and time left measured over the last minute or so."""

    def __init__(self, run: RunDirectory, processes: Processes, *, steps: int) -> None:
        self.run = run
        self.processes = processes
        self.steps = steps
        self.tokens = 0.0
        self.seconds_before = 0.0  # spent before this process took the run over
        self.started = time.monotonic()
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=20)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def mark(self, step: int) -> None:
        """Where timing starts, once loading is over."""
        self._marks.append((time.monotonic(), step, self.tokens))

    def report(self, step: int, sums: Sums, *, tokens: float, **more: float) -> dict[str, float]:
        """Write a `step` event. Called on every process; `sums` and `tokens` are this process's own.

        Returns: the metrics over all processes.
        """
        metrics = {**self.processes.metrics({**sums, "_tokens": (tokens, 1.0 / self.processes.world)}), **more}
        self.tokens += metrics.pop("_tokens")
        self.mark(step)
        then, step_then, tokens_then = self._marks[0]
        elapsed = max(1e-9, self._marks[-1][0] - then)
        metrics["tokens_per_second"] = (self.tokens - tokens_then) / elapsed
        self.run.event(
            "step",
            step=step,
            steps=self.steps,
            metrics=metrics,
            tokens=round(self.tokens),
            seconds=round(self.seconds, 6),
            eta_seconds=round((self.steps - step) * elapsed / max(1, step - step_then), 1),
            memory_bytes=memory_bytes(self.processes.device),
        )
        return metrics
