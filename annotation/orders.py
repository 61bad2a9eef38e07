"""How an order of completions is written: bands, ranks (lower is better) or scores (higher is better). Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from annotation.content import ContentRefused, key_checked, text_checked

UNNAMED_RATER = "file"
Bands = tuple[tuple[int, ...], ...]
Names = Sequence[frozenset[str]]
Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rating:
    """What one rater said; numbers are places in the line's list of completions."""

    rater: str
    bands: Bands
    criteria: Mapping[str, Bands] = field(default_factory=dict)
    displayed: tuple[int, ...] = ()
    flags: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    comment: str = ""
    duration_seconds: float | None = None


def bands_from_ranks(ranks: Sequence[Any], count: int, place: str = "ranks") -> Bands:
    """Lower is better, equal is tied; ranks may start anywhere and leave gaps."""
    numbers = numbers_checked(ranks, count, place)
    return tuple(tuple(i for i in range(count) if numbers[i] == value) for value in sorted(set(numbers)))


def bands_from_scores(scores: Sequence[Any], count: int, place: str = "scores") -> Bands:
    """Higher is better, equal is tied."""
    return bands_from_ranks([-number for number in numbers_checked(scores, count, place)], count, place)


def numbers_checked(values: Any, count: int, place: str) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != count:
        given = f"{len(values)} numbers" if isinstance(values, list | tuple) else type(values).__name__
        raise ContentRefused(f"{place} must be a list of {count} numbers, one for each completion, not {given}")
    for position, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ContentRefused(f"{place}: number {position} is {str(value)[:40]!r}, which is not a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ContentRefused(f"{place}: number {position} is not finite")
    return list(values)


def order_in(value: Fields, names: Names, place: str) -> Bands | None:
    """Bands from whichever of `bands`, `ranks`, `scores` is there, in this order of preference; None when none is."""
    for kind in ("bands", "ranks", "scores"):
        if value.get(kind) is not None:
            return order_of(kind, value[kind], names, f"{place}{kind}")
    return None


def order_of(kind: str, value: Any, names: Names, place: str) -> Bands:
    if kind == "bands":
        return bands_checked(value, names, place)
    if isinstance(value, Mapping):
        listed: list[Any] = [None] * len(names)
        for name, number in value.items():
            listed[place_of(name, names, place)] = number
        value = listed
    return (bands_from_ranks if kind == "ranks" else bands_from_scores)(value, len(names), place)


def bands_checked(value: Any, names: Names, place: str) -> Bands:
    if not isinstance(value, list | tuple) or not all(isinstance(band, list | tuple) and band for band in value):
        raise ContentRefused(f"{place} must be a list of bands, each a list of at least one completion")
    bands = tuple(tuple(place_of(one, names, place) for one in band) for band in value)
    placed = [one for band in bands for one in band]
    if sorted(placed) != list(range(len(names))):
        raise ContentRefused(f"{place} must name each of the {len(names)} completions once; it names {len(placed)}")
    return bands


def place_of(name: Any, names: Names, place: str) -> int:
    """A completion's place, from its number (0 is the first), its id, or its policy."""
    if isinstance(name, int) and not isinstance(name, bool):
        if not 0 <= name < len(names):
            raise ContentRefused(f"{place}: there is no completion {name}: they count from 0 to {len(names) - 1}")
        return name
    found = [number for number, known in enumerate(names) if isinstance(name, str) and name in known]
    if len(found) != 1:
        raise ContentRefused(f"{place}: {str(name)[:60]!r} names {'no' if not found else 'more than one'} completion")
    return found[0]


def first_in(fields: Fields, *names: str) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def rating_checked(value: Any, names: Names, place: str = "") -> Rating:
    if not isinstance(value, Mapping):
        raise ContentRefused(f"{place}must be an object with `rater` and `ranks`, `bands` or `scores`, not {type(value).__name__}")
    if (bands := order_in(value, names, place)) is None:
        raise ContentRefused(f"{place}has none of `bands`, `ranks` and `scores`")
    return Rating(
        rater=rater_checked(first_in(value, "rater", "annotator", "worker")),
        bands=bands,
        criteria=_criteria(value.get("criteria"), names, place),
        displayed=_displayed(value.get("displayed"), names, place),
        flags=_flags(value.get("flags"), names, place),
        comment=text_checked(value.get("comment") or "", f"{place}comment", limit=20_000),
        duration_seconds=_duration(value.get("duration_seconds"), place),
    )


def rater_checked(value: Any) -> str:
    if value is None:
        return UNNAMED_RATER
    name = key_checked(value).strip()
    if not name.isprintable():
        raise ContentRefused("the rater's name holds a control character")
    return name


def _criteria(value: Any, names: Names, place: str) -> dict[str, Bands]:
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise ContentRefused(f"{place}criteria must be an object from names to orders, not {type(value).__name__}")
    criteria = {}
    for name, order in value.items():
        text_checked(name, f"{place}criterion", limit=80)
        bands = bands_checked(order, names, f"{place}{name}") if isinstance(order, list) else None
        if isinstance(order, Mapping):
            bands = order_in(order, names, f"{place}{name}: ")
        if bands is None:
            raise ContentRefused(f"{place}criterion {name[:60]!r} has none of `bands`, `ranks` and `scores`")
        criteria[name] = bands
    return criteria


def _displayed(value: Any, names: Names, place: str) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ContentRefused(f"{place}displayed must be a list of completions, not {type(value).__name__}")
    return tuple(one for band in bands_checked([[one] for one in value], names, f"{place}displayed") for one in band)


def _flags(value: Any, names: Names, place: str) -> dict[int, tuple[str, ...]]:
    if not value:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(one, list) for one in value.values()):
        raise ContentRefused(f"{place}flags must be an object from completions to lists of flags")
    flags = {}
    for name, listed in value.items():
        number = place_of(int(name) if name.isdecimal() and len(name) < 4 else name, names, f"{place}flags")
        flags[number] = tuple(text_checked(flag, f"{place}flag", limit=40) for flag in listed)
    return flags


def _duration(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**9:
        raise ContentRefused(f"{place}duration_seconds must be a number of seconds, 0 or more")
    return float(value)
