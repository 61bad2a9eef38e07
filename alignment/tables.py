"""Tables for terminals."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from alignment.models import Job
from alignment.progress import duration


def as_text(table: Table, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(table)
    return stream.getvalue().rstrip()


def jobs_table(jobs: Sequence[Job]) -> str:
    table = Table(box=None, pad_edge=False)
    for title, side in (
        ("job", "left"),
        ("method", "left"),
        ("state", "left"),
        ("step", "right"),
        ("loss", "right"),
        ("left", "right"),
        ("note", "left"),
    ):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for job in jobs:
        steps = f"{job.step:,}/{job.steps:,}" if job.steps else ""
        loss = "" if job.loss is None else f"{job.loss:.4g}"
        left = duration(job.eta_seconds) if job.state == Job.State.RUNNING else ""
        note = job.error or (f"{job.warnings} warnings" if job.warnings else "")
        table.add_row(job.name, job.method, job.state, steps, loss, left, note[:60])
    return as_text(table)


def round_table(summary: dict[str, Any]) -> str:
    """The policies of a round beside each other, then where its outputs went."""
    names = sorted({name for figures in summary["policies"].values() for name in (figures["evaluation"] or {})})
    lines = [f"Round {summary['number']} of {summary['project']}: {summary['state']}"]
    if names:
        table = Table(box=None, pad_edge=False)
        table.add_column("against the starting policy")
        for method in summary["policies"]:
            table.add_column(method, justify="right")
        for name in names:
            values = [(figures["evaluation"] or {}).get(name) for figures in summary["policies"].values()]
            table.add_row(name, *("" if value is None else f"{value:,.4g}" for value in values))
        lines.append(as_text(table))
    else:
        lines += [f"  {job['name']:<40} {job['state']}  {job['error']}".rstrip() for job in summary["jobs"]]
    if summary["reward_model"]:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(summary["reward_model"].items()) if "accuracy" in name)
        lines.append(f"reward model: {figures}" if figures else "reward model: no held-out figures")
    if summary["home_at"]:
        counts = summary["counts"]
        lines.append(f"{counts.get('prompts', 0):,} prompts with {counts.get('completions', 0):,} completions are queued for the raters.")
        left_out = {name: counts[name] for name in ("equal", "blank", "unshown", "too_few", "mended") if counts.get(name)}
        if left_out:
            lines.append("left out: " + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in left_out.items()))
    if summary["counts"].get("no_held_out_prompts"):
        lines.append("warning: the project has no held-out prompts, so the evaluation used prompts that were trained on.")
    return "\n".join(lines)
