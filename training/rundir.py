"""The run directory: where the web half and the learning half meet (docs/data-flow.md, section 2).

No torch and no Django here: the parent process, the child and a person with a shell all use this file.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from training.errors import InputError

RUN_FORMAT = "rankloop.run/1"
RESULT_FORMAT = "rankloop.result/1"
METHODS = ("sft", "reward", "dpo", "ppo", "generate", "evaluate")


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_version() -> dict[str, str]:
    """What computed the run: a digest of the learning rooms' sources, and the versions of what they stand on."""
    house = Path(__file__).resolve().parent.parent
    content = hashlib.sha256()
    for room in ("training", "rewardmodel", "alignment"):
        for source in sorted((house / room).rglob("*.py")):
            content.update(f"{source.relative_to(house)}\n".encode() + source.read_bytes())
    versions = {"sources": content.hexdigest()}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def write_atomically(path: Path, text: str) -> None:
    """The file has the old content or the new, never half of it, also after a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as null: JSON has no other way to say them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def replace_folder(beside: Path, final: Path) -> None:
    """Put a finished folder in place of an older one: readers see the old or the new."""
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        beside.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        beside.rename(final)
    sync_folder(final.parent)


class RunDirectory:
    """One run: its frozen configuration, its events, its checkpoints and its result."""

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        self.path = Path(path).resolve()
        self.config = config
        self.is_writer = True  # of several processes, the first one writes events and results
        self._line_is_open: bool | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        method: str,
        seed: int,
        inputs: Mapping[str, Any],
        options: Mapping[str, Any],
        code: Mapping[str, str] | None = None,
    ) -> Self:
        """Write `config.json`, once. Raises InputError if the directory has one already or the method is unknown."""
        folder = Path(path).resolve()
        if method not in METHODS:
            raise InputError(f"There is no method {method!r}.", remedy=f"Use one of {', '.join(METHODS)}.")
        if (folder / "config.json").exists():
            raise InputError(f"{folder} already holds a run.", remedy="Choose a new directory; a run's config.json never changes.")
        config = {
            "format": RUN_FORMAT,
            "method": method,
            "seed": int(seed),
            "inputs": dict(inputs),
            "options": dict(options),
            "code": dict(code_version() if code is None else code),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return cls(folder, config)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Raises InputError if there is no readable `config.json` of a format we know."""
        file = Path(path).resolve() / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{file} cannot be read: {error}", remedy="Name a directory that `manage.py align` made.") from error
        if not isinstance(config, dict) or config.get("format") != RUN_FORMAT:
            raise InputError(f"{file} is not of the format {RUN_FORMAT}.", remedy="Make the run again with this version.")
        return cls(file.parent, config)

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def inputs(self) -> dict[str, Any]:
        return self.config["inputs"]

    @property
    def options(self) -> dict[str, Any]:
        return self.config["options"]

    @property
    def model_folder(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def data_file(self, name: str = "data") -> Path:
        """The input file `name`, its bytes checked against the digest in the configuration (where it has one)."""
        entry = self.inputs.get(name)
        if not entry:
            raise InputError(f"inputs.{name} is missing from {self.path / 'config.json'}.", remedy=f"Give the {name} file.")
        path, digest = (Path(entry), None) if isinstance(entry, str) else (Path(entry["path"]), entry.get("digest"))
        if not path.is_file():
            raise InputError(f"inputs.{name}: {path} does not exist.", remedy="Make the snapshot or file again, or mend the path.")
        if digest and file_digest(path) != digest:
            raise InputError(f"inputs.{name}: {path} has changed: its SHA-256 is not {digest}.", remedy="Use the file that was named.")
        return path

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line. Two writers never mix, and a line cut short by a crash never swallows the next one."""
        if not self.is_writer:
            return
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **finite(fields)}, ensure_ascii=False, default=str) + "\n"
        file = self.path / "events.jsonl"
        if self._line_is_open is None:
            self._line_is_open = _ends_in_the_middle(file)
        data = ("\n" if self._line_is_open else "") + line
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, data.encode())
        finally:
            os.close(descriptor)
        self._line_is_open = False

    def read_events(self, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
        """Events after byte `offset`, and the offset for the next call. A half-written last line waits for that call."""
        try:
            with (self.path / "events.jsonl").open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return [], offset
        whole = data.rfind(b"\n") + 1
        events = []
        for line in data[:whole].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                events.append(event)
            elif line.strip():
                events.append({"time": None, "kind": "warning", "text": "a line of events.jsonl was cut short by a crash"})
        return events, offset + whole

    def write_result(
        self, *, metrics: Mapping[str, Any], artefacts: Mapping[str, Any], seconds: float, counts: Mapping[str, Any] | None = None
    ) -> None:
        """The last act of a run that went well; its presence means success."""
        if not self.is_writer:
            return
        result = {
            "format": RESULT_FORMAT,
            "method": self.method,
            "metrics": finite(metrics),
            "artefacts": finite(artefacts),
            "seconds": round(seconds, 3),
            "counts": finite(counts or {}),
        }
        (self.path / "error.json").unlink(missing_ok=True)
        write_atomically(self.path / "result.json", json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def result(self) -> dict[str, Any] | None:
        return self._read_json("result.json")

    def write_error(self, error: str, remedy: str = "", detail: str = "") -> None:
        text = json.dumps({"error": error, "remedy": remedy, "detail": detail}, indent=2, ensure_ascii=False)
        write_atomically(self.path / "error.json", text + "\n")

    def error(self) -> dict[str, Any] | None:
        return self._read_json("error.json")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def newest_checkpoint(self) -> Path | None:
        """The folder with the highest step that is whole (has a manifest). Its digests are checked when it is restored."""
        found = checkpoint_folders(self.checkpoints)
        return found[-1] if found else None

    def can_go_on(self) -> bool:
        """Whether something is done that a next start would not do again: a checkpoint, of the run or of a part of it, or a whole part."""
        parts = list(self.path.glob("curve/*"))
        saved = any(checkpoint_folders(folder / "checkpoints") for folder in (self.path, *parts))
        return saved or any((part / "result.json").exists() for part in parts)


def checkpoint_folders(root: Path) -> list[Path]:
    """`step-<n>` folders with a manifest, by step."""
    found = [folder for folder in root.glob("step-*") if folder.name[5:].isdigit() and (folder / "manifest.json").is_file()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def _ends_in_the_middle(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            if opened.seek(0, os.SEEK_END) == 0:
                return False
            opened.seek(-1, os.SEEK_END)
            return opened.read(1) != b"\n"
    except FileNotFoundError:
        return False
