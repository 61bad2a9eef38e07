"""What a model says of whole rows (a prompt and a completion each): log-probabilities, and the state after the last token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.language_model import completion_logps, hidden_states, unwrap
from training.pack import Padded, Row, length_groups, pad_rows
from training.processes import Processes


def in_groups(rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int, compute: Callable[[Padded], Tensor]) -> Tensor:
    """`compute` on each length group (B', T) -> (B', ...), put back into the order of the rows: (B, ...)."""
    groups = length_groups([len(row) for row in rows], budget=budget)
    parts = [compute(pad_rows([rows[index] for index in group], pad_id).to(device)) for group in groups]
    if not parts:
        return torch.zeros(0, device=device)
    places = torch.empty(len(rows), dtype=torch.long)
    places[torch.tensor([index for group in groups for index in group])] = torch.arange(len(rows))
    return torch.cat(parts)[places.to(device)]


def row_logps(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B,) float32: log-probability of each row's completion in nats, summed over its tokens (EOS among them). Keeps gradients."""

    def compute(padded: Padded) -> Tensor:
        return completion_logps(model, padded.input_ids, padded.attention_mask, padded.completion_mask).sum(-1)

    return in_groups(rows, pad_id, device=device, budget=budget, compute=compute)


def row_last_states(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B, H): the backbone's last hidden state at the last token of each row. Keeps gradients."""

    def compute(padded: Padded) -> Tensor:
        places = torch.arange(padded.attention_mask.shape[1], device=device)
        last = (padded.attention_mask * places).argmax(-1)
        states = hidden_states(unwrap(model).base_model, padded.input_ids, padded.attention_mask)
        return states[torch.arange(len(last), device=device), last]

    if not rows:
        return torch.zeros((0, unwrap(model).config.get_text_config().hidden_size), device=device)
    return in_groups(rows, pad_id, device=device, budget=budget, compute=compute)


def measured(rows: Sequence[Row], processes: Processes, compute: Callable[[Sequence[Row]], Tensor]) -> Tensor:
    """`compute` (rows -> (B,)) over all rows without gradients, the work shared: (N,) float32 on the CPU of each process."""
    mine = range(processes.rank, len(rows), processes.world)
    with torch.no_grad(), processes.autocast():
        values = compute([rows[index] for index in mine]).float().cpu()
    whole = torch.zeros(len(rows))
    for rank, part in enumerate(processes.gather(values)):
        whole[rank :: processes.world] = part
    return whole
