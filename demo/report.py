"""Measures what the round's policies wrote on held-out prompts, by the demo's hidden truth alone, and tells it as a table and as JSON."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from alignment.models import Job, Round
from annotation.errors import Refused
from demo.measure import Verdict, judge, mean_with_interval, wins
from demo.state import demo_folder
from training.rundir import write_atomically

Verdicts = dict[str, list[Verdict]]  # by prompt
REPORT = "report.json"


def facts_report(made: Round, *, seconds: Callable[[], float]) -> dict[str, Any]:
    """Measure the round, and write `var/demo/report.json`.

    Returns: {"policies": {"sft" | "dpo" | "ppo": figures}, "reward_model": {...}, "rankings": {...}, "seconds": t}.
    Raises:  Refused if a job of the round left no completions.
    """
    start = verdicts(made, "start")
    policies = {"sft": {**figures(start, start), "kl_nats": 0.0}}
    for method in made.methods:
        policies[method] = {**figures(verdicts(made, method), start), **_kl(_metrics(_job(made, "evaluate", method)))}
    report = {
        "policies": policies,
        "reward_model": reward_figures(_job(made, "reward")),
        "rankings": _ranking_figures(made),
        "project": made.project.slug,
        "round": made.number,
        "seconds": round(seconds(), 1),
    }
    write_atomically(demo_folder() / REPORT, json.dumps(report, indent=2) + "\n")
    return report


def _job(made: Round, *parts: str) -> Job:
    return made.jobs.get(name="-".join([made.project.slug, f"r{made.number}", *parts]))


def verdicts(made: Round, policy: str) -> Verdicts:
    """The hidden truth's verdict on every held-out completion of one policy (`start`, `dpo` or `ppo`), by prompt."""
    path = _job(made, "generate", policy).folder / "completions.jsonl"
    found: Verdicts = defaultdict(list)
    for row in read_lines(path):
        question = row["messages"][-1]["content"]
        found[question].append(judge(question, row["text"]))
    if not found:
        raise Refused("no_completions", f"{path} holds no completions: look at its log.txt.")
    return dict(found)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figures(mine: Verdicts, start: Verdicts) -> dict[str, Any]:
    """Means over samples with 95 % intervals by prompt. The win rate compares each sample with each of the SFT policy's, same prompt."""
    rows = [(prompt, verdict) for prompt in sorted(mine) for verdict in mine[prompt]]
    groups = [prompt for prompt, _ in rows]
    told: dict[str, Any] = {}
    measures: dict[str, Callable[[Verdict], float]] = {
        "facts_said": lambda verdict: verdict.facts_said,
        "all_said": lambda verdict: float(verdict.said == verdict.asked),
        "invented": lambda verdict: float(verdict.invented),
        "fluency": lambda verdict: verdict.fluency,
        "words": lambda verdict: float(verdict.words),
        "utility": lambda verdict: verdict.utility,
    }
    for name, measure in measures.items():
        told |= _estimate(name, [measure(verdict) for _, verdict in rows], groups)
    told["words_per_fact"] = round(sum(v.words for _, v in rows) / max(1, sum(v.said for _, v in rows)), 3)
    duels = [
        (prompt, wins(one.utility, other.utility)) for prompt in sorted(mine) for one in mine[prompt] for other in start.get(prompt, [])
    ]
    told |= _estimate("win_rate", [won for _, won in duels], [prompt for prompt, _ in duels])
    return told | {"samples": len(rows), "prompts": len(mine)}


def _estimate(name: str, values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    mean, low, high = mean_with_interval(values, groups)
    return {name: round(mean, 4), f"{name}_interval": [round(low, 4), round(high, 4)]}


def reward_figures(job: Job) -> dict[str, Any]:
    told = _metrics(job)
    return {
        "accuracy": told.get("accuracy"),
        "interval": [told.get("accuracy_low"), told.get("accuracy_high")],
        "majority_accuracy": told.get("majority_accuracy"),
        "baseline_longer": told.get("baseline_longer"),
    }


def _metrics(job: Job) -> dict[str, Any]:
    return json.loads((job.folder / "result.json").read_text(encoding="utf-8"))["metrics"]


def _kl(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """KL from the SFT policy, of whole outputs, by the estimators k1 (with its 95 % interval) and k3."""
    k1, error = metrics.get("kl_k1_nats"), metrics.get("kl_k1_standard_error_nats")
    told = {"kl_nats": k1, "kl_k3_nats": metrics.get("kl_k3_nats")}
    return told if k1 is None or error is None else {**told, "kl_nats_interval": [round(k1 - 1.96 * error, 4), round(k1 + 1.96 * error, 4)]}


def _ranking_figures(made: Round) -> dict[str, Any]:
    counts = made.snapshot.counts if made.snapshot else {}
    return {"snapshot": made.snapshot.digest if made.snapshot else "", **{name: counts.get(name) for name in ("rankings", "pairs", "ties")}}


def report_read() -> dict[str, Any] | None:
    try:
        return json.loads((demo_folder() / REPORT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def show(report: Mapping[str, Any], console: Console) -> None:
    """The table of the policies, and the reward model beside its baseline."""
    names = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
    sample = next(iter(report["policies"].values()))
    title = (
        f"{sample['prompts']} held-out prompts, {sample['samples']} outputs of each policy, judged by the hidden truth (±: 95 %, by prompt)"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy")
    for heading in ("facts said", "wins against SFT", "KL (k1), nats", "words", "words per fact", "invented", "fluency"):
        table.add_column(heading, justify="right")
    for method, told in report["policies"].items():
        wins_told = "-" if method == "sft" else _with_interval(told, "win_rate")
        kl = _with_interval(told, "kl_nats", 2) if told.get("kl_nats_interval") else "-"
        plain = (f"{told['words']:.1f}", f"{told['words_per_fact']:.2f}", f"{told['invented']:.3f}", f"{told['fluency']:.3f}")
        table.add_row(names.get(method, method), _with_interval(told, "facts_said"), wins_told, kl, *plain)
    console.print(table)
    reward, rankings = report["reward_model"], report["rankings"]
    if reward["accuracy"] is not None:
        low, high = reward["interval"]
        console.print(
            f"Reward model: right on {reward['accuracy']:.3f} ({low:.3f} to {high:.3f}) of the raters' held-out pairs; "
            f'"longer wins" on {reward["baseline_longer"]:.3f}.',
            highlight=False,
        )
    console.print(
        f"From {rankings['rankings']} rankings ({rankings['pairs']} pairs, {rankings['ties']} ties). "
        f"{report['seconds'] / 60:.1f} minutes in all.",
        highlight=False,
    )


def _with_interval(told: Mapping[str, Any], name: str, digits: int = 3) -> str:
    low, high = told[f"{name}_interval"]
    return f"{told[name]:.{digits}f} ±{(high - low) / 2:.{digits}f}"
