"""Reads about jobs, models and rounds."""

import difflib
import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.db.models import Count, F, QuerySet

from alignment.child import child_command, gpu_count
from alignment.curves import charts_of, figures_of, shown
from alignment.follow import alarms_of, noted, rollbacks_of
from alignment.knowledge import knowledge_of, told_elsewhere
from alignment.ledgers import ledger_of
from alignment.models import Job, ModelParent, Round, TrainedModel
from alignment.progress import duration, facts
from alignment.samples import Written, of_rejection, read_samples, text_shown
from annotation.errors import Refused
from annotation.models import Completion
from training.errors import InputError
from training.rundir import RunDirectory

FEW_SAMPLES, ALL_SAMPLES = 8, 1000  # on a page
MOST_NOTED = 20  # alarms, and warnings
NEWEST_STEPS = 12  # evaluations that a page offers at once; the others are folded away
SMALL_PRINT = {"kl_k1_nats": "KL in nats (k1)", "kl_k3_nats": "KL in nats (k3)"}
DISPUTED_FILE = "prompts_by_disagreement.jsonl"


def job_get(*, name: str) -> Job:
    """By name or number. Raises Refused (404) with the near name."""
    found = Job.objects.select_related("project", "round", "snapshot", "blocked_by").filter(name=name).first()
    if found is None and name.isdigit():
        found = Job.objects.filter(pk=int(name)).first()
    if found is None:
        near = difflib.get_close_matches(name, Job.objects.values_list("name", flat=True), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "`manage.py jobs list --all` shows them all."
        raise Refused("job_not_found", f"There is no job {name!r}. {hint}", status=404)
    return found


def jobs_lost_for_good(*, now: datetime) -> QuerySet[Job]:
    """Jobs whose worker is gone and that have been taken up as often as they may."""
    return Job.objects.filter(state=Job.State.RUNNING, lease_expires_at__lt=now, attempt__gte=F("max_attempts"))


def model_reference(*, text: str) -> str | dict[str, str]:
    """What a person calls a model: the name of one that a job made (or will make), a folder, or a hub id such as `org/name`.

    Raises Refused (404) when it is none of them.
    """
    if TrainedModel.objects.filter(name=text).exists() or Job.objects.filter(name=text).exists():
        return {"name": text}
    folder = Path(text).expanduser()
    if folder.is_dir():
        return str(folder.resolve())
    if "/" in text and not text.startswith((".", "/", "~")) and text.count("/") == 1:
        return text
    near = difflib.get_close_matches(text, TrainedModel.objects.values_list("name", flat=True), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else "Name a model of `manage.py jobs list`, an existing folder, or a hub id like org/name."
    raise Refused("model_not_found", f"There is no model {text!r}. {hint}", status=404)


def inputs_resolved(*, job: Job) -> dict[str, Any]:
    """The inputs as the child reads them: paths and hub ids only. Raises Refused if a model that it needs is not there."""
    resolved: dict[str, Any] = {}
    for name, value in job.inputs.items():
        if isinstance(value, dict) and "name" in value:
            model = TrainedModel.objects.filter(name=value["name"]).first()
            if model is None:
                raise Refused("model_not_made", f"{job.name} needs the model {value['name']!r}, which has not been made.", status=404)
            resolved[name] = str(model.folder)
        else:
            resolved[name] = value
    return resolved


def run_command(*, job: Job) -> str:
    """The shell line that repeats the run by hand, from the product's folder."""
    folder = job.folder
    if folder.is_relative_to(settings.BASE_DIR):
        folder = folder.relative_to(settings.BASE_DIR)
    words = child_command(folder, job.processes, cpu=not gpu_count())
    return shlex.join(["python" if word.endswith(("python", "python3")) else word for word in words])


def align_command(*, job: Job) -> str:
    """The `manage.py align` line that asks for the same job under another name."""
    words = ["manage.py", "align", job.method]
    if job.project:
        words.append(job.project.slug)
    for name, value in job.inputs.items():
        if name == "data" and job.snapshot and isinstance(value, dict) and value.get("digest") == job.snapshot.digest:
            words += ["--snapshot", job.snapshot.digest]
        elif isinstance(value, dict):
            words += ["--" + name.replace("_", "-"), str(value.get("name") or value.get("path"))]
        else:
            words += ["--" + name.replace("_", "-"), str(value)]
    for name, value in sorted(job.options.items()):
        words += ["--set", f"{name}={_toml(value)}"]
    words += ["--seed", str(job.seed)]
    if job.processes > 1:
        words += ["--processes", str(job.processes)]
    return shlex.join(words)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def job_summary(job: Job) -> dict[str, Any]:
    """A job as scripts read it; times are ISO 8601, UTC."""
    model = TrainedModel.objects.filter(job=job).first()
    return {
        "name": job.name,
        "method": job.method,
        "state": job.state,
        "project": job.project.slug if job.project else None,
        "round": job.round.number if job.round else None,
        "attempt": job.attempt,
        "step": job.step,
        "steps": job.steps,
        "eta_seconds": job.eta_seconds,
        "metrics": job.metrics,
        "warnings": job.warnings,
        "exit_code": job.exit_code,
        "error": job.error,
        "remedy": job.remedy,
        "seed": job.seed,
        "processes": job.processes,
        "inputs": job.inputs,
        "options": job.options,
        "needs": sorted(job.needs.values_list("name", flat=True)),
        "model": {"name": model.name, "path": str(model.folder), "digest": model.digest} if model else None,
        "run_directory": str(job.folder),
        "created_at": _iso(job.created_at),
        "started_at": _iso(job.started_at),
        "finished_at": _iso(job.finished_at),
    }


def round_summary(made: Round) -> dict[str, Any]:
    """A round with its jobs, and the figures of each policy beside the one that it started from."""
    made = Round.objects.select_related("project", "snapshot").get(pk=made.pk)
    jobs = list(made.jobs.select_related("project", "round").order_by("id"))
    return {
        "project": made.project.slug,
        "number": made.number,
        "state": made.state,
        "methods": made.methods,
        "snapshot": made.snapshot.digest if made.snapshot else None,
        "counts": made.counts,
        "home_at": _iso(made.home_at),
        "reward_model": next((job.metrics for job in jobs if job.method == Job.Method.REWARD), None),
        "policies": {method: _policy_figures(jobs, made, method) for method in made.methods},
        "jobs": [job_summary(job) for job in jobs],
    }


def _policy_figures(jobs: list[Job], made: Round, method: str) -> dict[str, Any]:
    stem = f"{made.project.slug}-r{made.number}"
    by_name = {job.name: job for job in jobs}
    trained, evaluated = by_name.get(f"{stem}-{method}"), by_name.get(f"{stem}-evaluate-{method}")
    return {
        "model": trained.name if trained and trained.state == Job.State.SUCCEEDED else None,
        "state": trained.state if trained else None,
        "evaluation": evaluated.metrics if evaluated and evaluated.state == Job.State.SUCCEEDED else None,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def lineage_lines(*, job: Job, model: TrainedModel | None) -> list[str]:
    """Where a run comes from and what came of it, in words."""
    lines = [
        f"from {name}: {value.get('name') or value.get('path') if isinstance(value, dict) else value}" for name, value in job.inputs.items()
    ]
    if job.snapshot:
        lines.append(f"rankings: snapshot {job.snapshot.digest}")
    if model:
        lines.append(f"made the {model.get_kind_display()} {model.name}, SHA-256 {model.digest[:12]}, in {model.folder}")
        lines += [f"used by {link.child.name} ({link.get_role_display()} it)" for link in model.child_links.select_related("child")]
    return lines


def events_of(*, job: Job) -> list[dict[str, Any]]:
    """All events of the run; empty when its folder is not on this machine."""
    try:
        return RunDirectory.open(job.folder).read_events(0)[0]
    except InputError:
        return []


def counts_in(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest `counts` event."""
    return next((event for event in reversed(events) if event.get("kind") == "counts"), None)


def run_page(*, job: Job, step: int | None = None, all_samples: bool = False) -> dict[str, Any]:
    """What the page of a run shows.

    Args:    step: of the evaluation whose samples are shown; None: the newest one."""
    events = events_of(job=job)
    limit = ALL_SAMPLES if all_samples else FEW_SAMPLES
    written = read_samples(job.folder, limit=limit, step=step, rollbacks=rollbacks_of(events))
    charts, alarms = charts_of(events), alarms_of(events)
    warnings = [event for event in events if event.get("kind") == "warning"][::-1]
    models = {model.name: model for model in TrainedModel.objects.filter(name__in=_names(job))}
    knowledge = knowledge_of(job.folder / "model") if job.method == Job.Method.REWARD else None
    return {
        "job": job,
        "inputs": [(name.replace("_", " "), value, models.get(_name_of(value))) for name, value in job.inputs.items()],
        "model": TrainedModel.objects.filter(job=job).first(),
        "needs": job.needs.order_by("id"),
        "dependents": job.dependents.order_by("id"),
        "charts": [chart for chart in charts if chart.known],
        "more_charts": [chart for chart in charts if not chart.known],
        "notes": [event for event in events if event.get("kind") not in ("step", "evaluation", "part")][-40:][::-1],
        "alarms": alarms[:MOST_NOTED],
        "more_alarms": len(alarms[MOST_NOTED:]),
        "warned": len(warnings),
        "warnings": warnings[:MOST_NOTED],
        "more_warnings": len(warnings[MOST_NOTED:]),
        "ledger": ledger_of(counts_in(events)),
        "knowledge": knowledge,
        "figures": figures_of(told_elsewhere(job.metrics) if knowledge else job.metrics),
        **_samples_shown(written, asked=step, all_samples=all_samples),
        "disputed": disputed_of(job=job, limit=10) if job.method == Job.Method.GENERATE else [],
        "facts": facts(job, noted=noted(events)),
        "percent": round(100 * job.share_done),
        "eta": duration(job.eta_seconds) if job.state == Job.State.RUNNING else "",
        "command": run_command(job=job),
        "again": align_command(job=job),
        "can": _changes_possible(job),
        # Resumed as it is, it stops again: then that is not what the page offers first.
        "guards_stopped_it": job.state == Job.State.FAILED and bool(alarms) and alarms[0].get("action") == "stop",
    }


def _samples_shown(written: Written, *, asked: int | None, all_samples: bool) -> dict[str, Any]:
    chosen = {"step": asked} if asked is not None else {}
    return {
        "samples": [_sample_shown(sample) for sample in written.rows],
        "written": written,
        "asked_step": asked,
        "all_samples": all_samples,
        "most_samples": ALL_SAMPLES,
        "newest_steps": written.steps[:NEWEST_STEPS],
        "older_steps": written.steps[NEWEST_STEPS:],
        "query": urlencode(chosen | ({"all": 1} if all_samples else {})),
    }


def _sample_shown(sample: dict[str, Any]) -> dict[str, Any]:
    """A written text with its question, the text that it is compared with, and the rest as small print."""
    messages = sample.get("messages") or []
    known = ("messages", "text", "baseline_text", "sampling", "score", "member_scores", "rejection")
    rest = {name: value for name, value in sample.items() if name not in known}
    score = sample.get("score")
    scores = {f"score {name}": value for name, value in score.items()} if isinstance(score, dict) else {"score": score}
    rest = {name: value for name, value in (scores | of_rejection(sample) | rest).items() if value is not None}
    return {
        "question": messages[-1].get("content", "") if messages else "",
        "text": text_shown(sample.get("text")),
        "baseline": None if sample.get("baseline_text") is None else text_shown(sample["baseline_text"]),
        "small": {SMALL_PRINT.get(name, name): shown(value) if isinstance(value, float) else value for name, value in rest.items()},
    }


def disputed_of(*, job: Job, limit: int) -> list[dict[str, Any]]:
    """The prompts whose completions a reward model's members dispute most, as `generate` wrote them; empty where nobody asked."""
    try:
        with (job.folder / DISPUTED_FILE).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for _, line in zip(range(limit), lines, strict=False)]
    except (OSError, ValueError):
        return []
    return [{**row, "question": (row.get("messages") or [{}])[-1].get("content", "")} for row in rows]


def _changes_possible(job: Job) -> dict[str, bool]:
    ended_badly = job.state in (Job.State.STOPPED, Job.State.CANCELLED, Job.State.FAILED)
    return {"cancel": job.is_active and job.state != Job.State.CANCELLING, "resume": ended_badly, "retry": ended_badly}


def _name_of(value: Any) -> str:
    return value.get("name", "") if isinstance(value, dict) else ""


def _names(job: Job) -> list[str]:
    return [name for name in map(_name_of, job.inputs.values()) if name]


def model_page(*, model: TrainedModel) -> dict[str, Any]:
    """A model, the models that it came from and those that came of it (each step of the way), and what it has written for people."""
    up, down = _walk(model, "parent"), _walk(model, "child")
    written = (
        Completion.objects.filter(policy=model.name)
        .values("prompt__project__slug", "prompt__round")
        .annotate(completions=Count("id"), prompts=Count("prompt", distinct=True))
        .order_by("prompt__project__slug", "prompt__round")
    )
    knowledge = knowledge_of(model.folder) if model.kind == TrainedModel.Kind.REWARD else None
    used_by = Job.objects.filter(pk__in=[job.pk for job in Job.objects.filter(project=model.project) if model.name in _names(job)])
    return {
        "model": model,
        "ancestors": up,
        "descendants": down,
        "written": written,
        "used_by": used_by.order_by("id"),
        "knowledge": knowledge,
        "figures": figures_of(told_elsewhere(model.metrics) if knowledge else model.metrics),
        "start": model.job.inputs.get("model") if model.job and not isinstance(model.job.inputs.get("model"), dict) else "",
    }


def _walk(model: TrainedModel, side: str) -> list[dict[str, Any]]:
    """Each link on the way up or down, breadth first, with its depth; a model that is reached twice is shown where it is reached first."""
    other = "child" if side == "parent" else "parent"
    seen, front, found = {model.pk}, [model.pk], []
    depth = 1
    while front:
        links = ModelParent.objects.filter(**{f"{other}__in": front}).select_related("parent", "child").order_by("id")
        front = []
        for link in links:
            reached = getattr(link, side)
            found.append({"depth": depth, "model": reached, "role": link.get_role_display(), "of": getattr(link, other)})
            if reached.pk not in seen:
                seen.add(reached.pk)
                front.append(reached.pk)
        depth += 1
    return found
