"""Shared by every test: a state folder of its own, so that no test sees or touches the developer's `var/`."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ["RANKLOOP_VAR"] = tempfile.mkdtemp(prefix="rankloop-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
os.environ.setdefault("DJANGO_ALLOW_ASYNC_UNSAFE", "true")  # Playwright's loop runs beside the test's database calls.


def pytest_configure() -> None:
    """pytest-django has read the settings by now, before the lines above: point them to the tests' own folder too."""
    from django.conf import settings

    settings.VAR = Path(os.environ["RANKLOOP_VAR"])
    for name, folder in (("RUNS_DIR", "runs"), ("SNAPSHOTS_DIR", "snapshots"), ("MODELS_DIR", "models"), ("STATIC_ROOT", "static")):
        setattr(settings, name, settings.VAR / folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what meets a database or Redis: that alone is done once more on PostgreSQL. (Without one of these, database access is
    blocked.)"""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        named = any(item.get_closest_marker(name) for name in ("django_db", "postgres", "redis", "browser"))
        if named or fixtures & {"db", "transactional_db", "django_db_setup", "live_server"}:
            item.add_marker("database")
