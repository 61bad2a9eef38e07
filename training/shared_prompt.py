"""One encoding per prompt and per completion: rows of the same prompt become one tree of tokens, several trees one packed row.

A packed row holds every prompt once and every completion once, without padding. Positions of a completion go on where its prompt ends, and
a completion attends to its prompt and to itself, so each token's state is the one it would have in a row of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.pack import Row

# A prompt is shared where that saves at least this share of the tokens: below it the attention in two parts costs more than it saves.
WORTH_SHARING = 0.08
# What one more bucket of attention costs, in products of a query with a key: below this much padding two sizes go together.
BUCKET_OVERHEAD = 15_000


@dataclass(frozen=True, slots=True)
class Family:
    """A prompt and its completions, as numbers of rows; a row that shares nothing is a family of itself alone (`children` empty)."""

    root: Sequence[int]  # tokens of the prompt, or of the whole row
    children: tuple[Sequence[int], ...]
    rows: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.root) + sum(map(len, self.children))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(K children, P tokens of the root, R tokens of the longest child)."""
        return len(self.children), len(self.root), max(map(len, self.children), default=0)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Families of near sizes, whose attention is computed side by side: G families, roots of up to P tokens, K children of up to R.

    `places` (G * (P + K * R),): the packed row's token at each place, roots first; 0 where nothing stands.   `real`: where something
    does, or None if everywhere.   `root_lengths` (G,): tokens of each root.
    """

    families: int
    root_width: int
    children: int
    child_width: int
    places: Tensor
    real: Tensor | None
    root_lengths: Tensor
    is_slice: int  # first token, where `places` are consecutive; else -1

    @property
    def even_roots(self) -> bool:
        return self.real is None or bool((self.root_lengths == self.root_width).all())


@dataclass(frozen=True, slots=True)
class Tree:
    """Who sees whom in a packed row of T tokens.

    `segment` (T,): number of the root or child a token stands in;  `parent` (T,): number of the root it may see besides, or its own;
    `positions` (T,): from 0 at the start of a prompt;  `places`, `real`: those of all buckets, one after the other;
    `back` (T,): where among them each token stands, or None if in order;  `block_masks`: FlexAttention's, by window, once made.
    """

    buckets: tuple[Bucket, ...]
    segment: Tensor
    parent: Tensor
    positions: Tensor
    places: Tensor
    real: Tensor | None
    back: Tensor | None
    block_masks: dict[int, Any] = field(default_factory=dict)

    @property
    def padding_share(self) -> float:
        """Share of the attention's products that padding makes. (Tokens themselves have no padding.)"""
        padded = sum(_products(b.families, b.root_width, b.children, b.child_width) for b in self.buckets)
        real = 0
        for bucket in self.buckets:
            roots = bucket.families * bucket.root_width
            kept = torch.ones(len(bucket.places), dtype=torch.bool) if bucket.real is None else bucket.real
            sizes = kept[roots:].reshape(bucket.families, bucket.children, bucket.child_width).sum(-1).tolist()
            for root, children in zip(bucket.root_lengths.tolist(), sizes, strict=True):
                real += root * root + sum(child * (root + child) for child in children)
        return 1.0 - real / padded if padded else 0.0


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward pass: the packed row, and where its rows' completions stand.

    `input_ids`, `position_ids` (1, T);  `rows`: numbers of the B rows;  `ends` (B,): the place of each one's last token;
    `targets` (N,): the completion tokens of all rows;  `before` (N,): the place whose state predicts each;  `owner` (N,): its row, 0..B-1.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree: Tree
    rows: tuple[int, ...]
    ends: Tensor
    targets: Tensor
    before: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> "Packed":
        return self if device == self.input_ids.device else _moved(self, device)


