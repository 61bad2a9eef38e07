"""`manage.py demo`: the whole loop on built-in data, then the site. See `demo/pipeline.py`."""

import os
import signal
import sys
from typing import Any

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from rich.console import Console

from annotation.errors import Refused
from annotation.models import Project
from demo.accounts import sign_ins
from demo.chat import chat_project
from demo.conductor import Interrupted
from demo.display import Display
from demo.pipeline import STAGES, run_facts
from demo.report import report_read, show
from demo.serve import HOST, check_port, serve
from demo.sizes import MINIATURE, DemoSizes
from demo.smollm2 import run_smollm2
from demo.state import State, demo_folder, only_one_demo


class Command(BaseCommand):
    help = "Runs the whole loop on built-in data, prints what it taught, and serves the site. Run it again to go on after a stop."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--fresh", action="store_true", help="begin from the start, in a new project; the old one stays")
        parser.add_argument("--miniature", action="store_true", help="tiny sizes: a minute, and nothing is learnt (for tests)")

    def handle(self, *args: Any, **given: Any) -> None:
        if settings.PRODUCTION:
            raise CommandError(
                "The demo makes simulated raters and an administrator: run it in development, not with RANKLOOP_ENV=production."
            )
        console = Console() if sys.stdout.isatty() else Console(width=120)  # a log has no width
        wants_site = os.environ.get("SERVE", "1").strip().lower() not in {"0", "no", "false", "off"}
        port, model = _port(), os.environ.get("MODEL", "")
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop in good order
        try:
            if model not in ("", "smollm2"):
                raise Refused("model_unknown", f"MODEL={model!r} is unknown: leave it out, or set MODEL=smollm2.")
            if wants_site:
                check_port(port)
            with only_one_demo():
                call_command("migrate", verbosity=0)
                chat = chat_project()
                if model == "smollm2":
                    projects = [chat, run_smollm2(console, fresh=given["fresh"])]
                else:
                    projects = [chat, _facts(console, MINIATURE if given["miniature"] else DemoSizes(), fresh=given["fresh"])]
                passwords = sign_ins(projects)
        except Refused as error:
            raise CommandError(str(error)) from error
        except (Interrupted, KeyboardInterrupt) as error:
            raise CommandError("Stopped. What was done is kept: the same command goes on from here.", returncode=130) from error
        finally:
            signal.signal(signal.SIGTERM, before)
        _tell(console, passwords, port, wants_site)
        if wants_site:
            serve(port)


def _facts(console: Console, sizes: DemoSizes, *, fresh: bool) -> Project:
    state = State.of("facts", sizes.digest, fresh=fresh)
    report = report_read()
    if report is not None and report.get("project") == state.slug:
        console.print(f"The demo is done already (project {state.slug}); `manage.py demo --fresh` begins another one.", highlight=False)
    else:
        with Display(STAGES, sizes.expected_seconds, console) as display:
            report = run_facts(state, sizes, display)
    show(report, console)
    return Project.objects.get(slug=state.slug)


def _port() -> int:
    text = os.environ.get("PORT") or "8000"
    if not text.isdigit():
        raise CommandError(f"PORT={text!r} is no number.")
    return int(text)


def _tell(console: Console, passwords: dict[str, str], port: int, wants_site: bool) -> None:
    console.print(f"\nThe numbers are in {demo_folder() / 'report.json'}.", highlight=False, soft_wrap=True)
    for name, password in passwords.items():
        told = f"password {password}" if password else "with the password that you have set"
        console.print(f"  sign in as [bold]{name}[/bold], {told}", highlight=False, soft_wrap=True)
    if wants_site:
        console.print(
            f"Rankloop is at [bold]http://{HOST}:{port}/[/bold] (Ctrl-C ends it). Outputs wait there to be ranked.", highlight=False
        )
    else:
        console.print("`make serve` serves the site.", highlight=False)
