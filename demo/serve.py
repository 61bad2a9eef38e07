"""Serves the site for the demo, on this machine alone."""

import os
import socket
import sys

from django.conf import settings

from annotation.errors import Refused

HOST = "127.0.0.1"


def check_port(port: int) -> None:
    """Better now than after the demo has run. Raises Refused if nobody can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise Refused(
                "port_taken", f"Nothing can be served on {HOST}:{port} ({error}): choose another port, `make demo PORT=8001`, or SERVE=0."
            ) from error


def serve(port: int) -> None:
    """Become the web server; does not return."""
    sys.stdout.flush()
    os.chdir(settings.BASE_DIR)
    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    command = [sys.executable, "-m", "daphne", "--bind", HOST, "--port", str(port), "--verbosity", "0", "config.asgi:application"]
    os.execv(sys.executable, command)  # noqa: S606 - our own Python
