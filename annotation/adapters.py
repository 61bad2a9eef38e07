"""The shapes of files that can be loaded. Pure: a shape's reader turns one JSON object into a `Row` or refuses it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from annotation.content import ContentRefused, text_checked
from annotation.orders import Fields, Rating, first_in, rater_checked, rating_checked
from annotation.published import read_oasst, read_rank_list, read_rankme, read_squality, read_wmt
from annotation.rows import Row, completions_in, listed_in, row_checked


@dataclass(frozen=True, slots=True)
class Shape:
    """`read` takes the line's object and the default policy; `fields` are those it uses, the rest is reported as unused."""

    name: str
    text: str
    fields: frozenset[str]
    matches: Callable[[Fields], bool]
    read: Callable[[Fields, str], Row]


def shape_of(line: Fields) -> Shape | None:
    """The first shape that the line has. Shapes stand from the most to the least particular."""
    return next((shape for shape in SHAPES.values() if shape.matches(line)), None)


# Rankloop's own shapes: prompts, completions, rankings.


def _read_prompt(line: Fields, policy: str) -> Row:
    return row_checked(line, (), (), policy)


def _read_completions(line: Fields, policy: str) -> Row:
    return row_checked(line, completions_in(line)[0], (), policy)


def _read_rankings(line: Fields, policy: str) -> Row:
    completions, names = completions_in(line)
    listed = "rankings" if line.get("rankings") is not None else "ratings" if line.get("ratings") is not None else ""
    if listed:
        ratings = [
            rating_checked(one, names, f"{listed}, number {number}: ") for number, one in enumerate(listed_in(line, listed), start=1)
        ]
        return row_checked(line, completions, ratings, policy)
    source = line["completions" if "completions" in line else "responses"]
    for kind, single in (("ranks", "rank"), ("scores", "score")):
        if not _has_order(line) and all(isinstance(one, Mapping) and one.get(single) is not None for one in source):
            line = {**line, kind: [one[single] for one in source]}
    return row_checked(line, completions, [rating_checked(line, names)], policy)


def _has_order(line: Fields) -> bool:
    return any(line.get(name) is not None for name in ("bands", "ranks", "scores"))


def _is_ranking(line: Fields) -> bool:
    listed = line.get("completions", line.get("responses"))
    if not isinstance(listed, list):
        return False
    single = listed and isinstance(listed[0], Mapping) and ("rank" in listed[0] or "score" in listed[0])
    return bool(_has_order(line) or "rankings" in line or "ratings" in line or single)


# TRL's preference pairs, standard and conversational, with the prompt apart or inside both sides.


def _read_pair(line: Fields, policy: str) -> Row:
    sides = [line.get("chosen"), line.get("rejected")]
    if line.get("prompt") is None and line.get("messages") is None:
        line, sides = _implicit(line, sides)
    chosen, rejected = (_answer(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
    if chosen == rejected:
        raise ContentRefused("chosen and rejected are the same text")
    rating = Rating(rater=rater_checked(first_in(line, "rater", "annotator", "worker")), bands=((0,), (1,)))
    policies = [line.get("chosen_policy"), line.get("rejected_policy")]
    completions = [{"text": text, "policy": by} for text, by in zip((chosen, rejected), policies, strict=True)]
    return row_checked(line, completions, [rating], policy)


def _answer(side: Any, place: str) -> str:
    if isinstance(side, list):
        if len(side) != 1 or not isinstance(side[0], Mapping) or side[0].get("role") != "assistant":
            raise ContentRefused(f"{place} must be one turn of the assistant after the prompt")
        side = side[0].get("content")
    text = text_checked(side, place)
    if not text.strip():
        raise ContentRefused(f"{place} is blank")
    return text


def _implicit(line: Fields, sides: Sequence[Any]) -> tuple[Fields, list[Any]]:
    """Part what both sides begin with from the answers, as TRL's `extract_prompt` does."""
    chosen, rejected = sides
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not chosen or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            raise ContentRefused("chosen and rejected must be the same turns up to the last, which answers them")
        return {**line, "prompt": chosen[:-1]}, [chosen[-1:], rejected[-1:]]
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise ContentRefused("chosen and rejected must both be text or both be lists of turns")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    if same and chosen[same - 1] == " ":
        same -= 1
    if not chosen[:same].strip():
        raise ContentRefused("has no `prompt`, and chosen and rejected begin with no common text that could be one")
    return {**line, "prompt": chosen[:same]}, [chosen[same:], rejected[same:]]


def rating_has(line: Fields, name: str) -> bool:
    ratings = line.get("ratings")
    return isinstance(ratings, list) and bool(ratings) and isinstance(ratings[0], Mapping) and name in ratings[0]


_PROMPT = frozenset({"key", "id", "prompt", "messages", "round"})
_COMPLETIONS = _PROMPT | {"completions", "responses"}
_RATING = {"rater", "annotator", "worker", "bands", "ranks", "scores", "criteria", "displayed", "flags", "comment", "duration_seconds"}
# A snapshot's line says these too; they follow from the rest.
_FOLLOWS = {"ranking", "revision", "split", "rater_kind"}

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "wmt16",
            "WMT: ranks of systems, no texts",
            frozenset({"task", "segment", "rater", "ranks"}),
            lambda line: "segment" in line and "task" in line,
            read_wmt,
        ),
        Shape(
            "squality",
            "SQuALITY: ratings by system and criterion",
            _COMPLETIONS | {"passage_id", "ratings"},
            lambda line: rating_has(line, "by_system"),
            read_squality,
        ),
        Shape(
            "oasst",
            "OpenAssistant: replies with rank 0 for the best",
            _COMPLETIONS | {"tree"},
            lambda line: "tree" in line and "responses" in line,
            read_oasst,
        ),
        Shape(
            "rankme",
            "RankME: one criterion in each line",
            _COMPLETIONS | {"ratings", "criterion"},
            lambda line: "criterion" in line and rating_has(line, "ranks"),
            read_rankme,
        ),
        Shape(
            "e2e",
            "E2E: responses of systems with ratings",
            _COMPLETIONS | {"ratings"},
            lambda line: "responses" in line and rating_has(line, "ranks"),
            read_rank_list,
        ),
        Shape(
            "pairs",
            "chosen and rejected, TRL's standard or conversational shape",
            _PROMPT | {"chosen", "rejected", "rater", "annotator", "worker", "chosen_policy", "rejected_policy"},
            lambda line: "chosen" in line or "rejected" in line,
            _read_pair,
        ),
        Shape(
            "rankings",
            "completions with ranks, bands or scores",
            _COMPLETIONS | _RATING | _FOLLOWS | {"rankings", "ratings"},
            _is_ranking,
            _read_rankings,
        ),
        Shape(
            "completions",
            "prompts with completions",
            _COMPLETIONS,
            lambda line: "completions" in line or "responses" in line,
            _read_completions,
        ),
        Shape("prompts", "prompts", _PROMPT | {"split"}, lambda line: "prompt" in line or "messages" in line, _read_prompt),
    )
}
