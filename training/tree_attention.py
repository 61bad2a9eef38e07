"""Attention over a packed row of prompt trees: prompts among themselves, completions against their prompt and themselves.

On a CPU the buckets of a tree are computed by batched products (short rows) or one fused kernel (long ones), whose work grows with what a
token can see, not with the packed row; on an accelerator one FlexAttention call does it by a block mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from training.shared_prompt import Bucket, Tree

# Up to this many keys a query, products are written out (faster on a CPU, and batched over all heads); beyond, a fused kernel saves memory.
MOST_EXPLICIT_KEYS = 256


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer weighs keys: products times `scale`; with `softcap` > 0, cap * tanh(x / cap); `window` as in `Tree`."""

    scale: float
    softcap: float = 0.0
    window: int = 0


def tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scoring: Scoring) -> Tensor:
    """Each token attends to its prompt and to what stands before it in its own segment.

    Shapes:  C copies of the packed row (1, or one for each adapter), H heads, T tokens, D numbers a head; H' <= H heads of keys.
    Args:    query (C, H, T, D), key, value (C, H', T, D).
    Returns: (C, T, H, D).
    """
    if query.device.type == "cuda":
        return flex_tree_attention(_compiled(), query, key, value, tree=tree, scoring=scoring)
    copies, heads, tokens = query.shape[:3]
    groups = heads // key.shape[1]
    # One batch dimension for copies and heads; key and value heads are repeated after they are gathered.
    q, k, v = (part.reshape(-1, tokens, part.shape[-1]) for part in (query, key, value))
    outputs = []
    for bucket in tree.buckets:
        gathered = _gather(q, bucket), _repeat(_gather(k, bucket), groups), _repeat(_gather(v, bucket), groups)
        outputs.append(_bucket_attention(*gathered, bucket, scoring))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    if tree.back is not None:
        joined = _Back.apply(joined, tree.back, tree.places, tree.real)
    return joined.view(copies, heads, tokens, -1).transpose(1, 2)


def _repeat(states: Tensor, groups: int) -> Tensor:
    return states if groups == 1 else states.repeat_interleave(groups, 0)


def _gather(states: Tensor, bucket: Bucket) -> Tensor:
    """(N, T, D) -> (N, places, D)."""
    if len(bucket.places) == states.shape[1] and bucket.is_slice == 0:
        return states
    if bucket.is_slice >= 0:
        return states.narrow(1, bucket.is_slice, len(bucket.places))
    return _Gather.apply(states, bucket.places, bucket.real)