def _moved(thing: Any, device: torch.device) -> Any:
    """A copy of a dataclass with every tensor in it, at any depth, on the device."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if is_dataclass(thing) and not isinstance(thing, type):
        return type(thing)(**{part.name: _moved(getattr(thing, part.name), device) for part in fields(thing)})
    if isinstance(thing, tuple):
        return tuple(_moved(part, device) for part in thing)
    return {} if isinstance(thing, dict) else thing  # what was computed on one device does not belong to a copy on another


def families_of(rows: Sequence[Row], *, share: bool, budget: int) -> list[Family]:
    """Rows gathered by prompt. A family of more than `budget` tokens is cut, and its prompt repeated."""
    gathered: dict[tuple[int, ...], list[int]] = {}
    for number, row in enumerate(rows):
        gathered.setdefault(tuple(row.prompt_ids), []).append(number)
    families: list[Family] = []
    for prompt, numbers in gathered.items():
        part: list[int] = []
        size = len(prompt)
        for number in sorted(numbers, key=lambda number: -len(rows[number].completion_ids)):
            length = len(rows[number].completion_ids)
            if part and size + length > budget:
                families += _family(prompt, part, rows, share=share)
                part, size = [], len(prompt)
            part.append(number)
            size += length
        families += _family(prompt, part, rows, share=share)
    return families


def _family(prompt: tuple[int, ...], numbers: list[int], rows: Sequence[Row], *, share: bool) -> list[Family]:
    alone = sum(len(rows[number]) for number in numbers)
    saved = (len(numbers) - 1) * len(prompt)
    # A completion without a token, or without a prompt, has nothing to share.
    shareable = share and prompt and len(numbers) > 1 and all(len(rows[number].completion_ids) for number in numbers)
    if shareable and saved >= WORTH_SHARING * alone:
        return [Family(prompt, tuple(rows[number].completion_ids for number in numbers), tuple(numbers))]
    return [Family((*prompt, *rows[number].completion_ids), (), (number,)) for number in numbers]


def pack_rows(rows: Sequence[Row], *, budget: int, share: bool) -> list[Packed]:
    """Packed rows of at most `budget` tokens each (a single longer row stands alone), longest families first.

    Args:    share: whether rows of one prompt may share it;  False: one encoding per row, still without padding.
    """
    families = sorted(families_of(rows, share=share, budget=budget), key=lambda family: (-family.tokens, family.rows))
    bins: list[list[Family]] = []
    left = 0
    for family in families:
        if not bins or family.tokens > left:
            bins.append([])
            left = budget
        bins[-1].append(family)
        left -= family.tokens
    return [_packed(part, rows) for part in bins]


@dataclass(slots=True)
class _Draft:
    """A packed row in the making. `spots`: row -> (place that predicts its first completion token, first token, end)."""

    ids: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)  # (tokens, the parent's number or its own)
    spots: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, tokens: Sequence[int], *, position: int = 0, parent: int | None = None) -> int:
        """Append a segment; returns the place of its first token."""
        start = len(self.ids)
        self.segments.append((len(tokens), len(self.segments) if parent is None else parent))
        self.ids += tokens
        self.positions.append(np.arange(position, position + len(tokens)))
        return start


def _packed(families: list[Family], rows: Sequence[Row]) -> Packed:
    """Bucket after bucket: the roots of its families, then all their children."""
    draft = _Draft()
    buckets: list[Bucket] = []
    for group in _grouped(families):
        buckets.append(_bucket(group, len(draft.ids)))
        first = len(draft.segments)
        roots = [draft.add(family.root) for family in group]
        for number, (family, root) in enumerate(zip(group, roots, strict=True)):
            end = root + len(family.root)
            if not family.children:
                completion = root + len(rows[family.rows[0]].prompt_ids)
                draft.spots[family.rows[0]] = (completion - 1, completion, end)
            for row, child in zip(family.rows[: len(family.children)], family.children, strict=True):
                start = draft.add(child, position=len(family.root), parent=first + number)
                draft.spots[row] = (end - 1, start, start + len(child))
    return _finished(draft, buckets)


def _finished(draft: _Draft, buckets: Sequence[Bucket]) -> Packed:
    spots = list(draft.spots.values())
    before = []
    for predicts_first, first, end in spots:
        steps = np.arange(first - 1, end - 1)
        steps[:1] = predicts_first
        before.append(steps)
    sizes = [tokens for tokens, _ in draft.segments]
    positions = torch.from_numpy(np.concatenate(draft.positions))
    places = torch.cat([bucket.places for bucket in buckets])
    whole = all(bucket.real is None for bucket in buckets)
    real = None if whole else torch.cat([torch.ones(len(b.places), dtype=torch.bool) if b.real is None else b.real for b in buckets])
    tree = Tree(
        tuple(buckets),
        segment=torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)),
        parent=torch.from_numpy(np.repeat([parent for _, parent in draft.segments], sizes)),
        positions=positions,
        places=places,
        real=real,
        back=_back(places, real) if any(bucket.is_slice < 0 for bucket in buckets) else None,
    )
    return Packed(
        torch.tensor(draft.ids)[None],
        positions[None],
        tree,
        rows=tuple(draft.spots),
        ends=torch.tensor([end - 1 for _, _, end in spots]),
        targets=torch.tensor([token for _, first, end in spots for token in draft.ids[first:end]], dtype=torch.long),
        before=torch.from_numpy(np.concatenate(before)),
        owner=torch.from_numpy(np.repeat(np.arange(len(spots)), [end - first for _, first, end in spots])),
    )


def _back(places: Tensor, real: Tensor | None) -> Tensor:
    """(T,): where each token stands among the places."""
    kept = torch.arange(len(places)) if real is None else real.nonzero()[:, 0]
    return torch.empty(len(kept), dtype=torch.long).index_copy_(0, places[kept], kept)


def _grouped(families: list[Family]) -> list[list[Family]]:
    """Families of near shapes together, as long as padding costs less than one more bucket."""
    groups: list[list[Family]] = []
    shape, cost = (0, 0, 0), 0
    for family in sorted(families, key=lambda family: family.shape, reverse=True):
        wider = (max(shape[0], family.shape[0]), max(shape[1], family.shape[1]), max(shape[2], family.shape[2]))
        together = _products(len(groups[-1]) + 1, wider[1], wider[0], wider[2]) if groups else 0
        alone = _products(1, family.shape[1], family.shape[0], family.shape[2])
        if groups and bool(shape[0]) == bool(family.shape[0]) and together <= cost + alone + BUCKET_OVERHEAD:
            groups[-1].append(family)
            shape, cost = wider, together
        else:
            groups.append([family])
            shape, cost = family.shape, alone
    return groups


def _products(families: int, root: int, children: int, child: int) -> int:
    return families * (root * root + children * child * (root + child))


def _bucket(group: list[Family], start: int) -> Bucket:
    count, root = len(group), max(len(family.root) for family in group)
    children = max(len(family.children) for family in group)
    child = max((len(tokens) for family in group for tokens in family.children), default=0)
    places = np.full(count * (root + children * child), -1, dtype=np.int64)
    at = start
    for number, family in enumerate(group):
        places[number * root : number * root + len(family.root)] = np.arange(at, at + len(family.root))
        at += len(family.root)
    for number, family in enumerate(group):
        for order, tokens in enumerate(family.children):
            first = count * root + (number * children + order) * child
            places[first : first + len(tokens)] = np.arange(at, at + len(tokens))
            at += len(tokens)
    real = places >= 0
    whole = bool(real.all())
    return Bucket(
        count,
        root,
        children,
        child,
        torch.from_numpy(np.maximum(places, 0)),
        None if whole else torch.from_numpy(real),
        torch.tensor([len(family.root) for family in group]),
        start if whole else -1,
    )
