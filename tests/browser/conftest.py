"""A real Chromium against a live ASGI server in its own process, on a database of its own (SQLite file, or PostgreSQL by DATABASE_URL)."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
from django.conf import settings
from django.db import connections
from django.db.utils import load_backend
from django.test import Client
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = os.environ.get("RANKLOOP_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Site:
    """The live site, and a way for tests to reach its database: `with site.data(): ...`."""

    def __init__(self, url: str, database: dict, blocker) -> None:
        self.url, self.database, self.blocker = url, database, blocker

    @contextmanager
    def data(self) -> Iterator[None]:
        with self.blocker.unblock():
            before = connections["default"]
            connections["default"] = load_backend(self.database["ENGINE"]).DatabaseWrapper(self.database, "default")
            try:
                yield
            finally:
                connections["default"].close()
                connections["default"] = before

    def session_of(self, user) -> str:
        with self.data():
            client = Client()
            client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
            return client.cookies["sessionid"].value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def own_database(folder: Path) -> Iterator[tuple[str, str]]:
    """(URL, name) of an empty database that lives as long as the server."""
    url = os.environ.get("DATABASE_URL", "")
    if not url.startswith("postgres"):
        yield f"sqlite:///{folder / 'site.sqlite3'}", str(folder / "site.sqlite3")
        return
    import psycopg

    server, name = url.rsplit("/", 1)[0], f"rankloop_browser_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    yield f"{server}/{name}", name
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def wait_until_up(process: subprocess.Popen, url: str) -> None:
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"The server ended with status {process.returncode} before it answered.")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"The server did not answer at {url} within 30 seconds.")


@pytest.fixture(scope="package")
def site(django_db_blocker, tmp_path_factory) -> Iterator[Site]:
    folder, port = tmp_path_factory.mktemp("site"), free_port()
    with own_database(folder) as (database_url, name):
        environment = {
            **os.environ,
            "RANKLOOP_VAR": str(folder),
            "DATABASE_URL": database_url,
            "RANKLOOP_SECRET_KEY": settings.SECRET_KEY,
            "RANKLOOP_DEBUG": "1",
        }
        subprocess.run([sys.executable, "manage.py", "migrate", "-v0"], env=environment, cwd=settings.BASE_DIR, check=True, timeout=120)
        command = [sys.executable, "-m", "daphne", "-v0", "-b", "127.0.0.1", "-p", str(port), "config.asgi:application"]
        process = subprocess.Popen(command, env=environment, cwd=settings.BASE_DIR)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(process, f"{url}/accounts/login/")
            yield Site(url, {**connections["default"].settings_dict, "NAME": name}, django_db_blocker)
        finally:
            process.terminate()
            process.wait(timeout=20)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.fail(
            f"There is no Chromium at {CHROMIUM}. Install it (Debian: apt-get install chromium) or set RANKLOOP_CHROMIUM to its path."
        )
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def sit_down(site: Site, browser: Browser):
    """`sit_down(user)` opens a browser window in which that user is signed in. No page may log an error or ask another host."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_window(user=None, **options) -> Page:
        context = browser.new_context(base_url=site.url, **options)
        context.set_default_timeout(15_000)
        contexts.append(context)
        if user is not None:
            context.add_cookies([{"name": "sessionid", "value": site.session_of(user), "url": site.url}])
        context.on("request", lambda request: faults.append(request.url) if not request.url.startswith((site.url, "data:")) else None)
        context.on("weberror", lambda error: faults.append(str(error.error)))
        context.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        context.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        return context.new_page()

    open_window.faults = faults
    yield open_window
    for context in contexts:
        context.close()
    # The browser itself reports refused requests (409, offline) as errors; those are what some of the tests are about.
    left = [fault for fault in faults if not fault.startswith("Failed to load resource")]
    assert not left, f"errors, dialogs or requests to other hosts: {left}"
