#!/usr/bin/env python
"""Entry point of every Rankloop command: `python manage.py help` lists them."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    try:
        from django.core.management import execute_from_command_line
    except ImportError as error:
        raise SystemExit(
            f"Django is not installed for {sys.executable}. Run `make venv`, then `.venv/bin/python manage.py ...`."
        ) from error
    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
