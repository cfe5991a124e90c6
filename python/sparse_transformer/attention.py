"""Causal attention with a learned sink on every device, and the cache of keys and values.

On the CPU the kernels of sparse_kernels do the work. On a GPU PyTorch's own fused kernel does, to
which `FusedAttention` adds the sink.
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
# What PyTorch's memory-efficient kernel has, and how many entries it reads at a time.
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED = 8
# It masks later positions (1), and has neither a bias nor sequences of several lengths.
_CAUSAL: dict[str, Any] = {"custom_mask_type": 1, "dropout_p": 0.0}
_CAUSAL |= dict.fromkeys(("bias", "cu_seqlens_q", "cu_seqlens_k"))


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
    if qkv.device.type == "cuda" and _can_be_fused(qkv):
        y: Tensor = FusedAttention.apply(_aligned(qkv), sinks)
        return y
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
    return attend(q, k, v, sinks).transpose(1, 2).contiguous()


def _can_be_fused(qkv: Tensor) -> bool:
    return qkv.dtype in _FUSED_DTYPES and qkv.shape[4] % _ALIGNED == 0 and qkv.numel() > 0


def _aligned(qkv: Tensor) -> Tensor:
    """qkv, or a copy if the kernel could not read its strides or where it starts."""
    # The compiler copies what does not start aligned.
    offset = 0 if torch.compiler.is_compiling() else qkv.storage_offset()
    *strides, last = qkv.stride()
    is_aligned = last == 1 and all(step % _ALIGNED == 0 for step in (offset, *strides))
    return qkv if is_aligned else qkv.clone(memory_format=torch.contiguous_format)


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


class FusedAttention(Function):
    """Attention by PyTorch's memory-efficient kernel, which knows of no sinks.

    The kernel returns its result O and `L = log(sum(exp(scores)))`. With the sink in the sum,
    `L' = log(exp(L) + exp(sink))` and `Y = O exp(L - L')`. The kernel's backward, given Y and L' in
    place of O and L, makes the probabilities `exp(scores - L')` and is exact;
    `d sink_h = -sum(exp(sink_h - L') rowsum(dY * Y))`.

    Of PyTorch's kernels it is the one whose backward is deterministic on request: without splits
    of the keys, whose parts of dQ are added in the order in which they come.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sinks: Tensor | None) -> Tensor:
        T, kernel = qkv.shape[1], torch.ops.aten._efficient_attention_forward
        sizes = {"max_seqlen_q": T, "max_seqlen_k": T, "compute_log_sumexp": True}
        y, lse, *rest = kernel(*qkv.unbind(2), **_CAUSAL, **sizes)[:4]
        if sinks is not None:
            # (B, H, at least T) in float32: the kernel pads T, with infinities.
            total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
            share = torch.exp(lse - total)[..., :T]
            scaled = y * share.transpose(1, 2)[..., None]  # in float32, contiguous as y is
            # Compiled by PyTorch 2.11, a result that is another name of an intermediate one, as
            # after `to` in float32 or an operation in place, would have a gradient of zero.
            y = scaled if scaled.dtype == y.dtype else scaled.to(y.dtype)
            lse = total
        ctx.save_for_backward(qkv, sinks, y, lse, *rest)
        result: Tensor = y
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor | None]:
        qkv, sinks, y, lse, seed, offset = ctx.saved_tensors
        T, kernel = qkv.shape[1], torch.ops.aten._efficient_attention_backward
        sizes = {"max_seqlen_q": T, "max_seqlen_k": T, "num_splits_key": 1}
        made = {"out": y, "logsumexp": lse, "philox_seed": seed, "philox_offset": offset}
        more = {"bias_requires_grad": False}
        grads = kernel(grad_y, *qkv.unbind(2), **_CAUSAL, **sizes, **made, **more)[:3]
        grad_sinks = None
        if sinks is not None:
            delta = (grad_y.to(lse.dtype) * y).sum(3).transpose(1, 2)  # (B, H, T)
            share = torch.exp(sinks.to(lse.dtype)[:, None] - lse[..., :T])
            grad_sinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
        return torch.stack(grads, 2), grad_sinks
