"""`manage.py align METHOD`: asks for a job, or for a whole round."""

import argparse
import json
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter

from alignment.loss_kinds import LOSS_KINDS
from alignment.methods import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_NOT_FOUND,
    EXIT_OK,
    EXIT_STOPPED,
    METHODS,
    Method,
    options_check,
    options_class,
)
from alignment.models import Job, Round
from alignment.requests import Asked, job_request, round_request
from alignment.samples import printable
from alignment.selectors import align_command, job_summary, round_summary
from alignment.services.jobs import JobRequest, job_check, job_create
from alignment.services.rounds import POLICY_METHODS, round_check, round_create
from alignment.tables import figure_lines, round_table
from alignment.waiting import wait_for
from annotation.errors import Refused
from training.errors import InputError

EXIT_CODES = """exit status:
  0  done (or queued, without --wait)     2  bad input or options      4  cancelled, or stopped at a checkpoint
  1  a job failed                         3  a named thing is missing"""
TOP = f"""examples:
  manage.py align sft --model ./start --data demonstrations.jsonl --name sft --wait
  manage.py align dpo my-project --model sft --set beta=0.2 --set epochs=2 --wait
  manage.py align round my-project --model sft --methods dpo,ppo --wait
`manage.py align dpo --help` lists the options of DPO, and so on. Without --wait a job needs a `manage.py worker`.

{EXIT_CODES}"""

PROJECT_HELP = {
    "rankings": "learn from its rankings, as they are now",
    "prompts": "use its prompts",
    "demonstrations": "the job and its model belong to it",
}
DATA_HELP = {
    "rankings": "a snapshot's rankings.jsonl, instead of PROJECT's",
    "prompts": 'JSON lines {"key", "messages", "split"}, instead of PROJECT\'s',
    "demonstrations": 'JSON lines {"prompt", "completion"} or {"messages"}',
}


