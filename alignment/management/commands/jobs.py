"""`manage.py jobs`: looks at jobs, and changes one's mind about them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from alignment.follow import alarms_of, noted, rollbacks_of
from alignment.ledgers import ledger_of
from alignment.management.commands.align import EXIT_CODES, HelpFormatter
from alignment.methods import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_STOPPED
from alignment.models import Job, TrainedModel
from alignment.progress import facts
from alignment.samples import printable, read_samples
from alignment.selectors import (
    DISPUTED_FILE,
    align_command,
    counts_in,
    disputed_of,
    events_of,
    job_get,
    job_summary,
    lineage_lines,
    run_command,
)
from alignment.services.jobs import job_cancel, job_resume, job_retry
from alignment.tables import figure_lines, jobs_table, sample_lines
from alignment.waiting import wait_for
from annotation.errors import Refused

NAMED_KEYS, NAMED_WARNINGS = 5, 5
CHANGES = {"cancel": job_cancel, "resume": job_resume, "retry": job_retry}
HELP = {
    "cancel": "stop a running job at its next checkpoint, or take it out of the queue",
    "resume": "queue an ended job again, to go on from its checkpoint",
    "retry": "queue an ended job again from its first step, in a fresh folder",
}


class Command(BaseCommand):
    help = "Lists jobs, shows one, and cancels, resumes or retries it."

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, formatter_class=HelpFormatter, epilog=EXIT_CODES, **kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
        listed = commands.add_parser("list", help="the newest jobs")
        listed.add_argument("--project", default="", metavar="SLUG")
        listed.add_argument(
            "--state", default="", choices=["", *Job.State.values], metavar="STATE", help="one of " + ", ".join(Job.State.values)
        )
        listed.add_argument("--all", action="store_true", help="all, not only the newest 30")
        listed.add_argument("--json", action="store_true", help='one JSON object {"jobs": [...]}')
        shown = commands.add_parser("show", help="state, settings, figures, lineage, samples, and the command that repeats it")
        shown.add_argument("name", metavar="JOB")
        shown.add_argument("--samples", action="store_true", help="prompt, output, score and KL of each text, instead")
        shown.add_argument("--step", type=int, metavar="N", help="of --samples: the evaluation at step N (default: the newest)")
        shown.add_argument("--json", action="store_true")
        logs = commands.add_parser("logs", help="what the run printed")
        logs.add_argument("name", metavar="JOB")
        logs.add_argument("-f", "--follow", action="store_true", help="until it ends; the exit status is that of the job")
        logs.add_argument("-n", "--lines", type=int, default=200, metavar="N", help="begin with the last N lines (default 200)")
        for verb, text in HELP.items():
            change = commands.add_parser(verb, help=text, description=text[0].upper() + text[1:] + ".")
            change.add_argument("name", metavar="JOB")
            change.add_argument("--wait", action="store_true", help="until it has ended; does the work here if no worker has taken it")
            change.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **given: Any) -> None:
        try:
            code = {"list": self._list, "show": self._show, "logs": self._logs}.get(given["verb"], self._change)(given)
        except Refused as error:
            code = EXIT_NOT_FOUND if error.status == 404 else EXIT_BAD_INPUT
            if not given.get("json"):
                raise CommandError(str(error), returncode=code) from error
            self._json({"error": {"code": error.code, "message": error.message}})
        if code:
            raise SystemExit(code)

    def _list(self, given: dict[str, Any]) -> int:
        jobs = Job.objects.select_related("project", "round").order_by("-id")
        if given["project"]:
            jobs = jobs.filter(project__slug=given["project"])
        if given["state"]:
            jobs = jobs.filter(state=given["state"])
        chosen = list(jobs if given["all"] else jobs[:30])
        if given["json"]:
            self._json({"jobs": [job_summary(job) for job in chosen]})
        elif chosen:
            self.stdout.write(jobs_table(chosen))
        else:
            self.stdout.write("No jobs. `manage.py align --help` shows how to ask for one.")
        return 0

    def _show(self, given: dict[str, Any]) -> int:
        job = job_get(name=given["name"])
        if given["samples"] or given["step"] is not None:
            return self._samples(job, given)
        if given["json"]:
            self._json(job_summary(job))
            return 0
        events = events_of(job=job)
        lines = [f"{job.name}  {job.get_method_display()}  {job.state}", *self._facts(job, noted(events))]
        lines += [
            "options: " + (json.dumps(job.options) if job.options else "all defaults"),
            f"seed {job.seed}, {job.processes} process(es)",
        ]
        lines += figure_lines(job.metrics)
        for entry in ledger_of(counts_in(events)):
            which = f"  first: {', '.join(entry.keys[:NAMED_KEYS])}" if entry.keys else ""
            lines.append(f"  {entry.name}: {entry.counts[0]:,} for training, {entry.counts[1]:,} held out{which}")
        alarms = alarms_of(events)
        lines += _more(alarms, "alarm")
        for alarm in alarms[:NAMED_WARNINGS][::-1]:
            where = f"alarm at step {alarm['step']}, {alarm['name']} ({alarm.get('action')})"
            lines.append(printable(f"{where}: {alarm.get('seen')} {alarm.get('remedy')}"))
        told = [event.get("text", "") for event in events if event.get("kind") == "warning"]
        lines += _more(told, "warning")
        lines += [f"warning: {printable(text)}" for text in told[-NAMED_WARNINGS:]]
        if disputed_of(job=job, limit=1):
            lines.append(f"what to label next, most disputed first: {job.folder / DISPUTED_FILE}")
        model = TrainedModel.objects.filter(job=job).first()
        lines += lineage_lines(job=job, model=model)
        for sample in read_samples(job.folder, limit=3, rollbacks=rollbacks_of(events)).rows:
            lines += ["sample: " + printable(json.dumps(sample, ensure_ascii=False))[:400]]
        lines += [f"repeat it by hand: {run_command(job=job)}", f"ask for it again:  {align_command(job=job)}"]
        self.stdout.write("\n".join(lines))
        return 0

    def _samples(self, job: Job, given: dict[str, Any]) -> int:
        written = read_samples(job.folder, limit=1 << 30, step=given["step"], rollbacks=rollbacks_of(events_of(job=job)))
        if not written.rows:
            what = "PPO writes some at each evaluation, evaluate and generate at their end."
            raise Refused("no_samples", f"{job.name} is {job.state} and has no samples in {job.folder}. {what}", status=404)
        if given["step"] is not None and written.step != given["step"]:
            there = f"at steps {', '.join(map(str, written.steps[::-1]))}" if written.steps else "once, at its end: leave --step out"
            raise Refused("no_such_step", f"{job.name} wrote no samples at step {given['step']}; it did {there}.", status=404)
        if given["json"]:
            found = {"steps": written.steps, "step": written.step, "rolled_back": written.rolled_back, "samples": written.rows}
            self.stdout.write(json.dumps(found, indent=2))  # ASCII alone: a policy wrote it, and a terminal may read it
            return 0
        others = [
            f"{step} (rolled back)" if step in written.rolled_back else str(step) for step in written.steps[::-1] if step != written.step
        ]
        title = f"{job.name}: {written.total:,} samples" + (f" at step {written.step}" if written.step is not None else "")
        if written.rolled_back_to is not None:
            title += f", which was rolled back to step {written.rolled_back_to}"
        lines = [title + (f" (--step N for steps {', '.join(others)})" if others else ""), ""]
        for sample in written.rows:
            lines += sample_lines(sample)
        self.stdout.write("\n".join(lines).rstrip())
        return 0

    def _facts(self, job: Job, told: str) -> list[str]:
        lines = [text for text in (facts(job, noted=told),) if text]
        if job.error:
            lines.append(printable(f"error: {job.error} {job.remedy}".rstrip()))
        if job.is_active and job.worker:
            lines.append(f"worker {job.worker}, attempt {job.attempt} of {job.max_attempts}")
        return [*lines, f"folder: {job.folder}"]

    def _logs(self, given: dict[str, Any]) -> int:
        job = job_get(name=given["name"])
        log = job.folder / "log.txt"
        if not log.exists() and not given["follow"]:
            raise Refused("no_log", f"{job.name} is {job.state} and has printed nothing yet.", status=404)
        offset = self._print_from(log, _tail_offset(log, given["lines"]))
        while given["follow"]:
            job.refresh_from_db()
            offset = self._print_from(job.folder / "log.txt", offset)
            if not job.is_active:
                return _exit_of([job])
            time.sleep(0.5)
        return 0

    def _print_from(self, log: Path, offset: int) -> int:
        if not log.exists():
            return 0
        with log.open("rb") as stream:
            stream.seek(offset)
            data = stream.read()
        whole = data.rfind(b"\n") + 1  # so that no character is cut in two
        if whole:
            # A carriage return of a progress bar is a new line here: nothing that was printed is hidden.
            self.stdout.write(printable(data[:whole].decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")), ending="")
            self.stdout.flush()
        return offset + whole

    def _change(self, given: dict[str, Any]) -> int:
        job = CHANGES[given["verb"]](job=job_get(name=given["name"]))
        code = 0
        if given["wait"]:
            jobs, goes_on = wait_for(ids=[job.pk])
            cancelled = given["verb"] == "cancel" and jobs[0].state in (Job.State.CANCELLED, Job.State.STOPPED)
            code = EXIT_STOPPED if goes_on else 0 if cancelled else _exit_of(jobs)
        job.refresh_from_db()
        if given["json"]:
            self._json(job_summary(job))
        else:
            self.stdout.write(f"{job.name} is {job.state}." + (f" {printable(job.error)}" if job.error else ""))
        return code

    def _json(self, value: Any) -> None:
        self.stdout.write(json.dumps(value, indent=2, default=str))  # ASCII alone, as above


def _more(told: Sequence[Any], what: str) -> list[str]:
    """Before the newest ones: how many came earlier."""
    earlier = len(told) - NAMED_WARNINGS
    return [f"{earlier:,} more {what}{'s' if earlier > 1 else ''} before these"] if earlier > 0 else []


def _exit_of(jobs: list[Job]) -> int:
    states = {job.state for job in jobs}
    if Job.State.FAILED in states:
        return EXIT_FAILED
    return EXIT_STOPPED if states & {Job.State.CANCELLED, Job.State.STOPPED} else 0


def _tail_offset(log: Path, lines: int) -> int:
    """Where the last `lines` lines begin."""
    if not log.exists() or lines < 1:
        return log.stat().st_size if log.exists() else 0
    data = log.read_bytes()[-1_000_000:]
    position = len(data)
    for _ in range(lines + 1):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return max(0, log.stat().st_size - len(data))
    return log.stat().st_size - len(data) + position + 1
