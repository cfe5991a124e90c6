"""The AbsTopK activation: of each row, the entries of largest magnitude stay as they are.

`gelu_abs_topk` and `rms_norm_abs_topk` are AbsTopK after GELU and after RMSNorm, as a
weight-sparse transformer has them: in one pass over memory where there is a kernel for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sparse_kernels import backends, ops
from sparse_kernels.checks import check_float, check_int, check_is_tensor, refuse_jit_trace
from sparse_kernels.layout import Problem


class AbsTopk(Function):
    """`Y = X * kept(X)` for a two-dimensional x; the result itself is all that backward needs."""

    @staticmethod
    def forward(x: Tensor, k: int, backend: str) -> Tensor:
        return ops.abs_topk(x, k, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.backend = inputs
        ctx.save_for_backward(output)
        if ops.is_transformed():
            ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return _apply(KeptGradient, grads[0], y.detach(), ctx.backend), None, None


class KeptGradient(Function):
    """`dX = dY * (Y != 0)`: linear in dY with a constant mask, hence its own derivative."""

    @staticmethod
    def forward(grad_output: Tensor, y: Tensor, backend: str) -> Tensor:
        return ops.abs_topk_backward(grad_output, y, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, y, ctx.backend = inputs
        ctx.save_for_backward(y)
        if ops.is_transformed():
            ctx.save_for_forward(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return _apply(KeptGradient, grads[0], y, ctx.backend), None, None


class _AbsTopkWithTransforms(AbsTopk):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad: Tensor = _apply(KeptGradient, tangents[0], y.detach(), ctx.backend)
        return grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return ops.map_samples(_AbsTopkWithTransforms.apply, info, in_dims, *arguments)


class _KeptGradientWithTransforms(KeptGradient):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (y,) = ctx.saved_tensors
        if tangents[0] is None:  # the mask alone has a tangent, and it is constant
            return torch.zeros_like(y)
        grad: Tensor = _apply(KeptGradient, tangents[0], y, ctx.backend)
        return grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return ops.map_samples(_KeptGradientWithTransforms.apply, info, in_dims, *arguments)


def _apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`; see the same function of `matmul`."""
    with_transforms = {AbsTopk: _AbsTopkWithTransforms, KeptGradient: _KeptGradientWithTransforms}
    return (with_transforms[function] if ops.is_transformed() else function).apply(*arguments)


class GeluAbsTopk(Function):
    """`abs_topk(gelu(X))`; keeps x and the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, backend: str) -> Tensor:
        y = ops.gelu_abs_topk(x, k, backend)
        ctx.save_for_backward(x, y)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, y = ctx.saved_tensors
        return ops.gelu_abs_topk_backward(grad_output, y, x, ctx.backend), None, None


class NormAbsTopk(Function):
    """`abs_topk(rms_norm(X) * weight)`; keeps x, the result and a number of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, k: int, eps: float, backend: str) -> Tensor:
        y, scales = ops.norm_abs_topk(x, weight, k, eps, backend)
        ctx.save_for_backward(x, weight, y, scales)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, scales = ctx.saved_tensors
        grads = ops.norm_abs_topk_backward(grad_output, y, x, weight, scales, ctx.backend)
        return *grads, None, None, None


def abs_topk(x: Tensor, k: int, backend: str | None = None) -> Tensor:
    """`y_i = x_i` if `|x_i|` is among the `k` largest of its row, else `0`.

    Exact, not approximate. Among equal magnitudes the lowest index stays; NaN counts as larger than
    infinity, as in `torch.topk`. The gradient passes where `y` is not zero; a zero that was kept
    for want of anything larger has gradient zero (the function has no derivative there). It can be
    differentiated again.

    Args:
        x: `(..., D)`, any strides, any number of leading dimensions, empty ones included; float32,
            bfloat16 or float64, on a GPU also float16. Autocast does not change its dtype.
        k: how many entries of the last axis stay, from 1 to D.
        backend: "reference", "cpu", ..., by default the fastest that can run this.

    Returns:
        `(..., D)`, contiguous, in the dtype of x. The backward keeps this result and nothing else.

    Raises:
        TypeError: `x` is no Tensor of such a dtype, or `k` no int, or `backend` no str.
        ValueError: x has no last axis, `k` is not from 1 to its size, or `backend` is no backend's
            name.
        RuntimeError: no backend, or not the one asked for, can run this; it says why.

    Source: Gao et al. 2025, "Weight-sparse transformers have interpretable circuits",
    arXiv:2511.13653 (AbsTopK).
    """
    name = _chosen(x, k, backend)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    learns = ops.is_differentiated(x)
    y: Tensor = _apply(AbsTopk, rows, k, name) if learns else ops.abs_topk(rows, k, name)
    return y if x.dim() == 2 else y.view(x.shape)


def gelu_abs_topk(x: Tensor, k: int, backend: str | None = None) -> Tensor:
    """`abs_topk(gelu(x), k)` with the exact GELU, `gelu(x) = x P(X <= x)`, X standard normal.

    The `cpu` backend makes one pass over memory and is differentiable once; GPU backends call
    `torch.nn.functional.gelu` and then their `abs_topk`.

    Args, Returns, Raises: as for `abs_topk`. The gradient is that of `abs_topk` times `gelu'(x)`.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (GELU); Gao et al. 2025, arXiv:2511.13653.
    """
    name = _chosen(x, k, backend)
    if not backends.is_fused(name) or ops.is_transformed():
        return abs_topk(torch.nn.functional.gelu(x), k, name)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    learns = torch.is_grad_enabled() and x.requires_grad
    y: Tensor = GeluAbsTopk.apply(rows, k, name) if learns else ops.gelu_abs_topk(rows, k, name)
    return y if x.dim() == 2 else y.view(x.shape)


def rms_norm_abs_topk(
    x: Tensor, weight: Tensor, k: int, eps: float, backend: str | None = None
) -> Tensor:
    """`abs_topk(x / sqrt(mean(x^2) + eps) * weight, k)` over the last axis.

    The `cpu` backend makes one pass over memory and is differentiable once; GPU backends call
    `torch.nn.functional.rms_norm` and then their `abs_topk`. The norm is computed in float32 at
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
    name = _chosen(x, k, backend)
    check_is_tensor("weight", weight)
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be ({x.shape[-1]},), {x.dtype} on {x.device}, got {tuple(weight.shape)}, "
            f"{weight.dtype} on {weight.device}"
        )
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if not backends.is_fused(name) or ops.is_transformed():
        return abs_topk(torch.nn.functional.rms_norm(x, weight.shape, weight, eps), k, name)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = NormAbsTopk.apply(rows, weight, k, eps, name)
    else:
        y = ops.norm_abs_topk(rows, weight, k, eps, name)[0]
    return y if x.dim() == 2 else y.view(x.shape)


def _chosen(x: Tensor, k: int, backend: str | None) -> str:
    """The backend that runs this; raises what `abs_topk` says."""
    refuse_jit_trace()
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape ()")
    if check_int("k", k) > x.shape[-1]:
        raise ValueError(f"k must be at most {x.shape[-1]}, the last axis of x, got {k}")
    return backends.choose(Problem(x.device.type, x.dtype, "abs_topk"), backend)
