"""A whole Rankloop of its own for tests that need several processes: a state folder, a real database, and the commands run in it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BASE = Path(__file__).resolve().parents[2]
WORDS = ["red", "green", "blue", "fish", "bird", "cat", "dog", "runs", "sleeps", "eats", "the", "quick", "slow", "tea", "cup", "small"]


def write_tiny_model(folder: Path) -> Path:
    """A Llama of 23 thousand random weights that can read the texts of these tests."""
    from training.scratch import make_model

    texts = [f"Say {first} {second}. The {first} {second} sleeps." for first in WORDS for second in WORDS]
    make_model(folder, texts, vocab_size=300, hidden_size=32, layers=1, heads=2, max_positions=256)
    return folder


def write_demonstrations(path: Path, rows: int = 64) -> Path:
    pick = random.Random(0)
    lines = []
    for _ in range(rows):
        first, second = pick.choice(WORDS), pick.choice(WORDS)
        lines.append(json.dumps({"prompt": f"Say {first} {second}.", "completion": f"The {first} {second} sleeps."}))
    path.write_text("\n".join(lines) + "\n")
    return path


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := holds():
            return value
        time.sleep(0.1)
    raise AssertionError(f"after {seconds:g} s still not: {what}")


class Stand:
    """`run("jobs", "list")` runs a command to its end; `start("worker")` leaves it running until the test ends."""

    def __init__(self, var: Path, database_url: str) -> None:
        self.var = var
        self.env = {**os.environ, "RANKLOOP_VAR": str(var), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        self.env.pop("DATABASE_URL", None)
        if database_url:
            self.env["DATABASE_URL"] = database_url
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "manage.py", *words]
        return subprocess.run(command, cwd=BASE, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)

    def answer(self, *words: str, code: int = 0, timeout: float = 300) -> dict[str, Any]:
        """The one JSON document that a command printed."""
        done = self.run(*words, timeout=timeout)
        assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def python(self, code: str, *, timeout: float = 300) -> str:
        command = [sys.executable, "-c", f"import django; django.setup()\n{code}"]
        environment = {**self.env, "DJANGO_SETTINGS_MODULE": "config.settings"}
        done = subprocess.run(command, cwd=BASE, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, *words: str) -> subprocess.Popen[str]:
        log = (self.var / f"{words[0]}-{len(self.started)}.log").open("w")
        process = subprocess.Popen([sys.executable, "manage.py", *words], cwd=BASE, env=self.env, text=True, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """One for each test file, on PostgreSQL if the tests run there, else on SQLite in a file."""
    url, name = os.environ.get("DATABASE_URL", ""), ""
    if url.startswith("postgres"):
        import psycopg

        name = f"rankloop_stand_{uuid.uuid4().hex[:10]}"
        server = url.rpartition("/")[0]
        with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        url = f"{server}/{name}"
    else:
        url = ""
    made = Stand(tmp_path_factory.mktemp("var"), url)
    try:
        migrated = made.run("migrate", "--verbosity", "0")
        assert migrated.returncode == 0, migrated.stderr
        yield made
    finally:
        made.end()
        if name:
            with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
                connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        shutil.rmtree(made.var, ignore_errors=True)
