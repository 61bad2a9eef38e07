"""Markdown tables of what `human_quality` measured."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

NAMES = {
    "majority_accuracy": "majority pairs",
    "accuracy": "single raters' pairs",
    "log_loss_scaled": "log-loss, nats",
    "outcome_log_loss": "log-loss with ties, nats",
}


def tables(report: dict[str, Any], base: str) -> str:
    lines = []
    for name, variants in report["variants"].items():
        lines += ["", f"### {report['titles'][name]}", "", *judges(report["baselines"][name], variants), ""]
        lines += [*against_base(variants, base), ""]
        lines += [*overfitting(variants), ""]
        lines += curve(variants.get(base))
    return "\n".join(lines)


def judges(baselines: dict[str, Any], variants: dict[str, Any]) -> Iterator[str]:
    counts = baselines["counts"]
    yield (
        f"{counts['held_out_prompts']} held-out prompts, {counts['majority_pairs']} majority pairs, {counts['rater_pairs']} pairs and "
        f"{counts['rater_ties']} ties of single raters."
    )
    yield ""
    yield from heading(["", *NAMES.values()])
    for told in variants.values():
        yield row([told["label"], *(with_spread(told["figures"].get(name)) for name in NAMES)])
    for label, figures in baselines["judges"].items():
        yield row([label, *(with_interval(figures.get(name)) for name in NAMES)])
    if baselines["two_people"] is not None:
        yield row(["two people, pairs that neither tied", "", f"{baselines['two_people']:.3f}", "", ""])


def against_base(variants: dict[str, Any], base: str) -> Iterator[str]:
    """Differences on the same pairs, pooled over seeds."""
    yield from heading([f"less {variants[base]['label']}" if base in variants else "", *NAMES.values()])
    for name, told in variants.items():
        if name != base:
            yield row([told["label"], *(signed(told["against_base"].get(measure)) for measure in NAMES)])


def overfitting(variants: dict[str, Any]) -> Iterator[str]:
    """Training beside held-out rankings at the end, in accuracy of single raters' pairs and log-loss as the model says it."""
    yield from heading(["", "accuracy, training", "held-out", "log-loss, training", "held-out", "held-out loss after each epoch"])
    for told in variants.values():
        seeds = list(told["seeds"].values())
        training = [mean([one["train"][name] for one in seeds]) for name in ("accuracy", "log_loss")]
        held_out = [f"{told['figures'][name]['value']:.3f}" for name in ("accuracy", "log_loss")]
        epochs = [mean([step["log_loss"] for step in steps]) for steps in zip(*(one["epochs"] for one in seeds), strict=True)]
        yield row([told["label"], training[0], held_out[0], training[1], held_out[1], ", ".join(epochs) if len(epochs) > 1 else ""])


def curve(told: dict[str, Any] | None) -> list[str]:
    rows = [one["learning_curve"] for one in told["seeds"].values()] if told else []
    if not rows or any(len(steps) < 2 for steps in rows):
        return []
    lines = list(heading(["share of the training prompts", "rankings", "accuracy, single raters' pairs", "log-loss of a ranking"]))
    for steps in zip(*rows, strict=True):
        figures = [spread([step[name] for step in steps]) for name in ("accuracy", "log_loss")]
        lines.append(row([f"{steps[0]['share']:g}", f"{np.mean([step['rankings'] for step in steps]):.0f}", *figures]))
    return [*lines, ""]


def heading(cells: Sequence[str]) -> Iterator[str]:
    yield row(cells)
    yield "|" + "---|" * len(cells)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """Mean over seeds ± the standard deviation between them."""
    return mean(values) + (f" ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}"


def with_spread(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{spread(figure['seeds'])} ({figure['low']:.3f} to {figure['high']:.3f})"


def with_interval(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def signed(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['value']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})"
