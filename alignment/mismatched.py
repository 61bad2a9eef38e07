"""KTO's reference point: how far the policy has moved from the reference, measured on prompts with completions of other prompts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.encode import Encoder, TooLong
from training.pack import Row
from training.rankings import EncodedRanking


class Mismatched:
    """One row for each item: its prompt, and the first completion of the next item of another prompt (in file order, then from the start).

    The pairs are fixed, so that their log-probabilities under the reference are computed once. An item that no other completion fits
    (another prompt is missing, or both together are too long) has no row.
    """

    def __init__(self, items: Sequence[EncodedRanking], encoder: Encoder) -> None:
        self.rows: list[Row] = []
        self.row_of: dict[int, int] = {}
        self.reference = torch.zeros(0)  # (rows,) log-probabilities under the reference, once they are known
        for number, item in enumerate(items):
            for other in (*items[number + 1 :], *items[:number]):
                if other.digest != item.digest and _fits(encoder, item.prompt_ids, other.rows[0]):
                    self.row_of[number] = len(self.rows)
                    self.rows.append(Row(item.prompt_ids, other.rows[0]))
                    break

    def shift(self, indices: Sequence[int], logps: Callable[[Sequence[Row]], Tensor]) -> Tensor:
        """Estimated KL(policy || reference) in nats, a scalar >= 0 without gradients: mean log-ratio over the rows of these items.

        Source:  Ethayarajh et al. 2024, arXiv:2402.01306: z0 is shared by a batch and biased, but cheap and stable."""
        places = [self.row_of[index] for index in indices if index in self.row_of]
        if not places:
            return torch.zeros(())
        with torch.no_grad():
            now = logps([self.rows[place] for place in places])
            return (now - self.reference[places].to(now.device)).mean().clamp(min=0)


def _fits(encoder: Encoder, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bool:
    try:
        encoder.check_length(prompt_ids, completion_ids)
    except TooLong:
        return False
    return True
