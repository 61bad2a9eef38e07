"""`manage.py snapshot create|verify|export|list`: immutable files of rankings."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.dateparse import parse_date, parse_datetime

from annotation.errors import Refused
from annotation.models import Project, Snapshot, User
from annotation.services.snapshots import snapshot_create, snapshot_folder
from annotation.snapshot_files import EXPORTS, SPLITS, snapshot_export, snapshot_find, snapshot_manifest, snapshot_verify, written_whole


class Command(BaseCommand):
    help = "Make, check, export and list snapshots: immutable files of a project's rankings."

    def add_arguments(self, parser: Any) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True)
        create = verbs.add_parser("create", help="write the project's current rankings to a file")
        create.add_argument("project", help="slug of the project")
        create.add_argument("--rater", action="append", dest="raters", metavar="NAME", help="only this rater; repeatable")
        create.add_argument(
            "--exclude-rater", action="append", dest="exclude_raters", metavar="NAME", help="without this rater; repeatable"
        )
        create.add_argument("--kind", action="append", dest="kinds", choices=User.Kind.values, help="only raters of this kind; repeatable")
        create.add_argument("--round", action="append", dest="rounds", type=int, metavar="N", help="only prompts of this round; repeatable")
        create.add_argument("--since", type=_moment, metavar="DATE", help="only rankings stored since, e.g. 2026-05-01 or 2026-05-01T12:00")
        create.add_argument("--criterion", help="the order by this criterion in place of the overall one")
        verify = verbs.add_parser("verify", help="recompute the digest, the counts and the split")
        verify.add_argument("snapshot", help="digest, its beginning, or a path")
        export = verbs.add_parser("export", help="write chosen/rejected pairs or rankings for other tools")
        export.add_argument("snapshot", help="digest, its beginning, or a path")
        export.add_argument("--format", dest="shape", choices=EXPORTS, default="trl-conversational", help="default: trl-conversational")
        export.add_argument("--split", choices=SPLITS, default="", help="only this split (default: both)")
        export.add_argument("-o", "--output", type=Path, default=Path("-"), help="file to write (default: standard output)")
        listing = verbs.add_parser("list", help="the project's snapshots, newest first")
        listing.add_argument("project", help="slug of the project")

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        try:
            getattr(self, f"_{verb}")(options)
        except Refused as error:
            raise CommandError(error.message) from error

    def _create(self, options: dict[str, Any]) -> None:
        filters = {name: options[name] for name in ("raters", "exclude_raters", "kinds", "rounds", "since", "criterion")}
        snapshot = snapshot_create(project=_project(options["project"]), **filters)
        manifest = snapshot_manifest(snapshot_folder(snapshot.digest))
        counts = snapshot.counts
        self.stdout.write(snapshot.digest)
        self.stderr.write(
            f"{counts['rankings']:,} rankings of {counts['prompts']:,} prompts by {counts['raters']:,} raters: {counts['pairs']:,} pairs, "
            f"{counts['ties']:,} ties; held out: {counts['held_out']['prompts']:,} prompts, {counts['held_out']['rankings']:,} rankings"
        )
        for reason, number in manifest["left_out"].items():
            self.stderr.write(f"left out: {number:,} rankings ({reason.replace('_', ' ')})")
        self.stderr.write(str(snapshot_folder(snapshot.digest)))

    def _verify(self, options: dict[str, Any]) -> None:
        folder = snapshot_find(Path(settings.SNAPSHOTS_DIR), options["snapshot"])
        if broken := snapshot_verify(folder):
            raise CommandError("\n".join([f"{folder} is broken:", *broken]))
        counts = snapshot_manifest(folder)["counts"]
        self.stdout.write(f"{folder.name}: whole. {counts['rankings']:,} rankings, {counts['prompts']:,} prompts, none in both splits.")

    def _export(self, options: dict[str, Any]) -> None:
        folder = snapshot_find(Path(settings.SNAPSHOTS_DIR), options["snapshot"])
        output: Path = options["output"]
        if str(output) == "-":
            counts = snapshot_export(folder, options["shape"], sys.stdout.buffer, options["split"])
        else:
            with written_whole(output) as stream:
                counts = snapshot_export(folder, options["shape"], stream, options["split"])
        rows = counts["rankings"] if options["shape"] == "rankings" else counts["pairs"]
        ties = "kept" if options["shape"] == "rankings" else "left out"
        self.stderr.write(f"{rows:,} rows from {counts['rankings']:,} rankings; {counts['ties']:,} ties {ties}")

    def _list(self, options: dict[str, Any]) -> None:
        snapshots = Snapshot.objects.filter(project=_project(options["project"]))
        if not snapshots:
            self.stderr.write(f"No snapshots yet: `manage.py snapshot create {options['project']}` makes one.")
        for one in snapshots:
            filters = ", ".join(f"{name}={value}" for name, value in one.filters.items()) or "everything"
            counts = f"{one.counts.get('rankings', 0):>7,} rankings {one.counts.get('pairs', 0):>8,} pairs"
            state = "" if snapshot_folder(one.digest).is_dir() else "  (its folder is gone)"
            self.stdout.write(f"{one.digest[:16]}  {one.created_at:%Y-%m-%d %H:%M}  {counts}  {filters}{state}")


def _project(slug: str) -> Project:
    if project := Project.objects.filter(slug=slug).first():
        return project
    raise Refused("project_unknown", f"There is no project {slug!r}: see `manage.py project list`.", 404)


def _moment(text: str) -> datetime:
    try:
        moment = parse_datetime(text)
        day = parse_date(text)
    except ValueError as error:
        raise CommandError(f"--since {text}: {error}.") from error
    if moment is None and day is None:
        raise CommandError(f"--since {text}: write a date such as 2026-05-01 or 2026-05-01T12:00.")
    found = moment or datetime(day.year, day.month, day.day)  # type: ignore[union-attr]
    return found if found.tzinfo else found.replace(tzinfo=UTC)
