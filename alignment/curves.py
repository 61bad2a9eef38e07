"""Draws a run's events as curves: each chart answers one question, and has its numbers beside it. Pure; the template writes the SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.follow import metrics_of, numbers

WIDTH, HEIGHT = 480, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MOST_POINTS = 240
DASHES = ("", "6 4", "1 4")

# (question, unit, metrics drawn together); a metric that is in none gets a chart of its own, under its name.
QUESTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Does the reward rise?", "reward", ("reward", "held_out_reward")),
    ("Do the reward model's members agree that it rises?", "reward", ("held_out_reward_mean", "held_out_reward_pessimistic")),
    ("Does the loss fall, also on prompts that it does not learn from?", "nats", ("loss", "held_out_loss", "held_out_log_loss")),
    ("Does it order the completions as people did?", "share of pairs", ("accuracy", "held_out_accuracy")),
    ("How far is the policy from its reference?", "nats a completion", ("kl_k1_nats", "held_out_kl_k1_nats", "kl_k3_nats")),
    ("How clearly does it tell better from worse?", "margin", ("margin", "held_out_margin")),
    ("Do the texts grow longer or shorter?", "tokens", ("length_tokens", "held_out_length_tokens")),
    ("Does it still say different things?", "nats a token", ("entropy_nats", "held_out_entropy_nats")),
    ("Does it give one answer to different prompts?", "share of texts", ("held_out_duplicate_share",)),
    ("Does the value model foresee the returns?", "share of variance", ("explained_variance",)),
    ("Do the log-probabilities of good and bad texts move apart?", "nats", ("chosen_log_ratio", "rejected_log_ratio")),
    ("How likely are good and bad texts themselves?", "nats a completion", ("chosen_logps", "rejected_logps")),
    ("How strong is the pull to the reference?", "reward per nat", ("kl_coefficient",)),
    ("Are the steps of a sane size?", "norm", ("gradient_norm", "value_gradient_norm")),
    ("How fast does it go?", "tokens/s", ("tokens_per_second",)),
)
UNDRAWN = {"steps", "tokens", "seconds", "episodes", "skipped_now", "learning_rate", "value_learning_rate"}


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    path: str  # of the SVG's polyline
    last: float
    dashes: str  # of the stroke: lines differ by more than colour
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """`known`: it answers one of our questions; the others are kept out of the way."""

    question: str
    unit: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    known: bool = True
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM
    table: list[tuple[int, list[str]]] = field(default_factory=list)


def series_of(events: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """{metric: {step: value}}. A resumed run takes up at its checkpoint: what it said before of later steps is forgotten."""
    series: dict[str, dict[int, float]] = {}
    for event in events:
        step = int(event.get("step") or 0)
        if event.get("kind") == "resume":
            for values in series.values():
                for late in [known for known in values if known > step]:
                    del values[late]
        elif event.get("kind") in ("step", "evaluation"):
            for name, value in metrics_of(event).items():
                series.setdefault(name, {})[step] = float(value)
    return {name: values for name, values in series.items() if values}


def charts_of(events: Iterable[dict[str, Any]]) -> list[Chart]:
    """The charts of a run, known questions first. A metric with a single value is a figure, not a curve, and is left out."""
    series = {name: values for name, values in series_of(events).items() if len(values) > 1 and name not in UNDRAWN}
    drawn: set[str] = set()
    charts = []
    for question, unit, names in QUESTIONS:
        present = [name for name in names if name in series]
        if present:
            charts.append(_chart(question, unit, {name: series[name] for name in present}))
            drawn.update(present)
    for name in sorted(series.keys() - drawn):
        if len(set(series[name].values())) > 1:  # what never moves is no curve
            charts.append(_chart(f"How does {name.replace('_', ' ')} move?", "", {name: series[name]}, known=False))
    return charts


def _chart(question: str, unit: str, series: dict[str, dict[int, float]], *, known: bool = True) -> Chart:
    points = {name: thinned(sorted(values.items())) for name, values in series.items()}
    steps = [step for line in points.values() for step, _ in line]
    values = [value for line in points.values() for _, value in line]
    low_x, high_x = min(steps), max(*steps, min(steps) + 1)
    y_marks = ticks(min(values), max(values))
    low_y, high_y = min(y_marks[0], *values), max(y_marks[-1], *values)

    def x_of(step: float) -> float:
        return round(LEFT + (step - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y or 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    lines = [
        Line(name, " ".join(f"{x_of(step)},{y_of(value)}" for step, value in line), line[-1][1], DASHES[index % len(DASHES)], tuple(line))
        for index, (name, line) in enumerate(points.items())
    ]
    x_marks = sorted({round(mark) for mark in ticks(low_x, high_x) if low_x <= mark <= high_x})
    return Chart(
        question,
        unit,
        lines,
        [(x_of(mark), f"{mark:,}") for mark in x_marks],
        [(y_of(mark), label) for mark, label in zip(y_marks, tick_labels(y_marks), strict=True)],
        known,
        table=_table(lines),
    )


def _table(lines: Sequence[Line], most: int = 12) -> list[tuple[int, list[str]]]:
    by_line = [dict(line.points) for line in lines]
    steps = sorted({step for line in by_line for step in line})
    kept = thinned([(step, 0.0) for step in steps], most)
    return [(step, [shown(line[step]) if step in line else "" for line in by_line]) for step, _ in kept]


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most `most` of the points, evenly taken; the first and the last are always among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span low to high."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) * 0.5, low + (abs(low) or 1.0) * 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    return [round(index * step, 12) for index in range(math.floor(low / step), math.ceil(high / step) + 1)]


def tick_labels(marks: Sequence[float]) -> list[str]:
    """With as many decimals as it takes to tell neighbours apart."""
    step = marks[1] - marks[0] if len(marks) > 1 else 1.0
    if step < 1e-4 or max(map(abs, marks)) >= 1e6:
        digits = 1 if max(map(abs, marks)) < 100 * step else 4
        return [f"{mark:.{digits}e}" for mark in marks]
    return [f"{mark:,.{max(0, -math.floor(math.log10(step)))}f}" for mark in marks]


def figures_of(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, interval) for people: `x_low` and `x_high` stand behind their x, and where a run began comes last."""
    plain = numbers(metrics)
    figures = []
    for name in sorted(plain, key=lambda name: (name.startswith("start_"), name)):
        if name.endswith(("_low", "_high")) and name.rpartition("_")[0] in plain:
            continue
        low, high = plain.get(f"{name}_low"), plain.get(f"{name}_high")
        interval = f"({shown(low)} to {shown(high)})" if low is not None and high is not None else ""
        figures.append((name.replace("_", " "), shown(plain[name]), interval))
    return figures


def shown(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1_000_000):
        return f"{value:.1e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
