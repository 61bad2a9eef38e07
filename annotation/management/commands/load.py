"""`manage.py load PROJECT FILE`: bring prompts, completions, rankings or preference pairs into a project."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from annotation.adapters import SHAPES
from annotation.errors import Refused
from annotation.loading import LoadOptions, Report, load_file
from annotation.models import Project
from annotation.services.projects import project_create

SHAPES_HELP = "Shapes for --as, otherwise recognised from the first lines:\n" + "\n".join(
    f"  {shape.name:<12} {shape.text}" for shape in SHAPES.values()
)


class Command(BaseCommand):
    help = "Load JSON lines into a project. Bad lines go to a rejects file to be mended; loading a file twice adds nothing."

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> Any:
        return super().create_parser(prog_name, subcommand, epilog=SHAPES_HELP, **kwargs)

    def add_arguments(self, parser: Any) -> None:
        parser.formatter_class = _formatter(parser.formatter_class)
        parser.add_argument("project", help="slug of the project")
        parser.add_argument("file", type=Path, help="file of JSON lines, UTF-8")
        parser.add_argument("--as", dest="shape", choices=sorted(SHAPES), default="", metavar="SHAPE", help="shape of the lines; see below")
        parser.add_argument("--create", action="store_true", help="make the project if it is not there")
        parser.add_argument("--rejects", type=Path, help="where bad lines go (default: FILE.rejects.jsonl)")
        parser.add_argument("--policy", default="", help="policy of completions that name none")

    def handle(
        self, *args: Any, project: str, file: Path, shape: str, create: bool, rejects: Path | None, policy: str, **options: Any
    ) -> None:
        self.progress_at = time.monotonic()
        self.quiet = options["verbosity"] == 0
        try:
            found = _project(project, create)
            load = LoadOptions(shape=shape, policy=policy, rejects=rejects)
            report = load_file(project=found, path=file, options=load, on_reject=self._reject, on_batch=self._progress)
        except Refused as error:
            raise CommandError(error.message) from error
        if not self.quiet:
            self.stdout.write(summary(report, file, found))
        if report.rejected:
            raise CommandError(
                f"{report.rejected:,} of {report.lines:,} lines were rejected; the others are in. Mend {report.rejects_path} and load it.",
                returncode=1,
            )

    def _reject(self, number: int, reason: str) -> None:
        self.stderr.write(f"line {number}: {reason}")

    def _progress(self, report: Report) -> None:
        # On a terminal each batch shows; in a log a line every ten seconds is enough.
        if not self.quiet and time.monotonic() - self.progress_at > (0.5 if sys.stderr.isatty() else 10):
            self.progress_at = time.monotonic()
            self.stderr.write(f"{report.lines:,} lines, {report.added:,} rows added, {report.rejected:,} rejected ...")


def _formatter(base: type) -> type:
    class Formatter(base, argparse.RawDescriptionHelpFormatter):  # type: ignore[misc]
        pass

    return Formatter


def _project(slug: str, create: bool) -> Project:
    if project := Project.objects.filter(slug=slug).first():
        return project
    if create:
        return project_create(slug=slug)
    raise Refused("project_unknown", f"There is no project {slug!r}. Add --create to make it, or see `manage.py project list`.", 404)


def summary(report: Report, file: Path, project: Project) -> str:
    """What was done, in a few plain lines."""
    counts = report.counts
    lines = [f"{file}: {report.lines:,} lines as {report.shape}, {report.rejected:,} rejected"]
    added = [f"{counts[name]:,} {name}" for name in ("prompts", "completions", "rankings", "raters") if counts[name]]
    if counts["slots"]:
        added.append(f"{counts['slots']:,} slots open to raters")
    lines.append(f"  added to {project.slug}: " + (", ".join(added) or "nothing"))
    if counts["present"] or counts["rankings_present"]:
        lines.append(f"  there already: {counts['present']:,} prompts, {counts['rankings_present']:,} rankings")
    if counts["repeated"]:
        lines.append(f"  equal texts of one policy, stored once: {counts['repeated']:,}")
    if report.unused:
        lines.append("  fields not used: " + ", ".join(f"{name} ({number:,})" for name, number in sorted(report.unused.items())))
    return "\n".join(lines)
