"""Readers of published sets of rankings whose shape is their own, one small function each. Pure."""

from collections.abc import Mapping
from typing import Any

from annotation.content import ContentRefused, key_checked, text_checked
from annotation.orders import Fields, Rating, bands_from_ranks, order_of, rater_checked, rating_checked
from annotation.rows import Row, completions_in, listed_in, row_checked


def read_rank_list(line: Fields, policy: str) -> Row:
    """E2E NLG: ranks decide, since the magnitudes beside them have wild outliers."""
    completions, names = completions_in(line)
    ratings = [
        rating_checked(
            {"rater": one.get("rater"), "ranks": one.get("ranks")} if isinstance(one, Mapping) else one, names, f"ratings, number {n}: "
        )
        for n, one in enumerate(listed_in(line, "ratings"), start=1)
    ]
    return row_checked(line, completions, ratings, policy)


def read_rankme(line: Fields, policy: str) -> Row:
    """RankME: each line asks for one criterion. Its order is stored under that name, and as the order of the line."""
    row = read_rank_list(line, policy)
    name = text_checked(line.get("criterion"), "criterion", limit=80)
    ratings = tuple(Rating(rater=one.rater, bands=one.bands, criteria={name: one.bands}) for one in row.ratings)
    return Row(row.item, ratings)


def read_squality(line: Fields, policy: str) -> Row:
    """SQuALITY: `overall` is the order, the others are criteria. The story itself is not in the file: the prompt has its number."""
    completions, names = completions_in(line)
    ratings = []
    for number, one in enumerate(listed_in(line, "ratings"), start=1):
        place = f"ratings, number {number}: "
        by_system = one.get("by_system") if isinstance(one, Mapping) else None
        if not isinstance(by_system, Mapping) or not all(isinstance(said, Mapping) for said in by_system.values()):
            raise ContentRefused(f"{place}by_system must be an object from systems to criteria")
        orders = {}
        for criterion in dict.fromkeys(name for said in by_system.values() for name in said):
            ranks = {system: (said.get(criterion) or {}).get("rank") for system, said in by_system.items()}
            orders[criterion] = order_of("ranks", ranks, names, f"{place}{criterion}")
        if "overall" not in orders:
            raise ContentRefused(f"{place}has no `overall`")
        ratings.append(Rating(rater=rater_checked(one.get("rater")), bands=orders.pop("overall"), criteria=orders))
    question = text_checked(line.get("prompt"), "prompt")
    return row_checked({**line, "prompt": f"Story {line.get('passage_id')}. {question}"}, completions, ratings, policy)


def read_oasst(line: Fields, policy: str) -> Row:
    """OpenAssistant: rank 0 is best; the ranks are the aggregate of several raters, and replies without a model are people's."""
    completions, names = completions_in(line)
    ranks = [one.get("rank") for one in line["responses"]]
    for one in completions:
        one["policy"] = one["policy"] or "human"
    return row_checked(line, completions, [Rating(rater="aggregate", bands=bands_from_ranks(ranks, len(names)))], policy)


def read_wmt(line: Fields, policy: str) -> Row:
    """WMT: ranks of systems, no texts. `A+B` are systems that wrote the same text: both enter, tied, and keep the shared name."""
    ranks = line.get("ranks")
    if not isinstance(ranks, Mapping) or not ranks:
        raise ContentRefused("ranks must be an object from systems to ranks")
    completions: list[dict[str, Any]] = []
    listed: list[Any] = []
    for name, rank in ranks.items():
        systems = text_checked(name, "system", limit=2000).split("+")
        completions += [{"text": "", "policy": system, "sampling": {"shared_text": name} if len(systems) > 1 else {}} for system in systems]
        listed += [rank] * len(systems)
    if len({one["policy"] for one in completions}) != len(completions) or not all(one["policy"] for one in completions):
        raise ContentRefused("ranks must name each system once")
    languages = {one["policy"].rpartition(".")[2] for one in completions}
    if len(languages) != 1:
        raise ContentRefused(f"systems of several language pairs: {', '.join(sorted(languages))[:80]}")
    language = languages.pop()
    fields = {
        "key": f"wmt-{language}-{key_checked(line.get('task'))}",
        "prompt": f"WMT {language}, segment {key_checked(line.get('segment'))} (ranked systems; the texts are not in the file)",
    }
    return row_checked(
        fields, completions, [Rating(rater=rater_checked(line.get("rater")), bands=bands_from_ranks(listed, len(listed)))], policy
    )
