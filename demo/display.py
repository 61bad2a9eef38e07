"""Shows where the demo is and how long it will still take: bars on a terminal, plain lines in a log."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

LINE_EVERY_SECONDS = 10.0


def spoken(seconds: float) -> str:
    """`45 s` or `3 min 20 s`, rounded to what an estimate is worth."""
    whole = max(0, round(seconds / 5) * 5) if seconds >= 20 else max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


class Display:
    """Stages in order, each with a guess of its seconds. Use as a context manager: `begin`, `update` as often as you like, `end`."""

    def __init__(self, titles: Mapping[str, str], expected_seconds: Mapping[str, float], console: Console | None = None) -> None:
        self.console = console or Console()
        self.titles, self.expected = dict(titles), {key: expected_seconds.get(key, 10.0) for key in titles}
        self.order: Sequence[str] = list(titles)
        self.seconds: dict[str, float] = {}
        self.stage = ""
        self._began = self._said_at = 0.0
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self._tasks = {key: self._bars.add_task(title, total=1.0, start=False, text="") for key, title in self.titles.items()}
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def begin(self, stage: str, text: str = "") -> None:
        self.stage, self._began, self._said_at = stage, time.monotonic(), 0.0
        if self._bars is not None:
            self._bars.start_task(self._tasks[stage])
        self.update(0.0, text)

    def update(self, share: float, text: str = "", eta_seconds: float | None = None) -> None:
        """`share` of the stage done, from 0 to 1; `text` says what is going on; `eta_seconds` of the stage where it is known better."""
        left = self.left_seconds(share, eta_seconds)
        if self._bars is not None:
            self._bars.update(self._tasks[self.stage], completed=share, text=f"{text}   about {spoken(left)} left in all".strip())
        elif time.monotonic() - self._said_at >= LINE_EVERY_SECONDS:
            self._said_at = time.monotonic()
            self._say(f"{share:4.0%}  {text}  (about {spoken(left)} left in all)")

    def end(self, text: str = "") -> float:
        """Returns the seconds that the stage took."""
        self.seconds[self.stage] = seconds = time.monotonic() - self._began
        if self._bars is not None:
            self._bars.update(self._tasks[self.stage], completed=1.0, text=text)
            self._bars.stop_task(self._tasks[self.stage])
        else:
            self._say(f"done in {spoken(seconds)}. {text}".strip())
        return seconds

    def left_seconds(self, share: float, eta_seconds: float | None = None) -> float:
        """The rest of this stage and the later ones, at the pace of the stages that have ended."""
        spent = time.monotonic() - self._began
        if eta_seconds is None:
            eta_seconds = spent * (1 - share) / share if share > 0.1 else max(0.0, self.expected[self.stage] * self._pace() - spent)
        later = self.order[self.order.index(self.stage) + 1 :]
        return eta_seconds + self._pace() * sum(self.expected[stage] for stage in later)

    def _pace(self) -> float:
        """How much slower than expected this machine is; a stage that was done before this run says nothing."""
        known = [(seconds, self.expected[stage]) for stage, seconds in self.seconds.items() if seconds > 1.0]
        if not known:
            return 1.0
        return min(8.0, max(0.3, sum(took for took, _ in known) / sum(expected for _, expected in known)))

    def _say(self, text: str) -> None:
        place = self.order.index(self.stage) + 1
        self.console.print(f"[{place}/{len(self.order)}] {self.titles[self.stage]}: {text}", markup=False, highlight=False, soft_wrap=True)
