"""`manage.py worker`: does the jobs that are queued."""

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from alignment.worker import Worker, WorkerSettings


class Command(BaseCommand):
    help = "Does the queued jobs, one after another or several at a time. Run as many as you like, on as many machines as share the folder."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--slots", type=int, default=1, metavar="N", help="places: a job takes as many as it has processes (default 1)")
        parser.add_argument("--once", action="store_true", help="end when nothing is left to do, instead of waiting for more")
        parser.add_argument("--poll-seconds", type=float, default=1.0, metavar="S", help="between two looks at the queue (default 1)")
        parser.add_argument(
            "--lease-seconds", type=float, default=30.0, metavar="S", help="silence after which others take a job over (default 30)"
        )
        parser.add_argument(
            "--grace-seconds", type=float, default=60.0, metavar="S", help="from SIGTERM to SIGKILL for a child (default 60)"
        )

    def handle(self, *args: Any, **given: Any) -> None:
        names = ("slots", "once", "poll_seconds", "lease_seconds", "grace_seconds")
        try:
            options = WorkerSettings(**{name: given[name] for name in names})
        except ValueError as error:
            raise CommandError(str(error), returncode=2) from error
        worker = Worker(options, announce=self._say)
        self._say(f"worker {worker.name} has {options.slots} slot{'s' if options.slots > 1 else ''}; Ctrl-C stops jobs at a checkpoint")
        worker.run()

    def _say(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()
