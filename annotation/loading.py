"""Load a file of JSON lines into a project, a batch at a time: memory does not grow with the file, and one bad line spoils no other.

Bad lines go, as they are, to a rejects file that can be mended and loaded again. Loading a file twice adds nothing.
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from django.db import DatabaseError, reset_queries

from annotation.adapters import SHAPES, Shape, shape_of
from annotation.content import ContentRefused
from annotation.errors import Refused
from annotation.models import Project
from annotation.rows import Row
from annotation.services.imports import rankings_import

MAX_LINE_BYTES = 8 * 2**20
BATCH_LINES, BATCH_BYTES = 500, 8 * 2**20
LINES_TO_RECOGNISE = 50
MAX_UNUSED = 20
COUNTS = ("prompts", "completions", "raters", "rankings", "slots", "present", "rankings_present", "repeated")


@dataclass(slots=True)
class Report:
    """What a load did. `counts` are rows added, and what was there before; `unused` are fields that no reader looked at."""

    shape: str = ""
    lines: int = 0
    rejected: int = 0
    rejects_path: Path | None = None
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))
    unused: dict[str, int] = field(default_factory=dict)

    @property
    def added(self) -> int:
        return sum(self.counts[name] for name in ("prompts", "completions", "rankings"))


@dataclass(frozen=True, slots=True)
class Line:
    """One line as it stands in the file. `problem` says why it cannot be read at all."""

    number: int
    raw: bytes
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """`shape` is a name in `SHAPES`, or "" to recognise it; `policy` is written where a completion names none."""

    shape: str = ""
    policy: str = ""
    rejects: Path | None = None


Tell = Callable[[int, str], None]


def load_file(*, project: Project, path: Path, options: LoadOptions, on_reject: Tell, on_batch: Callable[[Report], None]) -> Report:
    """Load `path`; `on_reject(line, reason)` hears of each bad line in file order, batch by batch.

    Raises: Refused when the file cannot be opened, is empty, or has no shape that is known.
    """
    _refuse_unreadable(path)
    rejects = _Rejects(options.rejects or path.with_name(path.name + ".rejects.jsonl"), source=path)
    report = Report()
    try:
        with path.open("rb") as stream:
            shape = SHAPES[options.shape] if options.shape else _recognise(stream, path)
            report.shape = shape.name
            stream.seek(0)
            for batch in _batches(read_lines(stream, on_long=rejects.write)):
                for line, reason in _load_batch(project, batch, shape, options.policy, report):
                    on_reject(line.number, reason)
                    report.rejected += 1
                    if not line.problem.startswith("is longer"):
                        rejects.write(line.raw if line.raw.endswith(b"\n") else line.raw + b"\n")
                # In development Django remembers the text of each query, values included.
                reset_queries()
                on_batch(report)
    finally:
        report.rejects_path = rejects.close()
    return report


def _refuse_unreadable(path: Path) -> None:
    if not path.is_file():
        raise Refused("file_missing", f"There is no file {path}.", 404)
    with path.open("rb") as stream:
        head = stream.read(4)
    if not head:
        raise Refused("file_empty", f"{path} is empty.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise Refused("file_encoding", f"{path} is UTF-16: write it as UTF-8, for example by `iconv -f UTF-16 -t UTF-8`.")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04")):
        raise Refused("file_packed", f"{path} is compressed: unpack it first.")


def read_lines(stream: BinaryIO, on_long: Callable[[bytes], None] | None = None) -> Iterator[Line]:
    """Lines that are not blank, with their numbers. A line over the limit is passed on in pieces and never held whole."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        number += 1
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) >= MAX_LINE_BYTES and not raw.endswith(b"\n"):
            size = _pass_on(stream, raw, on_long)
            yield Line(number, b"", f"is longer than {MAX_LINE_BYTES:,} bytes ({size:,})")
        elif raw.strip():
            yield Line(number, raw)


def _pass_on(stream: BinaryIO, piece: bytes, on_long: Callable[[bytes], None] | None) -> int:
    size = 0
    tell = on_long or len
    while piece:
        tell(piece)
        size += len(piece)
        if piece.endswith(b"\n"):
            return size
        piece = stream.readline(MAX_LINE_BYTES)
    tell(b"\n")
    return size


