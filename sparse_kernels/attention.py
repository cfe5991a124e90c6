"""Causal attention with a learned sink: what a sparse model's step is mostly made of on a CPU.

Not a sparse product, and on GPUs PyTorch's own fused kernels serve; on CPUs these take three times
as long for heads of 16 channels (docs/experiments.md). So there are kernels for CPUs alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sparse_kernels import backends, ops, reference
from sparse_kernels.checks import CPU_DTYPES, check_float, check_like, refuse_jit_trace
from sparse_kernels.layout import Problem


class CausalAttention(Function):
    """`causal_attention`; the backward recomputes the probabilities from qkv and lse."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sinks: Tensor | None, backend: str) -> Tensor:
        q, k, v = qkv.unbind(2)
        y, lse = ops.attention(q, k, v, sinks, backend)
        ctx.save_for_backward(qkv, sinks, y, lse)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        qkv, sinks, y, lse = ctx.saved_tensors
        grad, grad_sinks = ops.attention_backward(qkv, sinks, y, lse, grad_y, ctx.backend)
        return grad, None if sinks is None else grad_sinks, None


def causal_attention(
    qkv: Tensor, sinks: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Each position attends to itself and to earlier ones, in every head separately.

    With scores `z_ij = q_i k_j / sqrt(d)` for `j <= i` and, if there are sinks, one more key of
    score `sinks[h]` whose value is zero: `Y = softmax(z) V`. No tensor of T x T scores is kept.

    Args:
        qkv: `(B, T, 3, H, d)`, queries, keys and values; any strides; float32, bfloat16 (computed
            in float32) or float64.
        sinks: `(H,)` in the dtype of qkv, or None.
        backend: "reference" or "cpu"; by default the fastest that can run this.

    Returns:
        `(B, T, H, d)`, contiguous, in the dtype of qkv. Differentiable once.

    Raises:
        TypeError: an argument is no Tensor of such a dtype, or `backend` no str.
        ValueError: a shape, or the device of `sinks`, does not fit; or an unknown backend.
        RuntimeError: no backend, or not the one asked for, can run this; it says why.

    Source: Dao et al. 2022 (arXiv:2205.14135) for the backward; Xiao et al. 2023
    (arXiv:2309.17453) and OpenAI's gpt-oss for sinks.
    """
    refuse_jit_trace()
    check_float("qkv", qkv, CPU_DTYPES)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv must be (B, T, 3, H, d), d at least 1, got {tuple(qkv.shape)}")
    _check_sinks(sinks, "qkv", qkv, qkv.shape[3])
    name = backends.choose(Problem(qkv.device.type, qkv.dtype, "attention"), backend)
    if ops.is_transformed():  # the kernel has a backward and no other derivative
        q, k, v = qkv.unbind(2)
        return reference.attention(q, k, v, sinks)[0]
    y: Tensor = CausalAttention.apply(qkv, sinks, name)
    return y


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """`causal_attention` of the last T of S positions, whose keys and values are all known.

    For inference: gradients are refused, not lost.

    Args:
        q: `(B, T, H, d)`, any strides.
        k: `(B, S, H, d)`, S at least T, any strides.
        v: like `k`.
        sinks: as for `causal_attention`.
        backend: as for `causal_attention`.

    Returns:
        `(B, T, H, d)`, contiguous.

    Raises:
        RuntimeError: gradients are enabled and an argument requires one; otherwise as for
            `causal_attention`.
    """
    for label, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(label, tensor, CPU_DTYPES)
        if tensor.dim() != 4 or tensor.shape[3] == 0:
            raise ValueError(
                f"{label} must have 4 dimensions, the last at least 1, got {tuple(tensor.shape)}"
            )
        check_like(label, tensor, q, "q")
    B, T, H, d = q.shape
    S = k.shape[1]
    if k.shape != v.shape or k.shape != (B, S, H, d) or T > S:
        raise ValueError(
            f"k and v must be ({B}, S, {H}, {d}) with S at least {T}, got {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    _check_sinks(sinks, "q", q, H)
    learned = any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, sinks))
    if torch.is_grad_enabled() and learned:
        raise RuntimeError("cached_attention has no gradient: call it under torch.no_grad()")
    name = backends.choose(Problem(q.device.type, q.dtype, "attention"), backend)
    if ops.is_transformed():
        return reference.attention(q, k, v, sinks)[0]
    return ops.attention(q, k, v, sinks, name)[0]


def _check_sinks(sinks: Tensor | None, name: str, like: Tensor, heads: int) -> None:
    if sinks is None:
        return
    check_float("sinks", sinks, CPU_DTYPES)
    if sinks.shape != (heads,):
        raise ValueError(f"sinks must be ({heads},), one of each head, got {tuple(sinks.shape)}")
    check_like("sinks", sinks, like, name)
