"""Pairs and ties as they follow from bands. Pure. This derivation is version 1 (docs/data-flow.md).

Completion i is preferred to j when i stands in a better band; two completions of one band are tied. Pairs are derived where they
are needed and never stored as the truth.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TypeVar

DERIVATION = 1
T = TypeVar("T")


def pairs_of(bands: Sequence[Sequence[T]]) -> Iterator[tuple[T, T]]:
    """(preferred, other) for each two completions of different bands, the best band first."""
    for better, worse in combinations(bands, 2):
        for one in better:
            for other in worse:
                yield one, other


def ties_of(bands: Sequence[Sequence[T]]) -> Iterator[tuple[T, T]]:
    """Each two completions of one band, once."""
    for band in bands:
        yield from combinations(band, 2)


def pair_count(bands: Sequence[Sequence[object]]) -> int:
    """Number of preference pairs: all couples less the tied ones."""
    total = sum(len(band) for band in bands)
    return total * (total - 1) // 2 - tie_count(bands)


def tie_count(bands: Sequence[Sequence[object]]) -> int:
    return sum(len(band) * (len(band) - 1) // 2 for band in bands)
