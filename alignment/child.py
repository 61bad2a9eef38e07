"""Starts the child process of a run, stops it, and makes sure that there is never a second one in the same directory.

The child's output goes to `log.txt`, through a file description that carries an exclusive `flock`. Every process of the run inherits it,
also those that `accelerate launch` starts in sessions of their own; the lock is free once the last of them is gone, however it went.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = "log.txt"
# The child needs none of these, and a run's log or a model's code should have no way to them.
SECRETS = ("DATABASE_URL", "REDIS_URL", "RANKLOOP_SECRET_KEY", "DJANGO_SETTINGS_MODULE")


class RunBusy(RuntimeError):
    """Another process works in this run directory and could not be ended."""


@dataclass(slots=True)
class Child:
    process: subprocess.Popen[bytes]
    run_directory: Path

    @property
    def process_group(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative if a signal ended it."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to write a checkpoint and exit."""
        _signal_group(self.process_group, signal.SIGTERM)

    def kill(self) -> None:
        _signal_group(self.process_group, signal.SIGKILL)
        for pid in holders(self.run_directory):
            _signal(pid, signal.SIGKILL)
        self.process.wait()


@functools.cache
def gpu_count() -> int:
    """GPUs of this machine, asked without loading torch."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


def child_command(run_directory: Path, processes: int, *, cpu: bool = False) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "alignment", str(run_directory)]
    if cpu:  # accelerate starts one process only here, and dies at SIGTERM before the checkpoint is written: see fan_out
        return [sys.executable, "-m", "alignment", str(run_directory), "--processes", str(processes)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), "--num_machines", "1"]
    # Port 0: any free one, so that two jobs on one machine do not meet.
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return [*launcher, "--multi_gpu", "-m", "alignment", str(run_directory)]


def child_environment(gpus: Sequence[int] | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return environment


def start_child(run_directory: Path, *, processes: int = 1, gpus: Sequence[int] | None = None, cwd: Path | None = None) -> Child:
    """Start the run as a process group of its own. Raises RunBusy if another process is at work in the directory (see `end_leftovers`)."""
    descriptor = os.open(run_directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunBusy(f"Another process is at work in {run_directory}.") from error
        process = subprocess.Popen(
            child_command(run_directory, processes, cpu=not gpus),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=child_environment(gpus),
            start_new_session=True,
        )
    finally:
        os.close(descriptor)
    return Child(process, run_directory)


def end_leftovers(run_directory: Path, process_group: int | None, *, grace_seconds: float) -> bool:
    """End what a dead worker left running in the directory, and return whether there was anything.

    It is asked to write a checkpoint first, so that its work is not lost. Raises RunBusy if something still lives after SIGKILL, for
    example on another machine that shares the folder.
    """
    if _is_free(run_directory):
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in holders(run_directory):
            _signal(pid, number)
        if process_group and not Path("/proc/self/fd").exists():
            _signal_group(process_group, number)
        deadline = time.monotonic() + (grace_seconds if number == signal.SIGTERM else 10)
        while time.monotonic() < deadline:
            if _is_free(run_directory):
                return True
            time.sleep(0.05)
    raise RunBusy(f"A process of an earlier attempt is still at work in {run_directory} and does not end, perhaps on another machine.")


def holders(run_directory: Path) -> list[int]:
    """Processes whose output is the run's log. Linux only; elsewhere the process group has to do."""
    log = str(Path(run_directory).resolve() / LOG)
    found = []
    for entry in Path("/proc").glob("[0-9]*/fd/[12]"):
        try:
            if str(entry.readlink()) == log:
                found.append(int(entry.parts[2]))
        except OSError:
            continue  # ended meanwhile, or another user's
    return sorted(set(found) - {os.getpid()})


def _is_free(run_directory: Path) -> bool:
    try:
        descriptor = os.open(run_directory / LOG, os.O_WRONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _signal_group(process_group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, number)
