"""The AbsTopK activation: keeps the entries of largest magnitude of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sparse_kernels import backends, kept, ops
from sparse_kernels.checks import check_float, check_int, refuse_jit_trace


class AbsTopk(Function):
    """`Y = X * kept(X)` for a two-dimensional x; saves only the result for backward."""

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
        return ops.apply(KeptGradient, grads[0], y.detach(), ctx.backend), None, None

    @staticmethod
    def jvp_rule(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor) -> Tensor:
        (y,) = saved
        grad: Tensor = ops.apply(KeptGradient, tangents[0], y.detach(), ctx.backend)
        return grad


class PackedAbsTopk(Function):
    """The same, but saves the bits of the result; for the CPU, where no rule is recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, backend: str) -> Tensor:
        y, bits = ops.abs_topk_packed(x, k, backend)
        ctx.save_for_backward(bits)
        ctx.backend = backend
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return ops.apply(KeptGradient, grads[0], bits, ctx.backend), None, None


class KeptGradient(Function):
    """`dX = dY * (Y != 0)`: linear in dY with a constant mask, hence its own derivative.

    y is the result of AbsTopK, or its bits.
    """

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
        return ops.apply(KeptGradient, grads[0], y, ctx.backend), None, None

    @staticmethod
    def jvp_rule(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor | None) -> Tensor:
        (y,) = saved
        if tangents[0] is None:  # only the mask has a tangent, and it is constant
            return torch.zeros_like(y)
        grad: Tensor = ops.apply(KeptGradient, tangents[0], y, ctx.backend)
        return grad


def abs_topk(x: Tensor, k: int, backend: str | None = None) -> Tensor:
    """`y_i = x_i` if `|x_i|` is among the `k` largest of its row, else `0`.

    Among equal magnitudes the lowest index stays; NaN counts as larger than infinity, as in
    `torch.topk`. The gradient of x is the gradient of y where y is not zero, and zero elsewhere.
    Derivatives of any order exist.

    Args:
        x: `(..., D)`, any strides, any number of leading dimensions, empty ones included; float32,
            bfloat16 or float64, on a GPU also float16. Autocast does not change its dtype.
        k: how many entries of the last axis stay, from 1 to D.
        backend: "reference", "cpu", ..., by default the fastest that can run this.

    Returns:
        `(..., D)`, contiguous, in the dtype of x. Backward saves one bit for each entry of
        the result on the CPU; on a GPU, compiled or transformed, it saves the result.

    Raises:
        TypeError: the type of an argument or the dtype of x is wrong.
        ValueError: x has no last axis, `k` is not from 1 to its size, or `backend` is unknown.
        RuntimeError: no backend, or not the one asked for, can run this; it says why.

    Source: Gao et al. 2025, "Weight-sparse transformers have interpretable circuits",
    arXiv:2511.13653 (AbsTopK).
    """
    name = choose_backend(x, k, backend)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    learns = ops.is_differentiated(x)
    if not learns:
        y: Tensor = ops.abs_topk(rows, k, name)
    elif kept.is_packed(name):
        y = PackedAbsTopk.apply(rows, k, name)
    else:
        y = ops.apply(AbsTopk, rows, k, name)
    return y.view(x.shape)


def choose_backend(x: Tensor, k: int, backend: str | None) -> str:
    """The backend that runs this; checks the arguments as `abs_topk` describes."""
    refuse_jit_trace()
    check_float("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape ()")
    if check_int("k", k) > x.shape[-1]:
        raise ValueError(f"k must be at most {x.shape[-1]}, the last axis of x, got {k}")
    return backends.choose_for(x, "abs_topk", backend)
