"""Tables for terminals."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alignment.curves import figures_of, shown
from alignment.models import Job
from alignment.progress import duration
from alignment.samples import of_rejection, printable, text_shown


def as_text(table: Table, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(table)
    return stream.getvalue().rstrip()


def sample_lines(sample: dict[str, Any]) -> list[str]:
    """Prompt, output, score and KL of one sample, with what else is known of it."""
    known = ("step", "key", "messages", "text", "baseline_text", "score", "kl_k1_nats", "kl_k3_nats", "tokens", "finished")
    score = sample.get("score")
    facts = [f"score {name} {shown(value)}" for name, value in score.items()] if isinstance(score, dict) else []
    facts += [f"score {shown(score)}"] if isinstance(score, int | float) else []
    facts += [f"KL {shown(sample[f'kl_{name}_nats'])} nats ({name})" for name in ("k1", "k3") if sample.get(f"kl_{name}_nats") is not None]
    facts += [f"{sample['tokens']} tokens"] if "tokens" in sample else []
    facts += [f"{name} {value}".rstrip() for name, value in of_rejection(sample).items()]
    facts += ["cut at the length limit"] if sample.get("finished") is False else []
    facts += [f"{name.replace('_', ' ')} {value}" for name, value in sample.items() if name not in known and isinstance(value, str | int)]
    lines = [printable(f"{sample.get('key', '')}  {', '.join(facts)}").strip().replace("\n", " ")]
    for message in sample.get("messages") or []:
        lines += _told(str(message.get("role", "")), str(message.get("content", "")))
    lines += _told("output", text_shown(sample.get("text")))
    if sample.get("baseline_text") is not None:
        lines += _told("output of its starting point", text_shown(sample["baseline_text"]))
    return [*lines, ""]


def _told(who: str, text: str) -> list[str]:
    """Indented, so that no text passes for a heading."""
    return [f"  {printable(who)}:".replace("\n", " "), *(f"    {line}" for line in printable(text).split("\n"))]


def figure_lines(metrics: dict[str, Any]) -> list[str]:
    """A figure a line, each with its interval behind it."""
    return [f"  {name:<44} {value} {interval}".rstrip() for name, value, interval in figures_of(metrics)]


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
        table.add_row(job.name, job.method, job.state, steps, loss, left, escape(printable(note).replace("\n", " ")[:60]))
    return as_text(table)


# (title, of a policy's evaluation, of the starting policy's in the same evaluation)
COLUMNS = (
    ("reward", "reward_policy", "reward_baseline"),
    ("KL, nats", "kl_k1_nats", ""),
    ("tokens", "length_tokens_policy", "length_tokens_baseline"),
    ("entropy, nats", "entropy_nats", "entropy_nats_baseline"),
    ("distinct pairs", "distinct_2", "distinct_2_baseline"),
    ("empty", "empty_share", "empty_share_baseline"),
)


def round_table(summary: dict[str, Any]) -> str:
    """The policies of a round beside the one that they started from, then where the outputs went."""
    lines = [f"Round {summary['number']} of {summary['project']}: {summary['state']}"]
    evaluated = {name: figures["evaluation"] for name, figures in summary["policies"].items() if figures["evaluation"]}
    if evaluated:
        lines.append(_policies(evaluated))
    else:
        lines += [f"  {job['name']:<40} {job['state']}  {printable(job['error'])}".rstrip() for job in summary["jobs"]]
    if summary["reward_model"]:
        lines.append("reward model on held-out prompts: " + _reward_model(summary["reward_model"]))
    if summary["home_at"]:
        counts = summary["counts"]
        lines.append(f"{counts.get('prompts', 0):,} prompts with {counts.get('completions', 0):,} completions are queued for the raters.")
        left_out = {name: counts[name] for name in ("equal", "blank", "unshown", "too_few", "mended", "less_disputed") if counts.get(name)}
        if left_out:
            lines.append("counted on the way: " + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in left_out.items()))
    if summary["counts"].get("no_held_out_prompts"):
        lines.append("warning: the project has no held-out prompts, so the evaluation used prompts that were trained on.")
    return "\n".join(lines)


def _policies(evaluated: dict[str, dict[str, float]]) -> str:
    table = Table(box=None, pad_edge=False)
    table.add_column("policy")
    for title in ("wins against start", *(column[0] for column in COLUMNS)):
        table.add_column(title, justify="right")
    first = next(iter(evaluated.values()))
    table.add_row("start", "", *(_figure(first.get(baseline)) for _, _, baseline in COLUMNS))
    for name, figures in evaluated.items():
        table.add_row(name, _interval(figures, "win_rate"), *(_figure(figures.get(own)) for _, own, _ in COLUMNS))
    return as_text(table)


def _reward_model(figures: dict[str, float]) -> str:
    told = [f"accuracy {_interval(figures, 'accuracy')}"] if "accuracy" in figures else []
    plain = [name for name in sorted(figures) if name.startswith("baseline_") and not name.endswith(("_low", "_high"))]
    told += [f"{name.replace('_', ' ')} {_interval(figures, name)}" for name in plain]
    return ", ".join(told) or "no figures"


def _interval(figures: dict[str, float], name: str) -> str:
    value, low, high = (figures.get(name + end) for end in ("", "_low", "_high"))
    if value is None:
        return ""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}"
