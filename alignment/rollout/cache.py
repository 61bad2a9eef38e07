"""The key-value cache of rows that are written together: room for whole completions, and rows that leave cost little."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from training.errors import InputError


class RoomyLayer(DynamicLayer):
    """Keys and values in a buffer with room for the whole completion: a new token is written in place, where the stock layer copies
    everything at every step; and a finished row costs one row's copy, not the batch's."""

    def __init__(self, like: DynamicLayer, rows: int, width: int, room: int) -> None:
        super().__init__()
        keys, values = like.keys, like.values
        assert keys is not None and values is not None
        self.length, self.rows = width, rows
        # Zeros: what stands left of a short prompt is masked, but a masked NaN would still be one.
        self._keys, self._values = (tensor.new_zeros((rows, tensor.shape[1], width + room, tensor.shape[-1])) for tensor in (keys, values))
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    def fill(self, first: int, layer: DynamicLayer, samples: int) -> None:
        """Prompts that were read together, each once for each of its samples, from row `first` on; they end where all prompts end."""
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        rows, start = slice(first, first + samples * keys.shape[0]), self.length - keys.shape[-2]
        for buffer, tensor in ((self._keys, keys), (self._values, values)):
            buffer[rows, :, start : self.length] = tensor.repeat_interleave(samples, dim=0)

    def _show(self) -> None:
        self.keys = self._keys[: self.rows, :, : self.length]
        self.values = self._values[: self.rows, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[-2]
        self._keys[: self.rows, :, self.length : end] = key_states
        self._values[: self.rows, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self._keys[: self.rows, :, :end], self._values[: self.rows, :, :end]

    def move(self, holes: Tensor, moved: Tensor, rows: int) -> None:
        if len(holes):
            for buffer in (self._keys, self._values):
                buffer[holes, :, : self.length] = buffer[moved, :, : self.length]
        self.rows = rows
        self._show()


def in_parts(cache: DynamicCache) -> bool:
    """Whether prompts may be read a few at a time: not where a layer keeps less than it has seen (sliding windows)."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def join_parts(parts: Sequence[DynamicCache], sizes: Sequence[int], *, width: int, samples: int, room: int) -> DynamicCache:
    """One cache of all prompts, each once for each of its samples, from those of its parts, which are emptied.

    Args:    sizes: prompts in each part;  width: tokens of the longest prompt;  room: tokens that will follow.
    Raises:  InputError for a layer that keeps a recurrent state.
    """
    whole = parts[0]
    for place, layer in enumerate(whole.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            roomy = RoomyLayer(layer, sum(sizes) * samples, width, room)
            first = 0
            for part, size in zip(parts, sizes, strict=True):
                piece = part.layers[place]
                assert isinstance(piece, DynamicLayer)
                roomy.fill(first, piece, samples)
                piece.reset()
                first += size * samples
            whole.layers[place] = roomy
        elif not isinstance(layer, DynamicLayer):
            raise InputError(
                f"The model keeps a recurrent state ({type(layer).__name__}), which padding on the left would change.",
                remedy="Use a model whose layers all attend, such as Llama, Qwen or Gemma.",
            )
        elif samples > 1 and layer.is_initialized:
            layer.batch_repeat_interleave(samples)
    return whole
