"""The differentiable products: two autograd Functions, each the other's derivative.

`Y = X W^T` is bilinear in `X` and `W`. Its gradients are again products over the same layout, so
each backward calls the other Function (or itself, transposed) and gradients of any order exist.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_leaves

from sparse_kernels import backends, checks, cpu, kept, ops
from sparse_kernels.layout import FanInLayout, Layout, check_layout


class Spmm(Function):
    """`Y = X W^T (+ b)`, or `Y = X W (+ b)` when `transpose`; two-dimensional x and y."""

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: Layout,
        backend: str,
        transpose: bool,
    ) -> Tensor:
        return ops.spmm(x, values, layout, bias, backend, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, values, _, ctx.layout, ctx.backend, ctx.transpose = inputs
        needs_x, needs_values = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_values else None, values if needs_x else None)
        if ops.is_transformed():
            ctx.save_for_forward(x, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, values = ctx.saved_tensors
        layout, backend, transpose = ctx.layout, ctx.backend, ctx.transpose
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.apply(Spmm, grad, values, None, layout, backend, not transpose)
        if ctx.needs_input_grad[1]:
            outputs, inputs = (x, grad) if transpose else (grad, x)
            grad_values = ops.apply(Sddmm, outputs, inputs, layout, backend)
        if ctx.needs_input_grad[2]:
            grad_bias = ops.apply(BiasGrad, grad, backend)
        return grad_x, grad_values, grad_bias, None, None, None

    @staticmethod
    def jvp_rule(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor | None) -> Tensor:
        x, values = saved
        dx, dvalues, dbias = tangents[:3]
        where = (ctx.layout, ctx.backend, ctx.transpose)
        terms = []
        if dx is not None:
            terms.append(ops.apply(Spmm, dx, values, None, *where))
        if dvalues is not None:
            terms.append(ops.apply(Spmm, x, dvalues, None, *where))
        if dbias is not None:
            terms.append(dbias.expand(x.shape[0], -1))
        return sum(terms[1:], terms[0])

    @staticmethod
    def vmap_rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        *where: Any,
    ) -> tuple[Tensor, int]:
        if in_dims[0] is not None and not any(
            isinstance(dim, int) for dim in tree_leaves(in_dims[1:])
        ):  # one matrix: a batch is more tokens
            samples = x.movedim(in_dims[0], 0)
            y = ops.apply(Spmm, samples.flatten(0, 1), values, bias, *where)
            return y.unflatten(0, samples.shape[:2]), 0
        each = functools.partial(ops.apply, Spmm)
        return ops.map_samples(each, info, in_dims, x, values, bias, *where)


class Sddmm(Function):
    """`dW = dY^T X` at the kept blocks; two-dimensional grad_output and x."""

    @staticmethod
    def forward(grad_output: Tensor, x: Tensor, layout: Layout, backend: str) -> Tensor:
        return ops.grad_weight(grad_output, x, layout, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, x, ctx.layout, ctx.backend = inputs
        needs_grad_output, needs_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad_output if needs_x else None, x if needs_grad_output else None)
        if ops.is_transformed():
            ctx.save_for_forward(grad_output, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        grad_output, x = ctx.saved_tensors
        layout, backend = ctx.layout, ctx.backend
        grad_grad_output = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad_output = ops.apply(Spmm, x, grad, None, layout, backend, False)
        if ctx.needs_input_grad[1]:
            grad_x = ops.apply(Spmm, grad_output, grad, None, layout, backend, True)
        return grad_grad_output, grad_x, None, None

    @staticmethod
    def jvp_rule(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor | None) -> Tensor:
        grad_output, x = saved
        dgrad_output, dx = tangents[:2]
        terms = []
        if dgrad_output is not None:
            terms.append(ops.apply(Sddmm, dgrad_output, x, ctx.layout, ctx.backend))
        if dx is not None:
            terms.append(ops.apply(Sddmm, grad_output, dx, ctx.layout, ctx.backend))
        return sum(terms[1:], terms[0])


class BiasGrad(Function):
    """The gradient of a bias, `(M, N)` -> `(N,)`."""

    @staticmethod
    def forward(grad_output: Tensor, backend: str) -> Tensor:
        return ops.bias_grad(grad_output, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, ctx.backend = inputs
        ctx.tokens = grad_output.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].expand(ctx.tokens, -1), None

    @staticmethod
    def jvp_rule(ctx: Any, saved: Sequence[Tensor], *tangents: Tensor) -> Tensor:
        y: Tensor = ops.apply(BiasGrad, tangents[0], ctx.backend)
        return y


def sparse_linear(
    x: Tensor,
    values: Tensor,
    layout: FanInLayout,
    bias: Tensor | None = None,
    backend: str | None = None,
    *,
    transpose: bool = False,
) -> Tensor:
    """`Y = X W^T + b` for the fixed-fan-in block-sparse `W (N, K)`; differentiable to any order.

    Args:
        x: `(..., K)`, any strides, any number of leading dimensions, empty ones included.
        values: `layout.values_shape`, the elements of the kept blocks of `W`.
        layout: which blocks of `W` exist.
        bias: `(N,)` or None.
        backend: "reference", "cpu", "triton" or "cuda", by default the fastest that can run this.
        transpose: multiply by `W` in place of `W^T`: x is then `(..., N)`, the result `(..., K)`
            and bias `(K,)`. That is the forward of a fixed-fan-out layer.

    x, values and bias share one device and one dtype: float32, bfloat16 or float64, on a GPU also
    float16. bfloat16 accumulates in float32 at least. Under autocast they are cast to autocast's
    dtype first, as for `torch.nn.functional.linear`; float64 is left as it is.

    Returns:
        `(..., N)`, contiguous, in the dtype of x.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or backend name; the
            message names the argument, what it got and what it needs.
        RuntimeError: no backend, or not the one asked for, can run this; it says why.
    """
    check_layout("layout", layout)
    checks.check_type("transpose", transpose, bool, "a bool")
    return linear(x, values, layout, bias, backend, transpose)


def try_linear(
    x: Tensor,
    values: Tensor | None,
    layout: object,
    bias: Tensor | None,
    backend: str | None,
    transpose: bool,
    indices: Tensor | None = None,
) -> Tensor | None:
    """`sparse_linear` at once if nothing about the call is special, else None; see `cpu.try_spmm`.

    The checks and the dispatcher of `linear` take longer than the product of one token. With
    `indices` it is also None unless these are the layout's.
    """
    if (
        (backend is None or backend == "cpu")
        and isinstance(layout, FanInLayout)
        and ops.is_idle()
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
    ):
        return cpu.try_spmm(x, values, layout, bias, transpose, indices)
    return None


def linear(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None,
    backend: str | None,
    transpose: bool,
) -> Tensor:
    """`sparse_linear`; while tracing, `layout` may be a `Pattern`."""
    made = try_linear(x, values, layout, bias, backend, transpose)
    if made is not None:
        return made
    checks.refuse_jit_trace()
    if torch._C._is_any_autocast_enabled():
        x, values = _autocast("x", x), _autocast("values", values)
        bias = None if bias is None else _autocast("bias", bias)
    checks.check_spmm(x, values, layout, bias, transpose)
    name = backends.choose_for(x, "grad_input" if transpose else "forward", backend, layout)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if ops.is_differentiated(x, values, bias):
        with kept.saving(tokens):
            y: Tensor = ops.apply(Spmm, tokens, values, bias, layout, name, transpose)
    else:
        y = ops.spmm(tokens, values, layout, bias, name, transpose)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def grad_weight(
    grad_output: Tensor, x: Tensor, layout: FanInLayout, backend: str | None = None
) -> Tensor:
    """`dW = dY^T X` at the blocks of any `layout`, also of connections that do not exist.

    Rewiring uses it to score the connections that a layer could grow. Differentiable.

    Args:
        grad_output: `(..., N)`, any strides.
        x: `(..., K)`, the same leading dimensions, dtype and device. Autocast does not change them.
        layout: of the `(N, K)` matrix. For a fan-out layer, whose layout is that of `W^T`, the two
            tensors change places.
        backend: as for `sparse_linear`.

    Returns:
        `layout.values_shape`, accumulated in float32 at least.

    Raises:
        TypeError, ValueError, RuntimeError: as for `sparse_linear`.
    """
    check_layout("layout", layout)
    checks.refuse_jit_trace()
    checks.check_sddmm(grad_output, x, layout)
    name = backends.choose_for(x, "grad_weight", backend, layout)
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad_output, x)]
    values: Tensor = ops.apply(Sddmm, *rows, layout, name)
    return values


def _autocast(name: str, tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype, if that is on for its device."""
    device = checks.check_is_tensor(name, tensor).device.type
    if (
        tensor.is_meta  # a device that autocast does not know
        or tensor.dtype == torch.float64
        or not tensor.is_floating_point()
        or not torch.is_autocast_enabled(device)
    ):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
