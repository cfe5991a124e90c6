"""Causal attention with a learned sink, forward and exact backward, without a T x T tensor kept.

For each head, with scale `1 / sqrt(d)`, key 0 being the sink (score `sink_h`, value zero):

    P = softmax([sink_h, scale Q K^T masked to j <= i])        Y = P[1:] V
    dV = P^T dY     dS = P * (dY V^T - rowsum(dY * Y))     d sink_h = sum over rows of dS[sink]
    dQ = scale dS K     dK = scale dS^T Q

On the CPU the scores of a block of queries are made for many heads at once by batched products,
small enough to stay in the cache, and keys after the block's last query are never touched. With
heads of 16 channels that is twice as fast as PyTorch's flash kernel for CPUs, with 64 it is as fast
(docs/experiments.md). The sink is one more key, a row of K, and its score and the subtraction of
the row sums are one more channel of the products; so the softmax and the products do everything.
On a GPU PyTorch's own fused kernel does the work, see `SinkAttention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from sparse_transformer.model import ModelConfig

# Queries in a block: the keys of half a block are computed in vain, on average.
_QUERIES = 64
# Scores held at once: 4 MiB of float32, in each of two buffers.
_SCORES = 2**20


def causal_attention(qkv: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Each position attends to itself and to earlier ones, in every head separately.

    Args:
        qkv: `(B, T, 3, H, d)`, queries, keys and values; any strides.
        sinks: `(H,)`, the score of a key whose value is zero and which every query sees; or None.

    Returns:
        `(B, T, H, d)`, contiguous, in the dtype of qkv. On the CPU half precisions are computed in
        float32. Differentiable once.
    """
    if qkv.device.type == "cpu":
        y: Tensor = CausalAttention.apply(qkv, sinks)
        return y
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
    if sinks is None:
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif qkv.device.type == "cuda" and qkv.shape[4] % 8 == 0:
        y = SinkAttention.apply(q, k, v, sinks)
    else:
        y = attend(q, k, v, sinks)
    return y.transpose(1, 2).contiguous()


