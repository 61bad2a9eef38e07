"""Writes the models that jobs made, with their lineage."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.methods import METHODS
from alignment.models import Job, ModelParent, TrainedModel

BLOCK_BYTES = 1 << 24


def folder_digest(folder: Path, breathe: Callable[[], None] = lambda: None) -> str:
    """SHA-256 over the sorted names and contents of the files of a model's folder: equal folders, equal digest.

    Large models take a while; `breathe` is called between blocks, so that the caller can keep its leases.
    """
    total = hashlib.sha256()
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        content = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                content.update(block)
                breathe()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def model_register(*, job: Job, metrics: dict[str, Any], digest: str = "") -> TrainedModel | None:
    """The model of a finished job, once; None for methods that make none. Raises FileNotFoundError if the folder is not there."""
    kind = METHODS[job.method].makes
    if not kind:
        return None
    folder = job.folder / "model"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{job.name} says that it succeeded, but {folder} is missing: run it again with `manage.py jobs retry {job.name}`."
        )
    model, _ = TrainedModel.objects.update_or_create(
        name=job.name,
        defaults={
            "kind": kind,
            "path": str(Path(job.run_directory) / "model"),
            "digest": digest or folder_digest(folder),
            "job": job,
            "project": job.project,
            "snapshot": job.snapshot,
            "metrics": metrics,
        },
    )
    for role in ModelParent.Role.values:
        value = job.inputs.get(role)
        if isinstance(value, dict) and "name" in value:
            parent = TrainedModel.objects.get(name=value["name"])
            ModelParent.objects.get_or_create(child=model, parent=parent, role=role)
    return model