class HelpFormatter(DjangoHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of our epilogs."""


class Command(BaseCommand):
    help = "Teaches, tries and compares models: each METHOD asks for one job, `round` for the whole turn of the loop."

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, formatter_class=HelpFormatter, epilog=TOP, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="method", metavar="METHOD", required=True)
        for method in METHODS.values():
            epilog = f"{_options_text(method)}\n\n{EXIT_CODES}"
            _add_method(
                commands.add_parser(
                    method.name, help=method.title, description=method.title + ".", epilog=epilog, formatter_class=HelpFormatter
                ),
                method,
            )
        text = "Snapshot, reward model, policies, new completions, evaluation, and new prompts for the raters, in one chain of jobs"
        epilog = f"--set names the step: --set reward.epochs=3 --set dpo.beta=0.2 --set generate.temperature=1.0\n\n{EXIT_CODES}"
        _add_round(commands.add_parser("round", help=text, description=text + ".", epilog=epilog, formatter_class=HelpFormatter))

    def handle(self, *args: Any, **given: Any) -> None:
        try:
            code = self._round(given) if given["method"] == "round" else self._job(given)
        except (Refused, InputError) as error:
            code = EXIT_NOT_FOUND if getattr(error, "status", 400) == 404 else EXIT_BAD_INPUT
            message = f"{error} {getattr(error, 'remedy', '')}".strip()
            if not given["json"]:
                raise CommandError(message, returncode=code) from error
            self._json({"error": {"code": getattr(error, "code", "invalid"), "message": message}})
        if code != EXIT_OK:
            raise SystemExit(code)

    def _job(self, given: dict[str, Any]) -> int:
        request = job_request(_asked(given), dry_run=given["dry_run"])
        job_check(request=request)
        if given["dry_run"]:
            self._json(_resolved(request))
            return EXIT_OK
        job = job_create(request=request)
        code = self._wait([job.pk]) if given["wait"] else EXIT_OK
        job.refresh_from_db()
        if given["json"]:
            self._json(job_summary(job))
        elif not given["wait"]:
            self.stdout.write(f"{job.name} is {job.state}. A worker does it; follow it with: manage.py jobs logs -f {job.name}")
        else:
            self._tell(job)
        return code

    def _round(self, given: dict[str, Any]) -> int:
        methods = tuple(part.strip() for part in given["methods"].split(",") if part.strip())
        request = round_request(_asked(given), methods=methods)
        round_check(request=request)
        if given["dry_run"]:
            steps = ("reward", *methods, "generate", "evaluate")
            self._json(
                {
                    "model": request.model,
                    "methods": methods,
                    "options": {
                        step: options_check(step, request.generating if step == "generate" else request.options.get(step, {}))
                        for step in steps
                    },
                }
            )
            return EXIT_OK
        made = round_create(request=request)
        code = self._wait(list(made.jobs.values_list("pk", flat=True))) if given["wait"] else EXIT_OK
        made = Round.objects.get(pk=made.pk)
        if given["json"]:
            self._json(round_summary(made))
        else:
            self.stdout.write(round_table(round_summary(made)))
            if not given["wait"]:
                self.stdout.write("A worker does these jobs: start one with `manage.py worker`, follow it with `manage.py jobs list`.")
        return code

    def _wait(self, ids: list[int]) -> int:
        jobs, goes_on = wait_for(ids=ids)
        states = {job.state for job in jobs}
        if Job.State.FAILED in states:
            return EXIT_FAILED
        return EXIT_STOPPED if goes_on or states & {Job.State.CANCELLED, Job.State.STOPPED} else EXIT_OK

    def _tell(self, job: Job) -> None:
        self.stdout.write(f"{job.name}: {job.state}")
        for line in figure_lines(job.metrics):
            self.stdout.write(line)
        if job.error:
            self.stdout.write(printable(f"  {job.error} {job.remedy}".rstrip()))
        if job.state in (Job.State.STOPPED, Job.State.CANCELLED):
            self.stdout.write(f"  go on with: manage.py jobs resume {job.name}")
        self.stdout.write(f"  run: {job.folder}\n  again: {align_command(job=job)}")

    def _json(self, value: Any) -> None:
        self.stdout.write(json.dumps(value, indent=2, default=str))  # ASCII alone: errors quote logs, and a terminal may read it


def _resolved(request: JobRequest) -> dict[str, Any]:
    """What config.json would hold, with every option spelt out."""
    return {
        "method": request.method,
        "name": request.name or None,
        "project": request.project.slug if request.project else None,
        "seed": request.seed,
        "processes": request.processes,
        "inputs": request.inputs,
        "options": options_check(request.method, request.options),
    }


def _asked(given: dict[str, Any]) -> Asked:
    known = {one.name for one in fields(Asked)}
    return Asked(**{name: value for name, value in given.items() if name in known and value is not None})


def _add_method(parser: CommandParser, method: Method) -> None:
    parser.add_argument("project", nargs="?", default="", metavar="PROJECT", help=PROJECT_HELP[method.data])
    parser.add_argument("--model", default="", metavar="MODEL", help="what it starts from: a model's name, a folder, or a hub id")
    if "baseline" in method.inputs:
        parser.add_argument("--baseline", default="", metavar="MODEL", help="the policy that it is compared with")
    if "reward_model" in method.inputs:
        parser.add_argument("--reward-model", default="", metavar="MODEL", help="the reward model that judges")
    if "reference" in method.inputs:
        parser.add_argument("--reference", default="", metavar="MODEL", help="the policy that KL is measured from (default: the start)")
    parser.add_argument("--data", default="", metavar="FILE", help=DATA_HELP[method.data])
    if "held_out" in method.inputs:
        parser.add_argument("--held-out", default="", metavar="FILE", help="more demonstrations, for the held-out loss")
    if method.data == "rankings":
        parser.add_argument(
            "--snapshot", default="", metavar="DIGEST", help="of rankings; the beginning will do (default: a new one of PROJECT)"
        )
    if method.data == "prompts":
        parser.add_argument("--split", choices=["all", "train", "held_out"], default="", help="of PROJECT's prompts")
        parser.add_argument("--limit", type=int, default=0, metavar="N", help="take N of PROJECT's prompts, chosen by hash (default: all)")
    if method.name == "generate":
        parser.add_argument(
            "--shown", type=int, default=4, metavar="N", help="completions of a prompt that PROJECT's raters see (default 4)"
        )
    parser.add_argument("--name", default="", help="of the job, its folder and its model (default: made up)")
    _add_common(parser)


def _add_round(parser: CommandParser) -> None:
    parser.add_argument("project", metavar="PROJECT", help="whose rankings are learnt from and whose raters get the outputs")
    parser.add_argument("--model", required=True, metavar="MODEL", help="the policy to start from: a model's name, a folder, or a hub id")
    parser.add_argument("--methods", default="dpo", metavar="LIST", help=f"of {', '.join(POLICY_METHODS)}, with commas (default dpo)")
    parser.add_argument("--snapshot", default="", metavar="DIGEST", help="learn from this one (default: a new one)")
    parser.add_argument("--reward-model", default="", metavar="MODEL", help="use this one instead of learning one")
    parser.add_argument(
        "--prompts", dest="limit", type=int, default=100, metavar="N", help="to write new completions for; 0 = all (default 100)"
    )
    parser.add_argument("--split", choices=["all", "train", "held_out"], default="all", help="which prompts those are (default all)")
    parser.add_argument(
        "--samples",
        dest="shown",
        type=int,
        default=4,
        metavar="N",
        help="completions of a prompt that raters see, of all policies together (default 4)",
    )
    _add_common(parser)


def _add_common(parser: CommandParser) -> None:
    parser.add_argument("--config", default="", metavar="FILE.toml", help="options from a file")
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="one option, over --config; repeat it"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data, same machine: same result (default 0)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="through `accelerate launch` if more than 1 (default 1)")
    parser.add_argument(
        "--wait", action="store_true", help="show progress until it has ended; does the work here if no worker has taken it"
    )
    parser.add_argument("--json", action="store_true", help="standard output is one JSON object; progress goes to standard error")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, with all options, and queue nothing")


def _options_text(method: Method) -> str:
    try:
        known = options_check(method.name, {})
    except InputError:
        known = {one.name: "(must be given)" for one in fields(options_class(method.name))}
    hints = get_type_hints(options_class(method.name))
    lines = ["options for --set and --config, with their defaults:"]
    for name, value in sorted(known.items()):
        choices = [one for one in get_args(hints[name]) if isinstance(one, str) and one != value]
        lines.append(f"  {name} = {json.dumps(value)}" + (f"   or {', '.join(map(json.dumps, choices))}" if choices else ""))
    if method.name == "dpo":
        width = max(map(len, LOSS_KINDS))
        lines += ["", "losses:", *(f"  {kind.name:<{width}}  {kind.source}" for kind in LOSS_KINDS.values())]
    return "\n".join(lines)
