"""What a model says of whole rows: log-probabilities of completions, and the state after the last token. See `training.readings`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from training.language_model import unwrap
from training.pack import Row
from training.processes import Processes
from training.readings import Reading, Speech, Way, readings
from training.sharding import one_pass


@one_pass
def row_logps(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B,) float32: log-probability of each row's completion in nats, summed over its tokens (EOS among them). Keeps gradients."""
    speech = Speech(model)

    def read(reading: Reading) -> Tensor:
        return reading.summed(speech.logps(reading))

    return _in_order(list(readings(model, rows, read, way=Way(pad_id, device), budget=budget, logits=speech.needs_logits)), device)


@one_pass
def row_last_states(model: Any, rows: Sequence[Row], pad_id: int, *, device: torch.device, budget: int) -> Tensor:
    """(B, H): the backbone's last hidden state at the last token of each row. Keeps gradients."""
    found = list(readings(model, rows, Reading.last, way=Way(pad_id, device), budget=budget))
    if not found:
        backbone: Any = unwrap(model).base_model
        return torch.zeros((0, backbone.config.get_text_config().hidden_size), device=device)
    return _in_order(found, device)


def _in_order(parts: Sequence[tuple[Sequence[int], Tensor]], device: torch.device) -> Tensor:
    """Parts (numbers of rows, (B', ...)) as one, in the order of the rows: (B, ...)."""
    if not parts:
        return torch.zeros(0, device=device)
    order = [number for numbers, _ in parts for number in numbers]
    places = torch.empty(len(order), dtype=torch.long)
    places[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    return torch.cat([part for _, part in parts])[places.to(device)]


def measured(rows: Sequence[Row], processes: Processes, compute: Callable[[Sequence[Row]], Tensor]) -> Tensor:
    """`compute` (rows -> (B, ...)) over all rows without gradients, the work shared: (N, ...) float32 on the CPU of each process."""
    cuts = [len(rows) * rank // processes.world for rank in range(processes.world + 1)]  # neighbours stay together: they share prompts
    with torch.no_grad(), processes.autocast():
        values = compute(rows[cuts[processes.rank] : cuts[processes.rank + 1]]).float().cpu()
    return torch.cat(processes.gather(values))
