"""What a model says of whole rows (a prompt and a completion each), one micro-batch at a time: the states that predict each completion
token, and the state at each row's last token.

Rows of one prompt share its encoding where the architecture allows it; the numbers are the same either way.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.language_model import hidden_states, output_head, state_logps, unwrap
from training.pack import Row, length_groups, pad_rows
from training.packed_model import packed_states, packs_rows
from training.processes import Processes
from training.sharding import in_step, one_pass
from training.shared_prompt import Packed, pack_rows

T = TypeVar("T")
SPARE_ROW = Row([0], [0])  # two tokens that every vocabulary has


@dataclass(frozen=True, slots=True)
class Way:
    """How rows get to a model. `processes`: for its autocast; None: as the caller has it."""

    pad_id: int
    device: torch.device
    processes: Processes | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One forward pass. Shapes: C copies, S places, B rows, N completion tokens of all rows.

    `rows`: numbers of the B rows among those that were given;  `states` (C, S, H): the backbone's last hidden states (or the model's
    logits, for a model whose head does not stand alone);  `before` (N,): the place whose state predicts each completion token;
    `ends` (B,): the place of each row's last token;  `targets` (N,): the completion tokens;  `owner` (N,): the row of each, 0..B-1, in
    order.
    """

    rows: tuple[int, ...]
    states: Tensor
    before: Tensor
    ends: Tensor
    targets: Tensor
    owner: Tensor

    def of_nothing(self) -> "Reading":
        """The same pass with no row in it: gradients flow through what is read of it, all of them zero."""
        none = self.before[:0]
        return Reading((), self.states, none, none, self.targets[:0], none)

    def predicting(self, copy: int = 0) -> Tensor:
        """(N, H): the state before each completion token."""
        return self.states[copy].index_select(0, self.before)

    def last(self, copy: int = 0) -> Tensor:
        """(B, H): the state at each row's last token."""
        return self.states[copy].index_select(0, self.ends)

    def by_row(self, tokens: Tensor, width: int) -> Tensor:
        """One number for each completion token, (N,) -> (B, width): packed to the left, 0 beyond each completion's end."""
        counts = torch.bincount(self.owner, minlength=len(self.rows))
        first = counts.cumsum(0) - counts
        places = torch.arange(len(self.owner), device=self.owner.device) - first[self.owner]
        return tokens.new_zeros((len(self.rows), width)).index_put((self.owner, places), tokens)

    def summed(self, tokens: Tensor) -> Tensor:
        """One number for each completion token, (N,) -> (B,): their sum over each row."""
        return tokens.new_zeros(len(self.rows)).index_add(0, self.owner, tokens)


def readings(
    model: Any, rows: Sequence[Row], read: Callable[[Reading], T], *, way: Way, budget: int, copies: int = 1, logits: bool = False
) -> Iterator[tuple[tuple[int, ...], T]]:
    """Forward passes of at most `budget` tokens each (a single longer row stands alone), longest first; together they hold every row once.

    Gradients are kept: a caller that trains goes backward through one before it takes the next. Where weights are sharded over processes,
    passes over no rows at all keep this process in step with the others.

    Args:    model: any with a backbone, or peft's wrapper of one;  read: what is asked of each pass, heads included;  copies: how often
             each token is computed, side by side (adapters that read the copies differently: `training.slots`); they count against the
             budget;  logits: `Reading.states` are the whole model's logits.
    Returns: for each pass the numbers of its rows, and what `read` made of it.
    """
    plain: Any = unwrap(model)
    budget = max(1, budget // copies)
    packs: list[Packed] = []
    groups: list[list[int]] = []
    if packed := not logits and packs_rows(plain.base_model):
        packs = pack_rows(rows, budget=budget, share=True)
    else:
        groups = length_groups([len(row) for row in rows], budget=budget)

    @one_pass
    def run(_model: Any, part: Packed | list[int] | None) -> tuple[tuple[int, ...], T]:
        if isinstance(part, Packed) or (part is None and packed):
            reading = _packed(part or _spare_pack(), plain, way, copies=copies)
        else:
            group = part or []
            some = [rows[index] for index in group] or [SPARE_ROW]
            reading = _padded(some, group or [0], plain, way, copies=copies, logits=logits)
        if part is None:
            reading = reading.of_nothing()
        return reading.rows, read(reading)

    parts: Sequence[Packed | list[int]] = packs if packed else groups
    for part in in_step(model, parts):
        with way.processes.autocast() if way.processes else nullcontext():
            found = run(model, part)
        yield found


def _packed(packed: Packed, plain: Any, way: Way, *, copies: int) -> Reading:
    here = packed.to(way.device)
    states = packed_states(plain.base_model, here, copies=copies)
    return Reading(here.rows, states, here.before, here.ends, here.targets, here.owner)


def _spare_pack() -> Packed:
    return pack_rows([SPARE_ROW], budget=1 << 30, share=True)[0]


def _padded(rows: Sequence[Row], numbers: Sequence[int], plain: Any, way: Way, *, copies: int, logits: bool) -> Reading:
    padded = pad_rows(rows, way.pad_id).to(way.device)
    ids, attention = (tensor.repeat(copies, 1) for tensor in (padded.input_ids, padded.attention_mask))
    states = plain(input_ids=ids, attention_mask=attention).logits if logits else hidden_states(plain.base_model, ids, attention)
    owner, places = padded.completion_mask.nonzero(as_tuple=True)
    width = padded.input_ids.shape[1]
    starts = torch.arange(len(rows), device=way.device) * width
    return Reading(
        tuple(numbers),
        states.reshape(copies, len(rows) * width, -1),
        before=starts[owner] + places - 1,
        ends=starts + padded.attention_mask.sum(-1) - 1,
        targets=padded.input_ids[owner, places],
        owner=owner,
    )


class Speech:
    """How states become log-probabilities of the tokens that follow: the model's own head, in chunks over the vocabulary."""

    def __init__(self, model: Any) -> None:
        self.head = output_head(unwrap(model))

    @property
    def needs_logits(self) -> bool:
        """Whether `readings` has to be asked for the whole model's logits, because its head does not stand alone."""
        return self.head is None

    def logps(self, reading: Reading, *, copy: int = 0, temperature: float = 1.0, targets: Tensor | None = None) -> Tensor:
        """(N,) float32: log-probability in nats of each completion token (or of `targets` in their places) at the temperature."""
        return state_logps(self.head, reading.predicting(copy), reading.targets if targets is None else targets, temperature)
