"""Asks for jobs and changes one's mind about them: create, cancel, resume, retry."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone
from django.utils.text import slugify

from alignment.methods import METHODS, options_check
from alignment.models import Job, Round, TrainedModel
from alignment.options import GenerateOptions
from alignment.services.home import round_open
from alignment.services.settling import dependents_block, round_settle
from annotation.errors import Refused
from annotation.models import MAX_COMPLETIONS, Project, Snapshot, User
from training.errors import InputError
from training.options import parse_options

State = Job.State
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,99}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """What to run. `inputs`: {"model": {"name": ...} | path | hub id, "data": {"path", "digest"}, ...}; the name is made up if empty."""

    method: str
    name: str = ""
    project: Project | None = None
    round: Round | None = None
    snapshot: Snapshot | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    processes: int = 1
    gpu_slots: int = 0  # 0: as many as processes
    max_attempts: int = 3
    shown: int = 4  # completions of a prompt that raters see, where a single `generate` job writes for a project
    created_by: User | None = None


@transaction.atomic
def job_check(*, request: JobRequest) -> list[Job]:
    """Refuse what could only fail later: options, inputs, names. Returns the jobs that this one needs; writes nothing."""
    method = METHODS.get(request.method)
    if method is None:
        raise Refused("method_unknown", f"There is no method {request.method!r}: use one of {', '.join(METHODS)}.")
    if request.name and not NAME.match(request.name):
        raise Refused("name_invalid", f"The name {request.name!r} is not possible: use letters, digits, - and _, at most 100.")
    if request.name and Job.objects.filter(name=request.name).exists():
        raise Refused(
            "name_taken", f"There is a job {request.name!r} already: choose another --name, or `manage.py jobs retry`.", status=409
        )
    if not (1 <= request.processes <= 64 and 0 <= request.gpu_slots <= 64 and 0 <= request.seed < 2**31 and request.max_attempts >= 1):
        raise Refused("number_invalid", "processes must be 1 to 64, gpu_slots 0 to 64, seed 0 to 2147483647 and max_attempts at least 1.")
    if not 2 <= request.shown <= MAX_COMPLETIONS:
        raise Refused("shown_invalid", f"Raters are shown 2 to {MAX_COMPLETIONS} completions of a prompt; got {request.shown}.")
    try:
        options_check(request.method, request.options)
    except InputError as error:
        raise Refused("option_invalid", f"{error} {error.remedy}".strip()) from error
    for name in request.inputs:
        if name not in method.inputs:
            raise Refused("input_unknown", f"{request.method} takes no {name}: it takes {', '.join(method.inputs)}.")
    missing = [name for name in method.required if not request.inputs.get(name)]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise Refused("input_missing", f"{request.method} needs {' and '.join(missing)}: give {flags}.")
    if request.method == Job.Method.GENERATE:
        _check_judge(request)
    return _needed(request)


def _check_judge(request: JobRequest) -> None:
    if parse_options(GenerateOptions, request.options).needs_reward_model and not request.inputs.get("reward_model"):
        what = "keep and most_uncertain_prompts choose by a reward model, and none is given"
        raise Refused("input_missing", f"{what}: give --reward-model, or leave them out.")


@transaction.atomic
def job_create(*, request: JobRequest) -> Job:
    """Queue a job, or let it wait for the jobs whose models it uses. Raises Refused (see `job_check`) and then writes nothing."""
    needs = job_check(request=request)
    name = request.name or _free_name(request)
    made = request.round
    if request.method == Job.Method.GENERATE and request.project and made is None:
        settings_of = {"shown": request.shown}
        made = round_open(project=request.project, methods=["generate"], settings=settings_of, created_by=request.created_by)
    waits = any(job.state != State.SUCCEEDED for job in needs)
    job = Job.objects.create(
        name=name,
        method=request.method,
        state=State.WAITING if waits else State.QUEUED,
        project=request.project,
        round=made,
        snapshot=request.snapshot,
        inputs=request.inputs,
        options=request.options,
        seed=request.seed,
        processes=request.processes,
        gpu_slots=request.gpu_slots or request.processes,
        max_attempts=request.max_attempts,
        run_directory=name,
        created_by=request.created_by,
    )
    job.needs.set(needs)
    return job


def _needed(request: JobRequest) -> list[Job]:
    needs: dict[int, Job] = {}
    for name, value in request.inputs.items():
        if not (isinstance(value, dict) and "name" in value):
            continue
        wanted = "reward" if name == "reward_model" else "policy"
        job = Job.objects.select_for_update(of=("self",)).filter(name=value["name"]).first()
        model = TrainedModel.objects.filter(name=value["name"]).first()
        kind = model.kind if model else (METHODS[job.method].makes if job else "")
        if not kind:
            raise Refused("model_not_found", f"There is no model {value['name']!r}.{_near_model(value['name'])}", status=404)
        if kind != wanted and not (name == "model" and request.method == "reward"):
            raise Refused("model_of_other_kind", f"{name} must be a {wanted} model; {value['name']} is a {kind} model.")
        if model is None and job is not None:
            if job.state in Job.ENDED:
                raise Refused("model_not_made", f"{job.name} is {job.state} and made no model: `manage.py jobs resume {job.name}` first.")
            needs[job.pk] = job
    return list(needs.values())


def _near_model(name: str) -> str:
    near = difflib.get_close_matches(name, TrainedModel.objects.values_list("name", flat=True), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else " `manage.py jobs list` shows what has been made."


def _free_name(request: JobRequest) -> str:
    stem = slugify(f"{request.project.slug}-{request.method}" if request.project else request.method)[:80]
    taken = set(Job.objects.filter(name__startswith=f"{stem}-").values_list("name", flat=True))
    number = 1
    while f"{stem}-{number}" in taken or (Path(settings.RUNS_DIR) / f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


@transaction.atomic
def job_cancel(*, job: Job) -> Job:
    """Stop a running job at its next checkpoint; take one that has not begun out of the queue, with all that wait for it."""
    locked = Job.objects.select_for_update().get(pk=job.pk)
    if locked.state in Job.ENDED:
        raise Refused("job_ended", f"{locked.name} is {locked.state} already: there is nothing to cancel.", status=409)
    if locked.state == State.RUNNING:
        locked.state = State.CANCELLING
        locked.save(update_fields=["state"])
    elif locked.state in (State.WAITING, State.QUEUED):
        has_checkpoint = locked.step > 0
        locked.state = State.STOPPED if has_checkpoint else State.CANCELLED
        locked.fence += 1
        locked.finished_at = timezone.now()
        locked.save()
        dependents_block(job=locked)
        round_settle(round=locked.round)
    return locked


@transaction.atomic
def job_resume(*, job: Job) -> Job:
    """Queue an ended job again, in the same directory: it goes on from its newest checkpoint. Those that it took with it wait again."""
    locked = Job.objects.select_for_update().get(pk=job.pk)
    if locked.state not in (State.STOPPED, State.CANCELLED, State.FAILED):
        raise Refused("job_not_resumable", f"{locked.name} is {locked.state}: only stopped, cancelled and failed jobs resume.", status=409)
    return _queue_again(locked)


@transaction.atomic
def job_retry(*, job: Job) -> Job:
    """Queue an ended job again from its first step, in a fresh directory. The old directory stays for whoever wants to read it."""
    locked = Job.objects.select_for_update().get(pk=job.pk)
    if locked.state not in (State.STOPPED, State.CANCELLED, State.FAILED):
        raise Refused(
            "job_not_retryable",
            f"{locked.name} is {locked.state}: only stopped, cancelled and failed jobs are run again. "
            "To repeat a job that succeeded, make a new one with the same options: `manage.py jobs show` prints the command.",
            status=409,
        )
    number = 2
    while (folder := Path(settings.RUNS_DIR) / f"{locked.name}.{number}").exists():
        number += 1
    folder.mkdir(parents=True)  # now nobody else can choose it
    locked.run_directory, locked.event_offset, locked.warnings = folder.name, 0, 0
    locked.step, locked.steps, locked.metrics, locked.eta_seconds, locked.tokens_per_second = 0, 0, {}, None, None
    return _queue_again(locked)


def _queue_again(job: Job) -> Job:
    # A job that failed because of another comes back with that other one.
    root = job.blocked_by if job.blocked_by_id else None
    if root is not None and root.state in (State.STOPPED, State.CANCELLED, State.FAILED):
        raise Refused(
            "job_blocked", f"{job.name} waits for {root.name}, which is {root.state}: `manage.py jobs resume {root.name}`.", status=409
        )
    revived = [job, *Job.objects.select_for_update().filter(blocked_by=job, state__in=[State.FAILED, State.CANCELLED])]
    for one in revived:
        unmet = one.needs.exclude(state=State.SUCCEEDED).exists()
        one.state = State.WAITING if unmet else State.QUEUED
        one.attempt, one.error, one.remedy, one.exit_code, one.blocked_by, one.finished_at = 0, "", "", None, None, None
        one.save()
    round_settle(round=job.round)
    return job
