"""Puts one line of a file together: a prompt, its completions, and what raters said of them. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from annotation.content import ContentRefused, PromptItem
from annotation.orders import Fields, Names, Rating, first_in

SMALLEST, LARGEST = 2, 16
MAX_RATINGS = 1000


@dataclass(frozen=True, slots=True)
class Row:
    """One line: a prompt, its completions, and what raters said of them."""

    item: PromptItem
    ratings: tuple[Rating, ...] = ()


def row_checked(fields: Fields, completions: Sequence[Fields], ratings: Iterable[Rating], policy: str) -> Row:
    """Put a line together. Raises: ContentRefused when the ratings do not fit the completions."""
    listed = [{**one, "policy": one.get("policy") or policy} for one in completions]
    raw = {"key": first_in(fields, "key", "id"), "messages": messages_in(fields), "completions": listed}
    item = PromptItem.checked(raw, _round(fields.get("round")))
    ratings = tuple(ratings)
    if len(item.completions) > LARGEST:
        raise ContentRefused(f"has {len(item.completions)} completions; at most {LARGEST} can be ranked")
    if ratings and len(item.completions) < SMALLEST:
        raise ContentRefused(f"a ranking needs at least {SMALLEST} different completions; this has {len(item.completions)}")
    if len(ratings) > MAX_RATINGS:
        raise ContentRefused(f"has {len(ratings):,} rankings; at most {MAX_RATINGS:,} in one line")
    raters = [rating.rater for rating in ratings]
    if twice := next((rater for rater in raters if raters.count(rater) > 1), None):
        raise ContentRefused(f"rater {twice[:60]!r} ranks twice in one line")
    for rating in ratings:
        _refuse_contradiction(item, rating)
    return Row(item, ratings)


def _refuse_contradiction(item: PromptItem, rating: Rating) -> None:
    """Equal texts of one policy are stored once, so they must stand in one band."""
    if not item.repeated:
        return
    for bands in (rating.bands, *rating.criteria.values()):
        band_of: dict[int, int] = {}
        for number, band in enumerate(bands):
            for place in band:
                if band_of.setdefault(item.place_of[place], number) != number:
                    raise ContentRefused(
                        f"rater {rating.rater[:60]!r} ranks completion {place + 1} differently from an equal text before it"
                    )


def messages_in(fields: Fields) -> Any:
    if (given := first_in(fields, "messages", "prompt")) is None:
        raise ContentRefused("has neither `prompt` nor `messages`")
    # A snapshot's line has the prompt's digest under `prompt`, and `messages` beside it.
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def listed_in(fields: Fields, name: str) -> list[Any]:
    if not isinstance(fields.get(name), list):
        raise ContentRefused(f"{name} must be a list, not {type(fields.get(name)).__name__}")
    return fields[name]


def completions_in(fields: Fields) -> tuple[list[dict[str, Any]], Names]:
    """The completions, and the names by which a ranking may call each."""
    listed, names = [], []
    for number, one in enumerate(listed_in(fields, "completions" if "completions" in fields else "responses"), start=1):
        if isinstance(one, str):
            one = {"text": one}  # noqa: PLW2901 - the same completion in its long form
        if not isinstance(one, Mapping):
            raise ContentRefused(f"completion {number} must be text or an object with `text`, not {type(one).__name__}")
        policy = first_in(one, "policy", "system", "model") or ""
        names.append(frozenset(name for name in (one.get("id"), policy) if isinstance(name, str) and name))
        listed.append(
            {"text": one.get("text", ""), "policy": policy, "run": one.get("run"), "sampling": one.get("sampling"), "id": one.get("id")}
        )
    return listed, names


def _round(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ContentRefused("round must be a whole number, 0 or more")
    return value
