"""Sampling completions in batches, from exactly the distribution that is trained: the softmax of logits / temperature, nothing else.

Randomness belongs to the sequence: its uniform numbers come from a generator seeded by (seed, step, prompt, sample), and a token is
drawn by inverting the cumulative distribution. The same sequence comes out whatever stands beside it in the batch, and on however many
processes the prompts are spread. (Logits of another batch shape differ in their last bits; a draw changes only if its uniform
number falls into that gap, about once in ten million tokens.)

A model's `generation_config` is not consulted: the top-k, top-p or repetition rules that many hub models carry would change the
distribution behind the trainer's back.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignment.rollout.sampling import Sample, Sampling
from training.errors import InputError, TrainingFailed
from training.language_model import output_head, unwrap
from training.processes import Processes


@dataclass(slots=True)
class _Batch:
    """The rows still being written. Row r stands for sequence `owner[r]`."""

    owner: Tensor
    mask: Tensor
    positions: Tensor
    uniforms: Tensor
    tokens: Tensor = field(init=False)
    logps: Tensor = field(init=False)
    entropies: Tensor = field(init=False)
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape, device = self.uniforms.shape, self.uniforms.device
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logps = torch.zeros(shape, device=device)
        self.entropies = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(shape[0], dtype=torch.long, device=device)


@torch.no_grad()
def sample_completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int],
    pad_id: int,
    samples: int = 1,
    streams: Sequence[int] | None = None,
    processes: Processes | None = None,
) -> list[Sample]:
    """Draw `samples` completions of each prompt. Prompts of near length share a batch; a prompt's samples share its prefill.

    Shapes: P prompts; no more than `sampling.cache_tokens` of prompt and completion are held at once.
    Args:    prompts: token ids, none empty;  stop_ids: a set of tokens, any of which ends a completion (and is kept);
             streams: the number of each prompt in the step, by which it gets its random numbers (None: its place in `prompts`);
             processes: for its autocast (None: float32).
    Returns: P * samples Samples, in the order of `prompts`, a prompt's samples side by side.
    Raises:  ValueError for an empty prompt or no stop token;  TrainingFailed if the model's logits are not finite;  InputError for a
             model with recurrent layers.
    Source:  inverse transform sampling, Devroye 1986, "Non-Uniform Random Variate Generation", II.2."""
    if not stop_ids:
        raise ValueError("stop_ids is empty: no completion could ever end.")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("A prompt has no tokens: nothing predicts its completion's first token.")
    streams = range(len(prompts)) if streams is None else streams
    was_training = model.training
    model.eval()  # with gradient checkpointing, transformers ignores the cache in training mode
    try:
        found: list[list[Sample]] = [[] for _ in prompts]
        for group in batches([len(prompt) for prompt in prompts], sampling, samples):
            engine = _Engine(model, sampling, sorted(stop_ids), pad_id, processes)
            drawn = engine.draw([prompts[place] for place in group], [streams[place] for place in group], samples)
            for place, rows in zip(group, drawn, strict=True):
                found[place] = rows
    finally:
        model.train(was_training)
    return [sample for rows in found for sample in rows]


def uniform_numbers(sampling: Sampling, stream: int, sample: int) -> np.ndarray:
    """The uniform numbers in [0, 1) of one sequence, (max_new_tokens,) float64: they depend on (seed, step, stream, sample) alone."""
    return np.random.default_rng([sampling.seed, sampling.step, stream, sample]).random(sampling.max_new_tokens)


def draw_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each row, its log-probability, and the entropy of the distribution.

    Shapes: R rows, V tokens in the vocabulary.   Units: nats.
    Args:    logits (R, V);  uniforms (R,) float64 in [0, 1).
    Returns: tokens (R,) int64; logps (R,), entropies (R,) float32, both of softmax(logits / temperature) before any truncation.
    """
    logps = (logits.float() / sampling.temperature).log_softmax(-1)
    probabilities = logps.exp()
    entropies = -(probabilities * logps.clamp(min=torch.finfo(logps.dtype).min)).sum(-1)
    if sampling.greedy:
        tokens = logps.argmax(-1)
    else:
        allowed = _truncate(probabilities, sampling)
        # float64: a float32 running sum over a large vocabulary would shift the tail by more than its probability.
        cumulative = allowed.double().cumsum(-1)
        wanted = uniforms[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logps.gather(-1, tokens[:, None])[:, 0], entropies


def _truncate(probabilities: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k and sampling.top_k < probabilities.shape[-1]:
        least = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        # The token that crosses the limit stays, so that at least one always does.
        dropped = before >= sampling.top_p * ordered.sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(torch.zeros_like(dropped).scatter(-1, places, dropped), 0)
    return probabilities


def batches(lengths: Sequence[int], sampling: Sampling, samples: int) -> Iterator[list[int]]:
    """Places of prompts, longest first, cut where the cache of a group would pass the limit."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        width = lengths[group[0]] if group else lengths[place]
        if group and (len(group) + 1) * samples * (width + sampling.max_new_tokens) > sampling.cache_tokens:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


class _Engine:
    """One batch: prefill once per prompt, then a token a row, dropping the rows that are done."""

    def __init__(self, model: Any, sampling: Sampling, stop_ids: list[int], pad_id: int, processes: Processes | None) -> None:
        self.plain = unwrap(model)
        self.device = next(self.plain.parameters()).device
        # Draws need float64, which Apple's devices do not have: there they are made on the CPU.
        self.books = torch.device("cpu") if self.device.type == "mps" else self.device
        self.head = output_head(self.plain)
        self.sampling = sampling
        self.stop_ids = torch.tensor(stop_ids, device=self.books)
        self.pad_id = pad_id
        self.processes = processes

    def draw(self, prompts: Sequence[Sequence[int]], streams: Sequence[int], samples: int) -> list[list[Sample]]:
        cache, logits, batch = self._prefill(prompts, streams, samples)
        for t in range(self.sampling.max_new_tokens):
            tokens, logps, entropies = draw_tokens(logits.to(self.books), batch.uniforms[batch.owner, t], self.sampling)
            batch.tokens[batch.owner, t] = tokens
            batch.logps[batch.owner, t] = logps
            batch.entropies[batch.owner, t] = entropies
            batch.lengths[batch.owner] = t + 1
            going = ~torch.isin(tokens, self.stop_ids)
            if t + 1 == self.sampling.max_new_tokens or not bool(going.any()):
                break
            if not bool(going.all()):
                tokens = tokens[self._compact(cache, batch, going)]
            width = batch.mask.shape[1] - self.sampling.max_new_tokens + t + 1
            logits = self._forward(tokens[:, None].to(self.device), batch.mask[:, :width], batch.positions[:, None] + t, cache)
        return self._samples(batch, prompts, samples)

    def _prefill(self, prompts: Sequence[Sequence[int]], streams: Sequence[int], samples: int) -> tuple[DynamicCache, Tensor, _Batch]:
        width, room = max(map(len, prompts)), self.sampling.max_new_tokens
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(prompts), width + room), dtype=np.int64)
        mask[:, width:] = 1
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = prompt
            mask[place, width - len(prompt) : width] = 1
        whole = torch.from_numpy(mask).to(self.device)
        positions = (whole[:, :width].cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.plain.config)
        logits = self._forward(torch.from_numpy(ids).to(self.device), whole[:, :width], positions, cache)
        uniforms = np.stack([uniform_numbers(self.sampling, stream, sample) for stream in streams for sample in range(samples)])
        _expand(cache, samples, room)
        batch = _Batch(
            owner=torch.arange(len(prompts) * samples, device=self.books),
            mask=whole.repeat_interleave(samples, dim=0),
            positions=(positions[:, -1] + 1).repeat_interleave(samples, dim=0),
            uniforms=torch.from_numpy(uniforms).to(self.books),
        )
        return cache, logits.repeat_interleave(samples, dim=0), batch

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(R, V): logits of the token after the last one. Never more than one position's logits exist."""
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        if self.processes is None:
            return self._next_logits(given)
        with self.processes.autocast():
            return self._next_logits(given)

    def _next_logits(self, given: dict[str, Any]) -> Tensor:
        if self.head is None:
            return self.plain(**given, logits_to_keep=1).logits[:, -1].float()
        return self.head(self.plain.base_model(**given).last_hidden_state[:, -1])

    def _compact(self, cache: DynamicCache, batch: _Batch, going: Tensor) -> Tensor:
        """Move the last running rows into the places of finished ones; returns which old row each new row was."""
        left = int(going.sum())
        order = torch.arange(left, device=going.device)
        holes = (~going[:left]).nonzero()[:, 0]
        moved = going[left:].nonzero()[:, 0] + left
        order[holes] = moved
        here, holes, moved = (index.to(self.device) for index in (order, holes, moved))
        for layer in cache.layers:
            if isinstance(layer, _RoomyLayer):
                layer.move(holes, moved, left)
            elif isinstance(layer, DynamicLayer):
                layer.batch_select_indices(here)
        batch.owner, batch.mask, batch.positions = batch.owner[order], batch.mask[here], batch.positions[here]
        return order

    def _samples(self, batch: _Batch, prompts: Sequence[Sequence[int]], samples: int) -> list[list[Sample]]:
        tokens, lengths = batch.tokens.cpu(), batch.lengths.tolist()
        logps, entropies = batch.logps.float().cpu(), batch.entropies.float().cpu()
        if not bool(logps.isfinite().all()):
            raise TrainingFailed(
                "The policy's logits are not finite while it samples.",
                remedy="Start again from the newest good checkpoint with a lower learning_rate, or set dtype = float32.",
            )
        stops = set(self.stop_ids.tolist())
        found: list[list[Sample]] = [[] for _ in prompts]
        for index, length in enumerate(lengths):
            place, sample = divmod(index, samples)
            ids = tokens[index, :length].tolist()
            found[place].append(
                Sample(
                    sample=sample,
                    prompt_ids=prompts[place],
                    completion_ids=ids,
                    logps=logps[index, :length].clone(),
                    entropies=entropies[index, :length].clone(),
                    finished=ids[-1] in stops,
                )
            )
        return found


class _RoomyLayer(DynamicLayer):
    """Keys and values in a buffer with room for the whole completion: a new token is written in place, where the stock layer copies
    everything at every step; and a finished row costs one row's copy, not the batch's."""

    def __init__(self, layer: DynamicLayer, samples: int, room: int) -> None:
        super().__init__()
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        self.length = keys.shape[-2]
        self._keys, self._values = (self._buffer(tensor, samples, room) for tensor in (keys, values))
        self.rows = self._keys.shape[0]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._show()

    @staticmethod
    def _buffer(tensor: Tensor, samples: int, room: int) -> Tensor:
        rows, heads, length, size = tensor.shape
        buffer = tensor.new_empty((rows * samples, heads, length + room, size))
        buffer[:, :, :length] = tensor.repeat_interleave(samples, dim=0)
        return buffer

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


def _expand(cache: DynamicCache, samples: int, room: int) -> None:
    """Each prompt's cache once for each of its samples; in place, also for the cache kinds that have no roomy form (sliding windows)."""
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[place] = _RoomyLayer(layer, samples, room)
        elif not isinstance(layer, DynamicLayer):
            raise InputError(
                f"The model keeps a recurrent state ({type(layer).__name__}), which padding on the left would change.",
                remedy="Use a model whose layers all attend, such as Llama, Qwen or Gemma.",
            )
        elif samples > 1:
            layer.batch_repeat_interleave(samples)
