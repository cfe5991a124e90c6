"""What a transformer needs beside sparse products: fused AbsTopK, attention, cross-entropy.

These are single passes over memory: at small density they take more time than the products
(docs/experiments.md). The `triton` backend calls PyTorch's operations in turn; on GPUs attention
has `torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sparse_kernels import backends, cpu, kept, ops, reference
from sparse_kernels.checks import (
    CPU_DTYPES,
    FLOAT_DTYPES,
    check_attention,
    check_float,
    check_tensor,
    refuse_jit_trace,
    split_heads,
    wide_dtype,
)
from sparse_kernels.topk import abs_topk, choose_backend

# Logits whose softmax is made at once by PyTorch: 4 MiB of float32 on a CPU.
_LOGITS = {"cpu": 2**20, "cuda": 2**26}


class GeluAbsTopk(Function):
    """`abs_topk(gelu(X))`; saves x where the result is not zero, or on a GPU x and the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, backend: str) -> Tensor:
        ctx.backend = backend
        if backend not in backends.PACKED:
            y: Tensor = ops.gelu_abs_topk(x, k, backend)
            ctx.save_for_backward(y, x)
            return y
        y, bits, values = ops.gelu_abs_topk_packed(x, k, backend)
        ctx.save_for_backward(bits, values)
        kept.attach(y, bits, values, of_gelu=True, backend=backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.backend in backends.PACKED
        run = ops.gelu_abs_topk_packed_backward if packed else ops.gelu_abs_topk_backward
        return run(grad_output, *ctx.saved_tensors, ctx.backend), None, None


class NormAbsTopk(Function):
    """`abs_topk(rms_norm(X) * weight)`; saves x, the scale of each row and the result's bits.

    On a GPU the result in the place of its bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, k: int, eps: float, backend: str) -> Tensor:
        ctx.backend = backend
        y: Tensor
        if backend not in backends.PACKED:
            y, scales = ops.norm_abs_topk(x, weight, k, eps, backend)
            ctx.save_for_backward(y, x, weight, scales)
            return y
        y, scales, bits, values = ops.norm_abs_topk_packed(x, weight, k, eps, backend)
        ctx.save_for_backward(bits, x, weight, scales)
        kept.attach(y, bits, values, of_gelu=False, backend=backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        packed = ctx.backend in backends.PACKED
        run = ops.norm_abs_topk_packed_backward if packed else ops.norm_abs_topk_backward
        return *run(grad_output, *ctx.saved_tensors, ctx.backend), None, None, None


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


def gelu_abs_topk(x: Tensor, k: int, backend: str | None = None) -> Tensor:
    """`abs_topk(gelu(x), k)` with the exact GELU, `gelu(x) = x P(X <= x)`, X standard normal.

    The `cpu` and `cuda` backends make one pass over memory and are differentiable once; `triton`
    calls `torch.nn.functional.gelu` and then its `abs_topk`.

    Args, Returns, Raises: as for `abs_topk`. The gradient is that of `abs_topk` times `gelu'(x)`.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU); Gao et al. 2025, arXiv:2511.13653.
    """
    name = choose_backend(x, k, backend)
    if name not in backends.FUSED or ops.is_transformed():
        return abs_topk(torch.nn.functional.gelu(x), k, name)
    learns = ops.is_differentiated(x)
    run = GeluAbsTopk.apply if learns else ops.gelu_abs_topk
    y: Tensor = run(x.reshape(-1, x.shape[-1]), k, name)
    return y.view(x.shape)


def rms_norm_abs_topk(
    x: Tensor, weight: Tensor, k: int, eps: float, backend: str | None = None
) -> Tensor:
    """`abs_topk(x / sqrt(mean(x^2) + eps) * weight, k)` over the last axis.

    The `cpu` and `cuda` backends make one pass over memory and are differentiable once; `triton`
    calls `torch.nn.functional.rms_norm` and then its `abs_topk`. The norm is computed in float32 at
    least and rounded to the dtype of x before the choice.

    Args:
        x: as for `abs_topk`.
        k: as for `abs_topk`.
        backend: as for `abs_topk`.
        weight: `(D,)` in the dtype of x.
        eps: at least 0, added to the mean of the squares.

    Returns, Raises: as for `abs_topk`; ValueError also for a `weight` or `eps` that does not fit.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm); Gao et al. 2025, arXiv:2511.13653.
    """
    name = choose_backend(x, k, backend)
    check_tensor("weight", weight, x.shape[-1:], x.dtype, x.device)
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if name not in backends.FUSED or ops.is_transformed():
        return abs_topk(torch.nn.functional.rms_norm(x, weight.shape, weight, eps), k, name)
    arguments = x.reshape(-1, x.shape[-1]), weight, k, eps, name
    learns = ops.is_differentiated(x, weight)
    y: Tensor = NormAbsTopk.apply(*arguments) if learns else ops.norm_abs_topk(*arguments)[0]
    return y.view(x.shape)


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
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or backend name.
        RuntimeError: no backend, or not the one asked for, can run this; it says why.

    Source: Dao et al. 2022 (arXiv:2205.14135) for the backward; Xiao et al. 2023
    (arXiv:2309.17453) and OpenAI's gpt-oss for sinks.
    """
    refuse_jit_trace()
    check_float("qkv", qkv, CPU_DTYPES)
    q, k, v = split_heads(qkv)
    check_attention(q, k, v, sinks)
    name = backends.choose_for(qkv, "attention", backend)
    if ops.is_transformed():  # the kernel has a backward and no other derivative
        return reference.attention(q, k, v, sinks)[0]
    y: Tensor = CausalAttention.apply(qkv, sinks, name)
    return y


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """`causal_attention` of the last T of S positions, given the keys and values of all.

    For inference: it has no gradient.

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
    check_float("q", q, CPU_DTYPES)
    check_attention(q, k, v, sinks)
    learned = any(tensor is not None and tensor.requires_grad for tensor in (q, k, v, sinks))
    if torch.is_grad_enabled() and learned:
        raise RuntimeError("cached_attention has no gradient: call it under torch.no_grad()")
    name = backends.choose_for(q, "attention", backend)
    if ops.is_transformed():
        return reference.attention(q, k, v, sinks)[0]
    return ops.attention(q, k, v, sinks, name)[0]


def token_losses_(
    logits: Tensor, targets: Tensor, bigram: Tensor | None, tokens: Tensor, scale: float
) -> Tensor:
    """The cross-entropy of each token, and its gradient IN THE MEMORY OF `logits`.

    With `z_m = logits_m + bigram[tokens_m]`: `loss_m = logsumexp(z_m) - z_m[targets_m]`. Unless
    `scale` is 0, `logits_m` becomes `scale (softmax(z_m) - onehot(targets_m))`, which counts as a
    write. Not differentiable itself.

    Args:
        logits: `(M, V)`, contiguous, without gradient.
        targets: int64 `(M,)`, in `[0, V)`.
        bigram: `(U, V)` or None, what is added for each current token.
        tokens: int64 `(M,)`, in `[0, U)` where there is a bigram table.
        scale: of the gradient.

    Returns:
        `(M,)` in float32, or float64 if the logits are.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device; the message names it.
        IndexError: a target or token out of range.
    """
    check_float("logits", logits, FLOAT_DTYPES)
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits must be (M, V) and contiguous, got {tuple(logits.shape)}")
    if logits.requires_grad:
        raise ValueError("logits must not require a gradient: pass logits.detach()")
    (M, V), wide, device = logits.shape, wide_dtype(logits.dtype), logits.device
    check_tensor("targets", targets, (M,), torch.int64, device)
    check_tensor("tokens", tokens, (M,), torch.int64, device)
    if bigram is not None:
        check_float("bigram", bigram, FLOAT_DTYPES)
        check_tensor("bigram", bigram, (len(bigram), V), bigram.dtype, device)
    # On a GPU the check would wait for the device, which makes its own.
    plain = logits.is_cpu and ops.is_plain(logits, targets, bigram, tokens)
    if plain:
        _check_range("targets", targets, V)
        if bigram is not None:
            _check_range("tokens", tokens, len(bigram))
    if (
        plain
        and logits.dtype in CPU_DTYPES
        and cpu.is_available()
        and (bigram is None or (bigram.dtype == wide and bigram.is_contiguous()))
    ):
        return cpu.token_losses_(logits, targets, bigram, tokens, scale)
    losses = torch.empty(M, dtype=wide, device=device)
    rows = max(1, _LOGITS.get(device.type, 2**26) // max(1, V))
    for start in range(0, M, rows):
        part = slice(start, start + rows)
        target = targets[part].unsqueeze(1)
        z = logits[part].to(wide)
        if bigram is not None:
            z = z + bigram[tokens[part]]
        log_p = torch.log_softmax(z, -1)
        losses[part] = log_p.gather(1, target).squeeze(1).neg_()
        if scale:
            p = log_p.exp_()
            p.scatter_add_(1, target, p.new_full((), -1.0).expand(target.shape))
            logits[part] = p.mul_(scale)
    return losses


def _check_range(name: str, numbers: Tensor, end: int) -> None:
    """Raises IndexError unless all `numbers` are in `[0, end)`."""
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise IndexError(
            f"{name} must lie in [0, {end}), got {int(numbers.min())} to {int(numbers.max())}"
        )
