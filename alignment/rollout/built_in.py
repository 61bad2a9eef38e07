"""Sampling completions in batches, from exactly the distribution that is trained: the softmax of logits / temperature, nothing else.

Randomness belongs to the sequence: its uniform numbers come from a generator seeded by (seed, step, prompt, sample), and a token is
drawn by inverting the cumulative distribution. The same sequence comes out whatever stands beside it in the batch, and on however many
processes the prompts are spread. (Logits of another batch shape differ in their last bits; a draw changes only if its uniform
number falls into that gap: hardly ever where few tokens are likely, about once in ten thousand tokens where thousands are.)

A model's `generation_config` is not consulted: the top-k, top-p or repetition rules that many hub models carry would change the
distribution behind the trainer's back.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignment.rollout.cache import RoomyLayer, in_parts, join_parts
from alignment.rollout.packed_weights import packed_weights
from alignment.rollout.sampling import Sample, Sampling
from training.errors import TrainingFailed
from training.language_model import output_head, unwrap
from training.pack import length_groups
from training.processes import Processes

# Tokens of the vocabulary summed at once when one is drawn.
BLOCK = 128
# Most padded tokens of prompts that are read at once, and what another pass costs as if it were tokens.
PREFILL_TOKENS = {"cpu": (2048, 64), "accelerator": (16_384, 1024)}


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
        # Packing costs as much as a few steps of decoding, and helps from a few rows on.
        packs = len(prompts) * samples >= 4 and sampling.max_new_tokens >= 16 and (processes is None or processes.dtype == "float32")
        with packed_weights(unwrap(model)) if packs else nullcontext():
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
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    # A token that cannot come (-inf) is kept finite, or its share of the entropy would be 0 * inf.
    shifted = (scaled - scaled.amax(-1, keepdim=True)).clamp_(min=torch.finfo(torch.float32).min)
    weights = shifted.exp()
    totals = weights.sum(-1, keepdim=True)
    if sampling.greedy:
        tokens = shifted.argmax(-1)
    else:
        tokens = _invert(_truncate(weights / totals, sampling) if sampling.truncates else weights, uniforms)
    log_totals = totals.log()
    logps = shifted.gather(-1, tokens[:, None]) - log_totals
    entropies = log_totals - shifted.mul_(weights).sum(-1, keepdim=True) / totals
    return tokens, logps[:, 0], entropies[:, 0]


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(R,): the token at which each row's running sum of weights (R, V), not normalised, passes uniform * total.

    Found in two steps, the block and then the token in it: a running float64 sum over a whole large vocabulary costs more than the model.
    In float64, because a float32 running sum would shift the tail by more than its probability; float32 sums of one block do not."""
    rows, vocabulary = weights.shape
    blocks = -(-vocabulary // BLOCK)
    padded = F.pad(weights, (0, blocks * BLOCK - vocabulary)) if vocabulary % BLOCK else weights
    blocked = padded.view(rows, blocks, BLOCK)
    outer = blocked.sum(-1).double().cumsum(-1)
    wanted = uniforms[:, None] * outer[:, -1:]
    block = torch.searchsorted(outer, wanted, right=True).clamp(max=blocks - 1)
    ends = outer.gather(-1, block)
    starts = torch.where(block > 0, outer.gather(-1, (block - 1).clamp(min=0)), 0.0)
    # Rounding must not carry the draw beyond the block's last token with any weight.
    share = ((wanted - starts) / (ends - starts)).clamp(0.0, 1 - 2.0**-53)
    inner = blocked[torch.arange(rows, device=weights.device), block[:, 0]].double().cumsum(-1)
    place = torch.searchsorted(inner, share * inner[:, -1:], right=True)
    return (block * BLOCK + place)[:, 0].clamp(max=vocabulary - 1)


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
        width, room = len(prompts[0]), self.sampling.max_new_tokens  # the longest comes first
        mask = np.zeros((len(prompts), width + room), dtype=np.int64)
        for place, prompt in enumerate(prompts):
            mask[place, width - len(prompt) :] = 1
        whole = torch.from_numpy(mask).to(self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cache, logits = self._read(prompts, samples)
        uniforms = np.stack([uniform_numbers(self.sampling, stream, sample) for stream in streams for sample in range(samples)])
        batch = _Batch(
            owner=torch.arange(len(prompts) * samples, device=self.books),
            mask=whole.repeat_interleave(samples, dim=0),
            positions=lengths.repeat_interleave(samples, dim=0),
            uniforms=torch.from_numpy(uniforms).to(self.books),
        )
        return cache, logits.repeat_interleave(samples, dim=0), batch

    def _read(self, prompts: Sequence[Sequence[int]], samples: int) -> tuple[DynamicCache, Tensor]:
        """The cache of all rows, and (P, V): what each prompt's first token is drawn from. Prompts of near length are read together."""
        lengths = [len(prompt) for prompt in prompts]
        groups = [list(range(len(prompts)))]
        if in_parts(DynamicCache(config=self.plain.config)):
            budget, overhead = PREFILL_TOKENS["cpu" if self.device.type == "cpu" else "accelerator"]
            groups = length_groups(lengths, budget=budget, overhead=overhead)
        caches, logits = [], []
        for group in groups:
            width = lengths[group[0]]
            ids = np.full((len(group), width), self.pad_id, dtype=np.int64)
            mask = np.zeros((len(group), width), dtype=np.int64)
            for row, place in enumerate(group):
                ids[row, width - lengths[place] :] = prompts[place]
                mask[row, width - lengths[place] :] = 1
            seen = torch.from_numpy(mask).to(self.device)
            caches.append(DynamicCache(config=self.plain.config))
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            logits.append(self._forward(torch.from_numpy(ids).to(self.device), seen, positions, caches[-1]))
        cache = join_parts(caches, list(map(len, groups)), width=lengths[0], samples=samples, room=self.sampling.max_new_tokens)
        return cache, torch.cat(logits)

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
            if isinstance(layer, RoomyLayer):
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