def parse_line(line: Line) -> dict[str, Any]:
    """The line's JSON object. Raises: ContentRefused with a reason that a person can act on."""
    if line.problem:
        raise ContentRefused(line.problem)
    try:
        value = json.loads(line.raw.decode(), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except UnicodeDecodeError as error:
        raise ContentRefused(f"is not UTF-8 at byte {error.start + 1}") from error
    except RecursionError as error:
        raise ContentRefused("is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ContentRefused(f"is not JSON: {error.msg} at character {error.pos + 1}") from error
    except ContentRefused:
        raise
    except ValueError as error:  # A whole number of thousands of digits.
        raise ContentRefused(f"is not JSON that can be read: {str(error).split(';')[0]}") from error
    if not isinstance(value, dict):
        raise ContentRefused("is not a JSON object: each line must be one {...}")
    return value


def _no_constant(name: str) -> Any:
    raise ContentRefused(f"holds {name}, which is not a number in JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        name = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise ContentRefused(f"has the field {name[:60]!r} twice")
    return value


def _recognise(stream: BinaryIO, path: Path) -> Shape:
    """The shape of the first line that has one, among the first lines of the file."""
    first = ""
    for seen, line in enumerate(read_lines(stream), start=1):
        try:
            fields = parse_line(line)
        except ContentRefused as error:
            first = first or f"line {line.number} {error}"
        else:
            if shape := shape_of(fields):
                return shape
            first = first or f"line {line.number} has the fields {', '.join(sorted(fields))[:200] or '(none)'}"
        if seen >= LINES_TO_RECOGNISE:
            break
    if not first:
        raise Refused("file_empty", f"{path} has no lines with anything on them.")
    known = ", ".join(SHAPES)
    raise Refused("shape_unknown", f"The shape of {path} is not recognised: {first}. Name it by --as, one of: {known}.")


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.raw)
        if len(batch) >= BATCH_LINES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _load_batch(project: Project, batch: list[Line], shape: Shape, policy: str, report: Report) -> list[tuple[Line, str]]:
    """Store the good lines; return the bad ones, each with its reason."""
    refused: list[tuple[Line, str]] = []
    good: list[tuple[Line, Row]] = []
    for line in batch:
        report.lines += 1
        try:
            fields = parse_line(line)
            good.append((line, shape.read(fields, policy)))
        except ContentRefused as error:
            refused.append((line, str(error)))
        except RecursionError:
            refused.append((line, "is nested too deeply"))
        else:
            _note_unused(report, fields, shape)
    refused += _store(project, good, report)
    return sorted(refused, key=lambda one: one[0].number)


def _note_unused(report: Report, fields: dict[str, Any], shape: Shape) -> None:
    for name in fields.keys() - shape.fields:
        if name in report.unused or len(report.unused) < MAX_UNUSED:
            report.unused[name] = report.unused.get(name, 0) + 1


def _store(project: Project, good: list[tuple[Line, Row]], report: Report) -> list[tuple[Line, str]]:
    """Store rows together; should the database refuse the batch, each row alone, so that only the guilty one is left out."""
    if not good:
        return []
    counts = Counter(report.counts)
    try:
        outcomes = rankings_import(project=project, rows=[row for _, row in good], counts=counts)
    except DatabaseError as error:
        if len(good) == 1:
            return [(good[0][0], f"was refused by the database: {str(error).splitlines()[0]}")]
        return [bad for one in good for bad in _store(project, [one], report)]
    report.counts = counts
    return [(line, str(outcome)) for (line, _), outcome in zip(good, outcomes, strict=True) if outcome is not None]


class _Rejects:
    """The rejects file. It appears when the load ends, and replaces no file that says something else (somebody may be mending it)."""

    def __init__(self, path: Path, *, source: Path) -> None:
        if path.resolve() == source.resolve():
            raise Refused("rejects_is_source", f"The rejects cannot go to {path}: it is the file to load.")
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.stream: BinaryIO | None = None

    def write(self, piece: bytes) -> None:
        if self.stream is None:
            try:
                self.stream = self.part.open("wb")
            except OSError as error:
                raise Refused(
                    "rejects_unwritable", f"Cannot write the rejects to {self.part}: {error}. Name another file by --rejects."
                ) from error
        self.stream.write(piece)

    def close(self) -> Path | None:
        if self.stream is None:
            return None
        self.stream.close()
        path, number = self.path, 2
        while path.exists() and not _same_bytes(path, self.part):
            path, number = self.path.with_name(f"{self.path.stem}.{number}{self.path.suffix}"), number + 1
        return self.part.replace(path)


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        while piece := a.read(2**20):
            if piece != b.read(2**20):
                return False
    return True