class _Gather(torch.autograd.Function):
    """Tokens to places. No token stands at two real places, so the gradient is a copy and needs no sums."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, places: Tensor, real: Tensor | None) -> Tensor:
        ctx.tokens = states.shape[1]
        ctx.save_for_backward(places, *([] if real is None else [real]))
        return states.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        places, *real = ctx.saved_tensors
        whole = gradient.new_zeros((gradient.shape[0], ctx.tokens, gradient.shape[2]))
        if real:
            (kept,) = real[0].nonzero(as_tuple=True)
            places, gradient = places[kept], gradient.index_select(1, kept)
        return whole.index_copy_(1, places, gradient), None, None


class _Back(torch.autograd.Function):
    """Places to tokens: the other way round. What stands at no real place gets no gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, back: Tensor, places: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(places, *([] if real is None else [real]))
        return outputs.index_select(1, back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        places, *real = ctx.saved_tensors
        spread = gradient.index_select(1, places)
        return spread * real[0][:, None] if real else spread, None, None, None


@dataclass(frozen=True, slots=True)
class _Part:
    """Queries, keys and values of a bucket's roots (N, G, P, D) or children (N, G, K, R, D); N = copies x heads."""

    q: Tensor
    k: Tensor
    v: Tensor


def _bucket_attention(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scoring: Scoring) -> Tensor:
    """(N, places, D) -> (N, places, D): roots among themselves, then children against root and themselves."""
    roots = bucket.families * bucket.root_width
    cut = [part.split([roots, part.shape[1] - roots], 1) for part in (q, k, v)]  # one split: its gradient is written once, without zeros
    root = _Part(*(part.unflatten(1, (bucket.families, bucket.root_width)) for part, _ in cut))
    out = _roots(root, scoring).flatten(1, 2)
    if not bucket.children:
        return out
    shape = (bucket.families, bucket.children, bucket.child_width)
    child = _Part(*(part.unflatten(1, shape) for _, part in cut))
    blocked = _blocked(bucket, scoring.window, q.device)
    fused = bucket.root_width + bucket.child_width > MOST_EXPLICIT_KEYS and not scoring.softcap
    under = (_children_fused if fused else _children_explicit)(child, root, blocked, scoring)
    return torch.cat([out, under.flatten(1, 3)], 1)


def _roots(root: _Part, scoring: Scoring) -> Tensor:
    """Causal attention within each root."""
    width, window = root.q.shape[2], scoring.window
    if width > MOST_EXPLICIT_KEYS // 2 and not scoring.softcap:
        banded = bool(window) and window < width
        mask = ~_out_of_sight(width, window, root.q.device) if banded else None
        q, k, v = (part.transpose(0, 1) for part in (root.q, root.k, root.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not banded, scale=scoring.scale).transpose(0, 1)
    q, k, v = (part.flatten(0, 1) for part in (root.q, root.k, root.v))
    blocked = _minus_infinity(_out_of_sight(width, window, q.device), q.dtype).expand(len(q), width, width)
    return (_products(q, k, blocked, scoring).softmax(-1).to(v.dtype) @ v).unflatten(0, root.q.shape[:2])


def _children_explicit(child: _Part, root: _Part, blocked: tuple[Tensor | None, Tensor], scoring: Scoring) -> Tensor:
    """Two products a query and one softmax over both; no key of a prompt is copied for its children. (N, G, K, R, D)."""
    heads, count, children, width = child.q.shape[:4]
    above = None
    if blocked[0] is not None:
        minus = _minus_infinity(blocked[0], child.q.dtype)[None, :, None]
        above = minus.expand(heads, count, children, width, -1).reshape(heads * count, children * width, -1)
    by_family = child.q.reshape(heads * count, children * width, -1)
    to_root = _products(by_family, root.k.flatten(0, 1), above, scoring)
    q, k, v = (part.flatten(0, 2) for part in (child.q, child.k, child.v))
    to_own = _products(q, k, _minus_infinity(blocked[1], q.dtype).expand(len(q), width, width), scoring)
    weights = torch.cat([to_root, to_own.view(heads * count, children * width, width)], -1).softmax(-1).to(v.dtype)
    of_root, of_own = weights.split([root.k.shape[2], width], -1)
    mixed = of_root @ root.v.flatten(0, 1)
    return (mixed + (of_own.reshape(len(q), width, width) @ v).view_as(mixed)).unflatten(1, (children, width)).unflatten(0, (heads, count))


def _children_fused(child: _Part, root: _Part, blocked: tuple[Tensor | None, Tensor], scoring: Scoring) -> Tensor:
    """As `_children_explicit`, by one fused kernel that never holds the products; a prompt's keys are copied for each child."""
    _, count, children, width = child.q.shape[:4]
    keys, values = (
        torch.cat([above[:, :, None].expand(-1, -1, children, -1, -1), own], 3).flatten(1, 2).transpose(0, 1)
        for above, own in ((root.k, child.k), (root.v, child.v))
    )
    above = blocked[0] if blocked[0] is not None else torch.zeros((1, 1, root.k.shape[2]), dtype=torch.bool, device=keys.device)
    hidden = torch.cat([above.expand(-1, width, -1), blocked[1].expand(len(above), -1, -1)], -1)
    if len(hidden) > 1:
        hidden = hidden[:, None].expand(-1, children, -1, -1).flatten(0, 1)
    queries = child.q.flatten(1, 2).transpose(0, 1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=~hidden[:, None], scale=scoring.scale)
    return out.transpose(0, 1).unflatten(1, (count, children))


def _products(q: Tensor, k: Tensor, blocked: Tensor | None, scoring: Scoring) -> Tensor:
    """(B, L, D) x (B, S, D) -> (B, L, S), `blocked` (0 or minus infinity) added."""
    if scoring.softcap:
        products = scoring.softcap * torch.tanh(torch.bmm(q, k.mT) * (scoring.scale / scoring.softcap))
        return products if blocked is None else products + blocked
    if blocked is None:
        return torch.bmm(q * scoring.scale, k.mT)
    return torch.baddbmm(blocked, q, k.mT, alpha=scoring.scale)


def _blocked(bucket: Bucket, window: int, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Which keys a child's query may not see: of the root (G, 1 or R, P) or None if it sees all, and of its own child (R, R)."""
    keys = torch.arange(bucket.root_width, device=device)
    lengths = bucket.root_lengths.to(device)[:, None, None]
    blocked = None if bucket.even_roots else keys >= lengths
    if window and window < bucket.root_width + bucket.child_width:
        too_far = lengths + torch.arange(bucket.child_width, device=device)[:, None] - keys >= window
        blocked = too_far if blocked is None else blocked | too_far
    return blocked, _out_of_sight(bucket.child_width, window, device)


def _out_of_sight(width: int, window: int, device: torch.device) -> Tensor:
    """(width, width): keys after the query, or `window` or more before it."""
    places = torch.arange(width, device=device)
    distance = places[:, None] - places
    return (distance < 0) | (distance >= window) if window else distance < 0


def _minus_infinity(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill(blocked, float("-inf"))


_flex: list[Callable[..., Any]] = []


def _compiled() -> Callable[..., Any]:
    if not _flex:
        _flex.append(torch.compile(flex_attention, dynamic=True))
    return _flex[0]


def flex_tree_attention(attend: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *, tree: Tree, scoring: Scoring) -> Tensor:
    """`tree_attention` by FlexAttention. `attend` is `flex_attention`, compiled or not."""
    softcap = scoring.softcap

    def cap(score: Tensor, _b: Tensor, _h: Tensor, _q: Tensor, _k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return attend(
        query,
        key,
        value,
        score_mod=cap if softcap else None,
        block_mask=_block_mask(tree, scoring.window),
        scale=scoring.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


def _block_mask(tree: Tree, window: int) -> BlockMask:
    """Made once for all layers of a forward pass, and kept with the tree."""
    if window not in tree.block_masks:
        segment, parent, positions = (part.int() for part in (tree.segment, tree.parent, tree.positions))
        oldest = positions - window

        def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            # Comparisons alone: the mask is made whole, and a (T, T) difference of numbers would take eight times its memory.
            visible = ((segment[key] == segment[query]) | (segment[key] == parent[query])) & (positions[key] <= positions[query])
            return visible & (positions[key] > oldest[query]) if window else visible

        tree.block_masks[window] = create_block_mask(sees, None, None, len(segment), len(segment), device=segment.device)
    return tree.block_masks[window]
