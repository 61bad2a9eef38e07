"""From what a person typed (names, paths, digests, TOML) to the requests that the services take."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.methods import METHODS, Method
from alignment.selectors import model_reference
from alignment.services.jobs import JobRequest
from alignment.services.prompt_files import prompts_write
from alignment.services.rounds import STEPS, RoundRequest, snapshot_input
from annotation.errors import Refused
from annotation.models import Project, Snapshot
from annotation.services.snapshots import snapshot_create
from training.options import OptionError, parse_assignments
from training.rundir import file_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The arguments of one `manage.py align METHOD` line."""

    method: str
    project: str = ""
    model: str = ""
    data: str = ""
    held_out: str = ""
    snapshot: str = ""
    reward_model: str = ""
    baseline: str = ""
    reference: str = ""
    split: str = ""
    limit: int = 0
    shown: int = 4
    config: str = ""
    assignments: tuple[str, ...] = ()
    name: str = ""
    seed: int = 0
    processes: int = 1


def project_get(slug: str) -> Project:
    project = Project.objects.filter(slug=slug).first()
    if project is None:
        near = difflib.get_close_matches(slug, Project.objects.values_list("slug", flat=True), n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "The console at /admin/ lists them; `manage.py load` fills one."
        raise Refused("project_not_found", f"There is no project {slug!r}. {hint}", status=404)
    return project


def options_read(config: str, assignments: Iterable[str]) -> dict[str, Any]:
    """The TOML file, then what `--set` says over it; `dpo.beta=1` goes into the table `dpo`. Raises Refused."""
    values: dict[str, Any] = {}
    if config:
        try:
            values = tomllib.loads(Path(config).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise Refused("config_not_found", f"There is no file {config}.", status=404) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise Refused("config_invalid", f"{config} is not TOML: {error}") from error
    try:
        given = parse_assignments(assignments)
    except OptionError as error:
        raise Refused("option_invalid", f"--set: {error}") from error
    for name, value in given.items():
        table, dot, option = name.partition(".")
        if dot:
            inner = values.setdefault(table, {})
            if not isinstance(inner, dict):
                raise Refused("option_invalid", f"--set {name}: {table} is an option, not a table of options.")
            inner[option] = value
        else:
            values[name] = value
    return values


def job_request(asked: Asked, *, dry_run: bool = False) -> JobRequest:
    """Look up what the line names. Raises Refused. With `dry_run` nothing is written: what would be made new is said in words."""
    method = METHODS[asked.method]
    project = project_get(asked.project) if asked.project else None
    inputs: dict[str, Any] = {}
    for name in ("model", "reward_model", "baseline", "reference"):
        if text := getattr(asked, name):
            inputs[name] = model_reference(text=text)
    if asked.held_out:
        inputs["held_out"] = _file(asked.held_out)
    options = options_read(asked.config, asked.assignments)
    snapshot, data = _data(asked, method, project, dry_run)
    if data:
        inputs["data"] = data
    return JobRequest(
        method=asked.method,
        name=asked.name,
        project=project,
        snapshot=snapshot,
        inputs=inputs,
        options=options,
        seed=asked.seed,
        processes=asked.processes,
        shown=asked.shown,
    )


def round_request(asked: Asked, *, methods: tuple[str, ...]) -> RoundRequest:
    project = project_get(asked.project)
    options = options_read(asked.config, asked.assignments)
    loose = [name for name, value in options.items() if not isinstance(value, Mapping)]
    if loose:
        raise Refused("option_without_step", f"{loose[0]}: say of which step, as in dpo.{loose[0]}=...; steps are {', '.join(STEPS)}.")
    return RoundRequest(
        project=project,
        model=asked.model,
        methods=methods,
        options=options,
        snapshot=_snapshot(asked.snapshot, project) if asked.snapshot else None,
        reward_model=asked.reward_model,
        prompts=asked.limit,
        prompt_split=asked.split or "all",
        shown=asked.shown,
        seed=asked.seed,
        processes=asked.processes,
    )


def _data(asked: Asked, method: Method, project: Project | None, dry_run: bool) -> tuple[Snapshot | None, Any]:
    if asked.data and asked.snapshot:
        raise Refused("data_twice", "Give --data or --snapshot, not both.")
    if asked.data:
        return None, _file(asked.data)
    if method.data == "rankings":
        if asked.snapshot:
            snapshot = _snapshot(asked.snapshot, project)
        elif project is None:
            return None, None
        elif dry_run:
            return None, f"a new snapshot of {project.slug}"
        else:
            snapshot = snapshot_create(project=project)
        return snapshot, snapshot_input(snapshot)
    if asked.snapshot:
        raise Refused("snapshot_unused", f"{method.name} learns from {method.data}, not from a snapshot: give --data, or a project.")
    if method.data == "prompts" and project is not None:
        split = asked.split or "all"
        if dry_run:
            return None, f"prompts of {project.slug} ({split})"
        return None, prompts_write(project=project, split=split, limit=asked.limit, seed=asked.seed)
    return None, None


def _snapshot(digest: str, project: Project | None) -> Snapshot:
    found = Snapshot.objects.filter(digest__startswith=digest)
    if project is not None:
        found = found.filter(project=project)
    listed = list(found[:2])
    if not listed:
        raise Refused("snapshot_not_found", f"There is no snapshot {digest!r}: `manage.py snapshot create PROJECT` makes one.", status=404)
    if len({one.digest for one in listed}) > 1:
        raise Refused("snapshot_ambiguous", f"Several snapshots begin with {digest!r}: give more of the digest.")
    return listed[0]


def _file(path: str) -> dict[str, str]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise Refused("file_not_found", f"There is no file {path}.", status=404)
    return {"path": str(file.resolve()), "digest": file_digest(file)}
