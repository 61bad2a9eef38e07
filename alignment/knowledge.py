"""What a reward model tells about itself, for its page: `rankloop_report.json` as tables and two plots. The template writes the SVG."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.curves import tick_labels, ticks

REPORT_FILE, REPORT_FORMAT = "rankloop_report.json", "rankloop.report/1"
WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
GLUE = "\N{NO-BREAK SPACE}"

BANDS = {
    "unanimous": "all alike",
    "nearly all": "more than two thirds apart",
    "up to two thirds": "up to two thirds apart",
    "up to one third": "up to one third apart",
    "split": "evenly split",
    "one rater": "only one rater",
}
CEILING = {
    "rater_agreement": "two raters agree with each other",
    "ceiling": "a rater agrees with the majority of the others",
    "ceiling_upper": "most that any judge can reach",
    "accuracy": "this model, on the same pairs",
    "accuracy_of_ceiling": "the model's share of what the majority reaches",
}
CORRELATIONS = {
    "preference_score_given_length": ("people's choice and score", "length"),
    "score_length_given_preference": ("score and length", "people's choice"),
    "preference_length_given_score": ("people's choice and length", "score"),
    "preference_shown_first_given_score": ("people's choice and being shown first", "score"),
}
# Figures that the section shows better than a list of numbers does.
TOLD_HERE = ("partial_", "calibration_", "temperature", "ceiling", "rater_agreement", "accuracy_of_ceiling")


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with the ends of its interval, in pixels."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    question: str
    x_name: str
    y_name: str
    marks: list[Mark]
    path: str
    diagonal: tuple[float, float, float, float] | None  # where predictions are right
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    columns: tuple[str, ...]
    table: list[tuple[str, ...]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Each table is rows of texts; empty where the rankings do not tell."""

    plots: list[Plot]
    agreement: list[tuple[str, str, str, str]]
    ceiling: list[tuple[str, str]]
    correlations: list[tuple[str, str, str]]
    calibration: list[tuple[str, str]]


def knowledge_of(folder: Path) -> Knowledge | None:
    """None where the model's folder is not on this machine, or holds no report."""
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict) or report.get("format") != REPORT_FORMAT or not report.get("calibration"):
        return None
    calibration = report["calibration"]
    plots = [_reliability(calibration["bins"])]
    curve = [row for row in report["learning_curve"] if row["accuracy"] is not None and row["rankings"]]
    if len(curve) > 1:
        plots.append(_learning(curve))
    agreement = [
        (BANDS.get(row["band"], row["band"]), f"{row['pairs']:,}", interval(row, "accuracy"), share(row["confidence"]))
        for row in report["by_agreement"]
    ]
    ceiling = [(CEILING[name], interval(report["ceiling"][name], "value", "")) for name in CEILING if name in report["ceiling"]]
    told = {row["name"]: row for row in report["correlations"]}
    correlations = [(what, given, interval(told[name], "value")) for name, (what, given) in CORRELATIONS.items() if name in told]
    return Knowledge(plots, agreement, ceiling, correlations, _calibration(calibration))


def told_elsewhere(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics without those that the section shows."""
    return {name: value for name, value in metrics.items() if not name.removeprefix("held_out_").startswith(TOLD_HERE)}


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def interval(row: dict[str, Any], name: str, prefix: str | None = None) -> str:
    """`0.710 (0.680 to 0.740)`; the ends are `<name>_low` and `<name>_high`, or `low` and `high`."""
    before = f"{name}_" if prefix is None else prefix
    value, low, high = row.get(name), row.get(f"{before}low"), row.get(f"{before}high")
    # Narrow cells break between estimate and interval, and nowhere else.
    return share(value) + (f" ({share(low)}{GLUE}to{GLUE}{share(high)})" if low is not None and high is not None else "")


def _calibration(calibration: dict[str, Any]) -> list[tuple[str, str]]:
    high = calibration["temperature_high"]
    temperature = (
        f"{calibration['temperature']:.3f} ({share(calibration['temperature_low'])}{GLUE}to{GLUE}{'any' if high is None else share(high)})"
    )
    rows = [
        ("temperature that makes it honest (above 1: it was too sure)", temperature),
        ("calibration error, as trained", share(calibration["error"])),
        ("the same, with a temperature fitted on other prompts", share(calibration["error_scaled"])),
        ("log-loss a pair in nats, as trained (0.693: knows nothing)", share(calibration["pair_log_loss"])),
        ("the same, with a temperature fitted on other prompts", share(calibration["pair_log_loss_scaled"])),
    ]
    return [(name, value) for name, value in rows if value]


def _reliability(bins: Sequence[dict[str, Any]]) -> Plot:
    rows = [(row["predicted"], row["observed"], row["observed_low"], row["observed_high"], f"{row['pairs']:,}") for row in bins]
    columns = ("predicted", "observed", "pairs")
    return _plot("Is what it calls 80 % sure right 8 times in 10?", "predicted probability", "observed share", rows, columns, diagonal=True)


def _learning(curve: Sequence[dict[str, Any]]) -> Plot:
    rows = [
        (
            float(row["rankings"]),
            row["accuracy"],
            row["accuracy_low"],
            row["accuracy_high"],
            "" if row["log_loss"] is None else f"{row['log_loss']:.3f}",
        )
        for row in curve
    ]
    return _plot("Do more rankings make it better?", "rankings", "accuracy", rows, ("rankings", "accuracy", "log-loss, nats"))


Row = tuple[float, float, float | None, float | None, str]


def _plot(question: str, x_name: str, y_name: str, rows: Sequence[Row], columns: tuple[str, ...], *, diagonal: bool = False) -> Plot:
    """`rows`: x, y, the ends of y's interval, and the last column of the table."""
    xs = [row[0] for row in rows]
    heights = [value for row in rows for value in row[1:4] if value is not None]
    x_marks = ticks(0.5, 1.0) if diagonal else ticks(0.0, max(xs))
    y_marks = ticks(min(0.5, *heights), 1.0) if diagonal else ticks(min(heights), max(heights))
    low_x, high_x, low_y, high_y = x_marks[0], x_marks[-1], y_marks[0], y_marks[-1]

    def x_of(value: float) -> float:
        return round(LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM), 1)

    shown = [
        (f"{x:.3f}" if diagonal else f"{x:,.0f}", interval({"y": y, "y_low": low, "y_high": high}, "y")) for x, y, low, high, _ in rows
    ]
    marks = [
        Mark(x_of(x), y_of(y), y_of(y if low is None else low), y_of(y if high is None else high), f"{name} {at}: {value}")
        for (x, y, low, high, _), (at, value) in zip(rows, shown, strict=True)
        for name in (x_name,)
    ]
    return Plot(
        question,
        x_name,
        y_name,
        marks,
        " ".join(f"{mark.x},{mark.y}" for mark in marks),
        (x_of(0.5), y_of(0.5), x_of(1.0), y_of(1.0)) if diagonal else None,
        [(x_of(mark), label) for mark, label in zip(x_marks, tick_labels(x_marks), strict=True)],
        [(y_of(mark), label) for mark, label in zip(y_marks, tick_labels(y_marks), strict=True)],
        columns,
        [(*pair, row[4]) for pair, row in zip(shown, rows, strict=True)],
    )
