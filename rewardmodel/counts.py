"""What becomes of every ranking on its way to the loss, counted with keys: nothing is left out in silence."""

from collections.abc import Iterable
from typing import Any

from training.encode import Encoder
from training.ledger import LISTED_KEYS, Ledger
from training.rankings import EncodedRanking, RankedPrompt, RaterRanking, encode_rankings


def encode_counted(
    prompts: Iterable[RankedPrompt], encoder: Encoder, completions: Ledger, *, ties: str
) -> tuple[list[EncodedRanking], dict[str, Any]]:
    """Encoded prompts, and the counts of their rankings and pairs; `completions` is the ledger of single completions.

    Args:    ties: "drop": a ranking of nothing but ties is left out;  else ties teach something.
    Returns: counts: prompts, rankings (of kept prompts), preference_pairs, tied_pairs, pairs_of_equal_completions (of the same tokens:
             no model can tell them apart), rankings_left_out and rankings_left_out_keys by reason, rankings_shortened (they lost a
             completion, and are used) and rankings_shortened_keys.
    """
    ledger, shortened = Ledger("rankings"), Ledger("rankings")
    items: list[EncodedRanking] = []
    pairs, tied, equal = 0, 0, 0
    tied_keys: dict[str, None] = {}
    equal_keys: dict[str, None] = {}
    for prompt in prompts:
        found = encode_rankings([prompt], encoder, completions)
        items += found
        for place, before in enumerate(prompt.rankings):
            name = before.uid or f"{prompt.key}/{before.rater}"
            after = found[0].rankings[place] if found else RaterRanking(())
            if reason := _reason(before, after, ties):
                ledger.drop(name, reason)
            elif _size(after) < _size(before):
                shortened.drop(name, "shortened")
            pairs += _pairs(after)
            tied += _ties(after)
            if _ties(after):
                tied_keys[name] = None
            if found and (alike := _equal(after, found[0].places)):
                equal += alike
                equal_keys[name] = None
    counts = {
        "prompts": len(items),
        "rankings": sum(len(item.rankings) for item in items),
        "preference_pairs": pairs,
        "tied_pairs": tied,
        "tied_pairs_keys": list(tied_keys)[:LISTED_KEYS],
        "pairs_of_equal_completions": equal,
        "pairs_of_equal_completions_keys": list(equal_keys)[:LISTED_KEYS],
        "rankings_left_out": dict(ledger.reasons),
        "rankings_left_out_keys": dict(ledger.keys),
        "rankings_shortened": shortened.dropped,
        "rankings_shortened_keys": shortened.keys.get("shortened", [])[:LISTED_KEYS],
    }
    return items, counts


def _reason(before: RaterRanking, after: RaterRanking, ties: str) -> str:
    """Why a ranking teaches nothing; "" if it teaches."""
    if _size(before) < 2:
        return "fewer than two completions were ranked"
    if _size(after) < 2:
        return "fewer than two of its completions are left"
    if not after.weight > 0:
        return "its weight is 0"
    if ties == "drop" and not _pairs(after):
        return "nothing but ties"
    return ""


def _size(ranking: RaterRanking) -> int:
    return sum(len(band) for band in ranking.bands)


def _ties(ranking: RaterRanking) -> int:
    return sum(len(band) * (len(band) - 1) // 2 for band in ranking.bands)


def _pairs(ranking: RaterRanking) -> int:
    return _size(ranking) * (_size(ranking) - 1) // 2 - _ties(ranking)


def _equal(ranking: RaterRanking, places: list[int]) -> int:
    ranked = [places[completion] for band in ranking.bands for completion in band]
    return sum(ranked[at + 1 :].count(row) for at, row in enumerate(ranked))
