"""`manage.py project create|list|add-member|overlap|open|close`."""

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db.models import Count

from annotation.errors import Refused
from annotation.models import Membership, Project, User
from annotation.services.projects import membership_add, project_create, project_open, user_create
from annotation.services.prompts import slots_open


class Command(BaseCommand):
    help = "Create and list projects, add members, raise the raters per prompt, open and close."

    def add_arguments(self, parser: Any) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True)
        create = verbs.add_parser("create", help="make a project")
        create.add_argument("slug", help="short name, as in the address")
        create.add_argument("--name", default="", help="title (default: the slug)")
        create.add_argument("--guidelines", type=Path, help="markdown file for the raters")
        create.add_argument("--criteria", nargs="+", default=[], metavar="NAME", help="names ranked besides the overall order")
        create.add_argument("--overlap", type=int, default=3, help="raters for each prompt (default 3)")
        create.add_argument("--lease-seconds", type=int, default=1800, help="time for one prompt (default 1800)")
        create.add_argument("--held-out-percent", type=int, default=10, help="prompts kept out of training (default 10)")
        create.add_argument("--no-ties", action="store_true", help="raters may not tie completions")
        verbs.add_parser("list", help="all projects")
        add = verbs.add_parser("add-member", help="make a user a member, or change the role")
        add.add_argument("slug")
        add.add_argument("user", help="user name")
        add.add_argument("--role", choices=Membership.Role.values, default="rater")
        add.add_argument("--new", action="store_true", help="make the user, and print a password")
        overlap = verbs.add_parser("overlap", help="raise the raters per prompt, also for prompts that are in")
        overlap.add_argument("slug")
        overlap.add_argument("overlap", type=int)
        for verb in ("open", "close"):
            verbs.add_parser(verb, help=f"{verb} a project to raters").add_argument("slug")

    def handle(self, *args: Any, verb: str, **options: Any) -> None:
        try:
            getattr(self, "_" + verb.replace("-", "_"))(options)
        except Refused as error:
            raise CommandError(error.message) from error

    def _create(self, options: dict[str, Any]) -> None:
        fields = {name: options[name] for name in ("slug", "name", "criteria", "overlap", "lease_seconds", "held_out_percent")}
        guidelines = _read(options["guidelines"]) if options["guidelines"] else ""
        project = project_create(**fields, guidelines=guidelines, ties_allowed=not options["no_ties"])
        self.stdout.write(f"Project {project.slug} is there. Next: `manage.py load {project.slug} FILE`.")

    def _list(self, options: dict[str, Any]) -> None:
        rows = Project.objects.order_by("slug")
        prompts = dict(rows.values_list("pk").annotate(Count("prompts")))
        rankings = dict(rows.filter(rankings__is_current=True).values_list("pk").annotate(Count("rankings")))
        members = dict(rows.values_list("pk").annotate(Count("memberships")))
        for one in rows:
            state = "open" if one.is_open else "closed"
            counts = f"{prompts[one.pk]:,} prompts, {rankings.get(one.pk, 0):,} rankings, {members[one.pk]:,} members"
            self.stdout.write(f"{one.slug:<24} {state:<6} overlap {one.overlap}  {counts}")
        if not rows:
            self.stderr.write("No projects yet: `manage.py project create SLUG` makes one.")

    def _add_member(self, options: dict[str, Any]) -> None:
        project, name = _project(options["slug"]), options["user"]
        user = User.objects.filter(username=name).first()
        if options["new"]:
            if user is not None:
                raise Refused("user_exists", f"There is a user {name!r} already: leave out --new.", 409)
            user, password = user_create(username=name)
            self.stdout.write(f"password: {password}")
        if user is None:
            raise Refused("user_unknown", f"There is no user {name!r}. Add --new to make one.", 404)
        membership_add(project=project, user=user, role=options["role"])
        self.stdout.write(f"{user.username} is {options['role']} of {project.slug}.")

    def _overlap(self, options: dict[str, Any]) -> None:
        project = _project(options["slug"])
        added = slots_open(project=project, overlap=options["overlap"])
        self.stdout.write(f"{project.slug}: {project.overlap} raters per prompt, {added:,} slots added.")

    def _open(self, options: dict[str, Any]) -> None:
        project_open(project=_project(options["slug"]), is_open=True)
        self.stdout.write(f"{options['slug']} is open to raters.")

    def _close(self, options: dict[str, Any]) -> None:
        project_open(project=_project(options["slug"]), is_open=False)
        self.stdout.write(f"{options['slug']} is closed: it hands out no prompts.")


def _project(slug: str) -> Project:
    if project := Project.objects.filter(slug=slug).first():
        return project
    raise Refused("project_unknown", f"There is no project {slug!r}: see `manage.py project list`.", 404)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused("guidelines_unreadable", f"Cannot read the guidelines from {path}: {error}.") from error