def cached_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The last T positions attend to all S of which keys and values are known; inference only.

    Args:
        q: `(B, T, H, d)`.
        k, v: `(B, H, S, d)`, S at least T.
        sinks: as for `causal_attention`.

    Returns:
        `(B, T, H, d)`.
    """
    return attend(q.transpose(1, 2), k, v, sinks).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """`(B, H, T, d)`, `(B, H, S, d)` twice, to `(B, H, T, d)`: the formula, plainly.

    The last T of S positions; any device, differentiable to any order, all T x S scores in memory.
    """
    T, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if T > 1:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([sink, scores], -1).softmax(-1)[..., 1:] @ v


class KVCache:
    """Keys and values of all layers for up to `config.context` tokens, allocated once.

    Args:
        config: of the model.
        batch: B.
        device, dtype: of the model's activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (config.n_layer, 2, batch, config.heads, config.context, config.d_head)
        self._kept = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes `(B, T, H, d)` each; returns all that the layer has, `(B, H, length + T, d)`.

        `length` is the caller's to advance, when every layer has appended.
        """
        end = self.length + k.shape[1]
        kept = self._kept[layer]
        kept[0, :, :, self.length : end] = k.transpose(1, 2)
        kept[1, :, :, self.length : end] = v.transpose(1, 2)
        return kept[0, :, :, :end], kept[1, :, :, :end]

    def reset(self) -> None:
        """Forgets everything."""
        self.length = 0


class CausalAttention(Function):
    """`causal_attention` on the CPU; its backward makes the probabilities anew from qkv."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sinks: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.sparse_transformer.attention(qkv, sinks)
        ctx.save_for_backward(qkv, sinks, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        qkv, sinks, y = ctx.saved_tensors
        grad, grad_sinks = torch.ops.sparse_transformer.attention_backward(qkv, sinks, y, grad_y)
        return grad, None if sinks is None else grad_sinks


class SinkAttention(Function):
    """Attention with sinks by a fused kernel that knows of none; `(B, H, T, d)` each.

    The kernel returns its result O and `L = log(sum(exp(scores)))`. With the sink in the sum,
    `L' = log(exp(L) + exp(sink))` and `Y = O exp(L - L')`. The kernel's backward, given Y and L' in
    place of O and L, makes the probabilities `exp(scores - L')` and is exact;
    `d sink_h = -sum(exp(sink_h - L') rowsum(dY * Y))`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        y, lse, *rest = _fused(q, k, v)
        # (B, H, at least T) in float32: the CUDA kernel pads T, with infinities.
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        y = y * torch.exp(lse - total)[..., : q.shape[2], None].to(y.dtype)
        ctx.save_for_backward(q, k, v, sinks, y, total, *rest)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        q, k, v, sinks, y, total, *rest = ctx.saved_tensors
        grads = _fused_backward(grad_y, q, k, v, y, total, rest)
        delta = (grad_y.to(total.dtype) * y).sum(-1)
        share = torch.exp(sinks.to(total.dtype)[:, None] - total[..., : q.shape[2]])
        return *grads, -(share * delta).sum((0, 2)).to(sinks.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """PyTorch's causal kernel: the result, the logarithms of the sums, what its backward needs."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return tuple(flash)
    efficient = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
    return tuple(efficient)


def _fused_backward(
    grad_y: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, rest: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    aten = torch.ops.aten
    if q.device.type == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, grad_k, grad_v = flash(grad_y, q, k, v, y, lse, 0.0, True)
        return grad_q, grad_k, grad_v
    efficient = aten._scaled_dot_product_efficient_attention_backward
    wanted = [True, True, True, False]
    found = efficient(grad_y, q, k, v, None, y, lse, *rest, 0.0, wanted, True)
    return found[0], found[1], found[2]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_first(part: Tensor, dtype: torch.dtype, extra: int = 0) -> Tensor:
    """`(B, T, H, d)` to a new `(B H, T, d + extra)`; what is extra is not written."""
    B, T, H, d = part.shape
    packed = torch.empty(B, H, T, d + extra, dtype=dtype)
    packed[..., :d] = part.transpose(1, 2)
    return packed.view(B * H, T, d + extra)


def _queries(q: Tensor, dtype: torch.dtype, sinks: Tensor | None) -> Tensor:
    """`(B H, T, d + 1)`, scaled; the last channel is 1 and meets the sink's score. Without: d."""
    packed = _heads_first(q, dtype, extra=int(sinks is not None))
    if sinks is not None:
        packed[..., -1] = 1.0
    packed[..., : q.shape[3]].mul_(q.shape[3] ** -0.5)
    return packed


def _keys(k: Tensor, dtype: torch.dtype, sinks: Tensor | None) -> Tensor:
    """`(B H, 1 + T, d + 1)`: the sink first, its score in the last channel. Without: as is."""
    if sinks is None:
        return _heads_first(k, dtype)
    B, T, H, d = k.shape
    packed = torch.zeros(B, H, T + 1, d + 1, dtype=dtype)
    packed[..., 0, d] = sinks.to(dtype)
    packed[:, :, 1:, :d] = k.transpose(1, 2)
    return packed.view(B * H, T + 1, d + 1)


def _values(v: Tensor, dtype: torch.dtype, sinks: Tensor | None, ones: bool) -> Tensor:
    """`(B H, 1 + T, d)`, the sink's zeros first; with `ones`, one more channel of ones."""
    B, T, H, d = v.shape
    first = int(sinks is not None)
    packed = torch.empty(B, H, T + first, d + int(ones), dtype=dtype)
    packed[:, :, :first, :d] = 0.0
    packed[:, :, first:, :d] = v.transpose(1, 2)
    if ones:
        packed[..., d] = 1.0
    return packed.view(B * H, T + first, d + int(ones))


def _blocks(heads: int, T: int, first: int) -> Iterator[tuple[int, int, int, int, int]]:
    """What is computed at once: heads `n:m`, queries `a:b`, keys `:s`, sink included."""
    for a in range(0, T, _QUERIES):
        b = min(a + _QUERIES, T)
        s = b + first
        step = max(1, min(heads, _SCORES // ((b - a) * s)))
        for n in range(0, heads, step):
            yield n, min(n + step, heads), a, b, s


def _buffer_size(heads: int, T: int, first: int) -> int:
    return max(((m - n) * (b - a) * s for n, m, a, b, s in _blocks(heads, T, first)), default=0)


def _probabilities(scores: Tensor, queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """`(C, Q, S)` in the memory of `scores`: softmax of the block's scores, causally masked."""
    torch.bmm(queries, keys.transpose(1, 2), out=scores)
    Q = queries.shape[1]
    scores[..., -Q:].add_(mask[:Q, :Q])
    return torch.softmax(scores, -1, out=scores)


def _causal_mask(dtype: torch.dtype) -> Tensor:
    return torch.full((_QUERIES, _QUERIES), -torch.inf, dtype=dtype).triu_(1)


@torch.autocast("cpu", enabled=False)
def _forward(qkv: Tensor, sinks: Tensor | None) -> Tensor:
    B, T, _, H, d = qkv.shape
    dtype, first = _wide(qkv.dtype), int(sinks is not None)
    q, k, v = qkv.unbind(2)
    queries, keys = _queries(q, dtype, sinks), _keys(k, dtype, sinks)
    values = _values(v, dtype, sinks, ones=False)
    heads_first = torch.empty(B * H, T, d, dtype=dtype)
    memory = torch.empty(_buffer_size(B * H, T, first), dtype=dtype)
    mask = _causal_mask(dtype)
    for n, m, a, b, s in _blocks(B * H, T, first):
        scores = memory[: (m - n) * (b - a) * s].view(m - n, b - a, s)
        p = _probabilities(scores, queries[n:m, a:b], keys[n:m, :s], mask)
        heads_first[n:m, a:b] = torch.bmm(p, values[n:m, :s])
    y = torch.empty(B, T, H, d, dtype=qkv.dtype)
    return y.copy_(heads_first.view(B, H, T, d).transpose(1, 2))


@torch.autocast("cpu", enabled=False)
def _backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    B, T, _, H, d = qkv.shape
    dtype, first = _wide(qkv.dtype), int(sinks is not None)
    q, k, v = qkv.unbind(2)
    queries, keys = _queries(q, dtype, sinks), _keys(k, dtype, sinks)
    values = _values(v, dtype, sinks, ones=True)
    # The last channel subtracts rowsum(dY * Y) from every dY V^T, the sink's included.
    cotangents = _heads_first(grad_y, dtype, extra=1)
    cotangents[..., d] = (cotangents[..., :d] * _heads_first(y, dtype)).sum(-1).neg_()
    grad_q = torch.empty(B * H, T, d, dtype=dtype)
    grad_k = torch.zeros(B * H, T + first, d, dtype=dtype)
    grad_v = torch.zeros(B * H, T + first, d, dtype=dtype)
    grad_sinks = torch.zeros(B * H, dtype=dtype) if first else None
    size = _buffer_size(B * H, T, first)
    memory, memory2 = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype)
    mask = _causal_mask(dtype)
    for n, m, a, b, s in _blocks(B * H, T, first):
        shape, used = (m - n, b - a, s), (m - n) * (b - a) * s
        p = _probabilities(memory[:used].view(shape), queries[n:m, a:b], keys[n:m, :s], mask)
        grad_s = memory2[:used].view(shape)
        grad_block = cotangents[n:m, a:b]
        torch.bmm(grad_block, values[n:m, :s].transpose(1, 2), out=grad_s)
        grad_s.mul_(p)
        grad_q[n:m, a:b] = torch.bmm(grad_s, keys[n:m, :s, :d])
        grad_k[n:m, :s] += torch.bmm(grad_s.transpose(1, 2), queries[n:m, a:b, :d])
        grad_v[n:m, :s] += torch.bmm(p.transpose(1, 2), grad_block[..., :d])
        if grad_sinks is not None:
            grad_sinks[n:m] += grad_s[..., 0].sum(1)
    grad_q.mul_(d**-0.5)
    grad = torch.empty(B, T, 3, H, d, dtype=qkv.dtype)
    for i, part in enumerate((grad_q, grad_k[:, first:], grad_v[:, first:])):
        grad[:, :, i] = part.view(B, H, T, d).transpose(1, 2)
    if grad_sinks is None or sinks is None:
        return grad, grad.new_empty(0)
    return grad, grad_sinks.view(B, H).sum(0).to(sinks.dtype)


def _fake_forward(qkv: Tensor, sinks: Tensor | None) -> Tensor:
    B, T, _, H, d = qkv.shape
    return qkv.new_empty(B, T, H, d)


def _fake_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    grad_sinks = qkv.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return qkv.new_empty(qkv.shape), grad_sinks


# As operations of their own: torch.compile then sees one node in place of all the blocks.
_library = torch.library.Library("sparse_transformer", "DEF")
for _name, _schema, _run, _fake in (
    ("attention", "(Tensor qkv, Tensor? sinks) -> Tensor", _forward, _fake_forward),
    (
        "attention_backward",
        "(Tensor qkv, Tensor? sinks, Tensor y, Tensor grad_y) -> (Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
):
    _library.define(_name + _schema)
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"sparse_transformer::{_name}", _fake, lib=_library)
