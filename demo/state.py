"""What the demo remembers between two calls, in `var/demo/`: which project is its own, and what each stage took."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from django.conf import settings

from annotation.errors import Refused
from annotation.models import Project
from training.rundir import write_atomically


def demo_folder() -> Path:
    folder = Path(settings.VAR) / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def only_one_demo() -> Iterator[None]:
    """Two demos in one state folder would do each stage twice. Raises Refused while another one runs."""
    with (demo_folder() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(
                "demo_runs", f"Another demo runs in {demo_folder()}: wait for it, or set RANKLOOP_VAR to another folder."
            ) from error
        yield


@dataclass(slots=True)
class State:
    """One demo, by name: `facts`, or `facts-2` for the second one that was begun from its start."""

    path: Path
    slug: str
    sizes: str
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, sizes: str, *, fresh: bool = False) -> Self:
        """The demo to go on with: the last one of this name if it has the same sizes and its project is still there; else a new one.

        Nothing is ever deleted: people may have ranked in the old project.
        """
        path = demo_folder() / f"{name}.json"
        try:
            told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            told = {}
        if not fresh and told.get("sizes") == sizes and Project.objects.filter(slug=told.get("slug", "")).exists():
            return cls(path, told["slug"], sizes, dict(told.get("seconds", {})))
        state = cls(path, _free_slug(name), sizes)
        state.save()
        return state

    def save(self) -> None:
        content = {"slug": self.slug, "sizes": self.sizes, "seconds": self.seconds}
        write_atomically(self.path, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def spend(self, stage: str, seconds: float) -> None:
        """Add to what a stage has taken: a demo that was killed and gone on with took both times."""
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 1)
        self.save()

    @property
    def folder(self) -> Path:
        """Its files that are neither rows nor runs: corpus and untrained model."""
        folder = demo_folder() / self.slug
        folder.mkdir(exist_ok=True)
        return folder


def _free_slug(name: str) -> str:
    """The first of name, name-2, ... that neither a project nor a run directory has: a run directory of another database is not ours."""
    number = 1
    while True:
        slug = name if number == 1 else f"{name}-{number}"
        if not Project.objects.filter(slug=slug).exists() and not any(Path(settings.RUNS_DIR).glob(f"{slug}-*")):
            return slug
        number += 1
