"""Causal attention with a learned sink on every device, and the cache of keys and values.

On the CPU the kernels of sparse_kernels do the work. On a GPU PyTorch's own fused kernel does, to
which `SinkAttention` adds the sink.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import sparse_kernels as sk
from sparse_transformer.config import ModelConfig

# What sk.transformer_ops.causal_attention has on the CPU.
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def causal_attention(qkv: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Each position attends to itself and to earlier ones, in every head separately.

    Args:
        qkv: `(B, T, 3, H, d)`, queries, keys and values; any strides.
        sinks: `(H,)`, the score of a key whose value is zero and which every query sees; or None.

    Returns:
        `(B, T, H, d)`, contiguous, in the dtype of qkv. Differentiable once.
    """
    if qkv.device.type == "cpu" and qkv.dtype in _CPU_DTYPES:
        return sk.transformer_ops.causal_attention(
            qkv, None if sinks is None else sinks.to(qkv.dtype)
        )
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

    q `(B, T, H, d)`; k and v `(B, S, H, d)`, S at least T; sinks as for `causal_attention`. To
    `(B, T, H, d)`.
    """
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES:
        return sk.transformer_ops.cached_attention(
            q, k, v, None if sinks is None else sinks.to(q.dtype)
        )
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), sinks).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """`(B, H, T, d)`, `(B, H, S, d)` twice, to `(B, H, T, d)`: the formula, plainly.

    The last T of S positions; any device, differentiable to any order, all T x S scores in memory.
    """
    return attention_pattern(attention_scores(q, k), sinks) @ v


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """`(B, H, T, d)`, `(B, H, S, d)` to `(B, H, T, S)`, minus infinity for later positions."""
    T, S = q.shape[2], k.shape[2]
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if T > 1:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def attention_pattern(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """`(B, H, T, S)` to the same: what is missing to 1 in a row goes to the sink."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([sink, scores], -1).softmax(-1)[..., 1:]


class KVCache:
    """Keys and values of all layers for up to `config.context` tokens of `batch` sequences.

    Allocated once; device and dtype are those of the model's activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # A head's positions are next to each other: each step reads them all.
        shape = (config.n_layer, 2, batch, config.heads, config.context, config.d_head)
        self._kept = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes `(B, T, H, d)` each; returns all that the layer has, `(B, length + T, H, d)`.

        `length` is the caller's to advance, when every layer has appended.
        """
        end = self.length + k.shape[1]
        kept = self._kept[layer].transpose(2, 3)  # (2, B, context, H, d)
        kept[0, :, self.length : end] = k
        kept[1, :, self.length : end] = v
        return kept[0, :, :end], kept[1, :, :end]

    def reset(self) -> None:
        """Forgets everything."""
        self.length = 0


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
