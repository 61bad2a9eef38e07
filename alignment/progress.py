"""Shows jobs in a terminal while they run: bars with step, loss, speed and time left, or plain lines where nobody looks."""

import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from alignment.models import Job
from alignment.samples import printable

PLAIN_SECONDS = 10.0  # between two lines of one job


def duration(seconds: float | None) -> str:
    """`45 s`, `12 min`, `3 h 05 min`; empty if unknown."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def facts(job: Job, *, noted: str = "") -> str:
    """What a running job says of itself: `step 40 of 100, loss 0.612, 5,300 tokens/s, 12 s left`.

    Args:  noted: its alarms and warnings, where somebody has read its events; the row counts both as warnings."""
    parts = [f"step {job.step:,} of {job.steps:,}"] if job.steps else []
    if job.loss is not None:
        parts.append(f"loss {job.loss:.4g}")
    if job.tokens_per_second:
        parts.append(f"{job.tokens_per_second:,.0f} tokens/s")
    if job.state == Job.State.RUNNING and job.eta_seconds is not None:
        parts.append(f"{duration(job.eta_seconds)} left")
    if noted or job.warnings:
        parts.append(noted or f"{job.warnings} warning{'s' if job.warnings > 1 else ''}")
    return ", ".join(parts)


class Display:
    """Call `show` as often as you like; use as a context manager. Writes to standard error: standard output is for the answer."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._said: dict[int, tuple[str, int, float]] = {}

    def __enter__(self) -> "Display":
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("{task.fields[state]}"),
                TextColumn("{task.fields[facts]}", style="dim"),
            )
            self._bars = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, jobs: list[Job]) -> None:
        for job in jobs:
            if self._bars is not None:
                self._bar(self._bars, job)
            else:
                self._line(job)

    def say(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def _bar(self, bars: Progress, job: Job) -> None:
        if job.pk not in self._tasks:
            self._tasks[job.pk] = bars.add_task(job.name, total=1.0, state="", facts="")
        bars.update(self._tasks[job.pk], completed=job.share_done, state=job.get_state_display(), facts=facts(job))

    def _line(self, job: Job) -> None:
        state, step, when = self._said.get(job.pk, ("", -1, 0.0))
        now = time.monotonic()
        if job.state == state and (job.step == step or now - when < PLAIN_SECONDS):
            return
        self._said[job.pk] = (job.state, job.step, now)
        told = facts(job)
        self.say(f"{job.name}: {job.get_state_display()}" + (f", {told}" if told else ""))
        if job.state != state and job.error:
            self.say(f"{job.name}: {job.error} {job.remedy}".rstrip())
