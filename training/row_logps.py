"""What a model says of whole rows (a prompt and a completion each): log-probabilities, and the state after the last token.

Rows of one prompt share its encoding where the architecture allows it; the numbers are the same either way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.language_model import completion_logps, hidden_states, output_head, state_logps, unwrap
from training.pack import Padded, Row, length_groups, pad_rows
from training.packed_model import packed_states, packs_rows
from training.processes import Processes
from training.sharding import in_step, keeps_step, one_pass
from training.shared_prompt import Packed, pack_rows

SPARE_ROW = Row([0], [0])  # two tokens that every vocabulary has


@one_pass
def row_logps(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B,) float32: log-probability of each row's completion in nats, summed over its tokens (EOS among them). Keeps gradients."""
    plain: Any = unwrap(model)
    head = output_head(plain)
    if head is None or not packs_rows(plain.base_model):

        def of_group(padded: Padded) -> Tensor:
            return completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask).sum(-1)

        return _in_groups(model, rows, pad_id, device=device, budget=budget, compute=of_group)

    def of_packed(packed: Packed) -> Tensor:
        states = packed_states(plain.base_model, packed)[0]
        logps = state_logps(head, states.index_select(0, packed.before), packed.targets)
        return torch.zeros(len(packed.ends), device=device).index_add(0, packed.owner, logps)

    return _in_packs(model, rows, device=device, budget=budget, compute=of_packed)


@one_pass
def row_last_states(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B, H): the backbone's last hidden state at the last token of each row. Keeps gradients."""
    backbone: Any = unwrap(model).base_model
    if not rows and not keeps_step(model):
        return torch.zeros((0, backbone.config.get_text_config().hidden_size), device=device)
    if not packs_rows(backbone):

        def of_group(padded: Padded) -> Tensor:
            places = torch.arange(padded.attention_mask.shape[1], device=device)
            last = (padded.attention_mask * places).argmax(-1)
            return hidden_states(backbone, padded.input_ids, padded.attention_mask)[torch.arange(len(last), device=device), last]

        return _in_groups(model, rows, pad_id, device=device, budget=budget, compute=of_group)
    return _in_packs(model, rows, device=device, budget=budget, compute=lambda packed: packed_states(backbone, packed)[0][packed.ends])


def _in_packs(model: Any, rows: Sequence[Row], *, device: torch.device, budget: int, compute: Callable[[Packed], Tensor]) -> Tensor:
    """`compute` on each packed row of B' rows -> (B', ...), put back into the order of the rows: (B, ...)."""
    packs = pack_rows(rows, budget=budget, share=True)
    parts = [compute(packed.to(device)) if packed else compute(spare_pack().to(device))[:0] for packed in in_step(model, packs)]
    return _in_order(parts, [row for packed in packs for row in packed.rows], device)


def _in_groups(
    model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int, compute: Callable[[Padded], Tensor]
) -> Tensor:
    """As `_in_packs`, one encoding for each row, padded to the longest of its group."""
    groups = length_groups([len(row) for row in rows], budget=budget)
    padded = [pad_rows([rows[index] for index in group], pad_id) if group else None for group in in_step(model, groups)]
    parts = [compute(one.to(device)) if one else compute(spare_rows(pad_id, device))[:0] for one in padded]
    return _in_order(parts, [index for group in groups for index in group], device)


def spare_rows(pad_id: int, device: torch.device) -> Padded:
    """As `spare_pack`, padded."""
    return pad_rows([SPARE_ROW], pad_id).to(device)


def spare_pack() -> Packed:
    """What goes through a sharded model where another process has one more pack; gradients flow through it, all of them zero."""
    return pack_rows([SPARE_ROW], budget=1 << 30, share=True)[0]


def _in_order(parts: Sequence[Tensor], order: Sequence[int], device: torch.device) -> Tensor:
    if not parts:
        return torch.zeros(0, device=device)
    places = torch.empty(len(order), dtype=torch.long)
    places[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return torch.cat(list(parts))[places.to(device)]


def measured(rows: Sequence[Row], processes: Processes, compute: Callable[[Sequence[Row]], Tensor]) -> Tensor:
    """`compute` (rows -> (B, ...)) over all rows without gradients, the work shared: (N, ...) float32 on the CPU of each process."""
    cuts = [len(rows) * rank // processes.world for rank in range(processes.world + 1)]  # neighbours stay together: they share prompts
    with torch.no_grad(), processes.autocast():
        values = compute(rows[cuts[processes.rank] : cuts[processes.rank + 1]]).float().cpu()
    return torch.cat(processes.gather(values))
