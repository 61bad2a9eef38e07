"""Order, batches, and rows of tokens.

The order of an epoch follows from (seed, epoch) alone. A batch is cut into micro-batches under a token budget; `shared_prompt` packs the
rows of a micro-batch without padding, and where a model cannot take that, its rows are cut into groups of near length here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.rankings import EncodedRanking

# What a further forward pass costs, as if it were tokens: below this much padding, splitting a group is not worth it.
FORWARD_OVERHEAD_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: a prompt and one completion."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class Padded:
    """Rows side by side, padded on the right. (B, T) each; masks are 1 where a real (or a completion's) token stands."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def to(self, device: torch.device) -> "Padded":
        return Padded(self.input_ids.to(device), self.attention_mask.to(device), self.completion_mask.to(device))


def epoch_order(count: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def epoch_batches(weights: Sequence[float], *, batch: float, seed: int, epoch: int) -> list[list[int]]:
    """Batches of item indices, each of about `batch` in weight, none empty, every item once.

    The number of batches is ceil(sum of weights / batch), and items are spread evenly: there is no small last batch that would weigh more.
    Items of weight 0 have nothing to teach and are left out.
    """
    order = [index for index in epoch_order(len(weights), seed=seed, epoch=epoch) if weights[index] > 0]
    total = sum(weights[index] for index in order)
    count = max(1, -int(-total // batch))
    batches: list[list[int]] = [[] for _ in range(count)]
    before = 0.0
    for index in order:
        middle = before + weights[index] / 2
        batches[min(count - 1, int(middle / total * count))].append(index)
        before += weights[index]
    return [indices for indices in batches if indices]


def length_groups(lengths: Sequence[int], *, budget: int, overhead: int = FORWARD_OVERHEAD_TOKENS) -> list[list[int]]:
    """Cut rows, sorted by length, into groups of the least padded tokens + overhead for each group.

    Args:    lengths: tokens of each row;  budget: most padded tokens in a group (a single longer row is a group of its own).
    Returns: groups of row indices, longest rows first (so that too little memory shows at once).
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    count = len(order)
    # best[i]: least cost of the rows from i on; the group that starts at i is as wide as row i, the longest left.
    best = [0] * (count + 1)
    cut = [count] * (count + 1)
    for start in range(count - 1, -1, -1):
        width = lengths[order[start]]
        best[start] = width + overhead + best[start + 1]
        cut[start] = start + 1
        for end in range(start + 2, count + 1):
            padded = width * (end - start)
            if padded > budget:
                break
            cost = padded + overhead + best[end]
            if cost < best[start]:
                best[start], cut[start] = cost, end
    groups = []
    start = 0
    while start < count:
        groups.append(order[start : cut[start]])
        start = cut[start]
    return groups


def micro_batches(costs: Sequence[int], *, budget: int) -> list[list[int]]:
    """Item indices, heaviest first, gathered while the sum of costs stays in the budget; never an empty micro-batch."""
    parts: list[list[int]] = []
    left = 0
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        if not parts or costs[index] > left:
            parts.append([])
            left = budget
        parts[-1].append(index)
        left -= costs[index]
    return parts


def pad_rows(rows: Sequence[Row], pad_id: int) -> Padded:
    """Right-padded tensors of a group of rows."""
    width = max((len(row) for row in rows), default=0)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=np.int64)
    completion = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        start, end = len(row.prompt_ids), len(row)
        ids[place, :start] = row.prompt_ids
        ids[place, start:end] = row.completion_ids
        real[place, :end] = 1
        completion[place, start:end] = 1
    return Padded(torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(completion))


def gather_rows(items: Sequence[EncodedRanking]) -> tuple[list[Row], Tensor]:
    """The distinct rows of several prompts, one after the other, and where each completion finds its row.

    Returns: rows;  places (B, K) int64: completion k of item b is rows[places[b, k]]; items with fewer than K completions repeat a row,
             which no pair names.
    """
    rows: list[Row] = []
    width = max((item.size for item in items), default=0)
    places = torch.zeros((len(items), width), dtype=torch.long)
    for number, item in enumerate(items):
        places[number, : item.size] = torch.tensor(item.places) + len(rows)
        rows += [Row(item.prompt_ids, row) for row in item.rows]
    return rows, places


def padding_share(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """Share of the padded tokens that are padding."""
    padded = sum(max(lengths[index] for index in group) * len(group) for group in groups)
    return 1.0 - sum(lengths) / padded if padded else 0.0
