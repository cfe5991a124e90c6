"""The differentiable products: two autograd Functions, each the other's derivative.

`Y = X W^T` is bilinear in `X` and `W`. Its gradients are again products over the same layout, so
each backward calls the other Function (or itself, transposed) and gradients of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sparse_kernels import backends, checks, ops
from sparse_kernels.layout import FanInLayout


class SparseMatmul(Function):
    """`Y = X W^T (+ b)`, or `Y = X W (+ b)` when `transpose`; two-dimensional x and y."""

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        layout: FanInLayout | ops.Pattern,
        backend: str,
        transpose: bool,
    ) -> Tensor:
        product = ops.grad_input if transpose else ops.forward
        return product(x, values, layout, bias, backend)

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
            grad_x = _apply(SparseMatmul, grad, values, None, layout, backend, not transpose)
        if ctx.needs_input_grad[1]:
            outputs, inputs = (x, grad) if transpose else (grad, x)
            grad_values = _apply(SampledMatmul, outputs, inputs, layout, backend)
        if ctx.needs_input_grad[2]:
            grad_bias = _apply(SumTokens, grad, backend)
        return grad_x, grad_values, grad_bias, None, None, None


class SampledMatmul(Function):
    """`dW = dY^T X` at the kept blocks; two-dimensional grad_output and x."""

    @staticmethod
    def forward(
        grad_output: Tensor, x: Tensor, layout: FanInLayout | ops.Pattern, backend: str
    ) -> Tensor:
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
            grad_grad_output = _apply(SparseMatmul, x, grad, None, layout, backend, False)
        if ctx.needs_input_grad[1]:
            grad_x = _apply(SparseMatmul, grad_output, grad, None, layout, backend, True)
        return grad_grad_output, grad_x, None, None


class SumTokens(Function):
    """The gradient of a bias, `(M, N)` -> `(N,)`."""

    @staticmethod
    def forward(grad_output: Tensor, backend: str) -> Tensor:
        return ops.sum_tokens(grad_output, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad_output, ctx.backend = inputs
        ctx.tokens = grad_output.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].expand(ctx.tokens, -1), None


class _SparseMatmulWithTransforms(SparseMatmul):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, values = ctx.saved_tensors
        dx, dvalues, dbias = tangents[:3]
        where = (ctx.layout, ctx.backend, ctx.transpose)
        terms = []
        if dx is not None:
            terms.append(_apply(SparseMatmul, dx, values, None, *where))
        if dvalues is not None:
            terms.append(_apply(SparseMatmul, x, dvalues, None, *where))
        if dbias is not None:
            terms.append(dbias.expand(x.shape[0], -1))
        return ops.add_up(terms)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        *where: Any,
    ) -> tuple[Tensor, int]:
        if in_dims[1] is None and in_dims[2] is None:  # one matrix: a batch is more tokens
            samples = x.movedim(in_dims[0], 0)  # type: ignore[arg-type]
            y = _apply(SparseMatmul, samples.flatten(0, 1), values, bias, *where)
            return y.unflatten(0, samples.shape[:2]), 0
        return ops.map_samples(
            _SparseMatmulWithTransforms.apply, info, in_dims, x, values, bias, *where
        )


class _SampledMatmulWithTransforms(SampledMatmul):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        grad_output, x = ctx.saved_tensors
        dgrad_output, dx = tangents[:2]
        terms = []
        if dgrad_output is not None:
            terms.append(_apply(SampledMatmul, dgrad_output, x, ctx.layout, ctx.backend))
        if dx is not None:
            terms.append(_apply(SampledMatmul, grad_output, dx, ctx.layout, ctx.backend))
        return ops.add_up(terms)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return ops.map_samples(_SampledMatmulWithTransforms.apply, info, in_dims, *arguments)


class _SumTokensWithTransforms(SumTokens):
    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        y: Tensor = _apply(SumTokens, tangents[0], ctx.backend)
        return y

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        return ops.map_samples(_SumTokensWithTransforms.apply, info, in_dims, *arguments)


_WITH_TRANSFORMS: dict[type[Function], type[Function]] = {
    SparseMatmul: _SparseMatmulWithTransforms,
    SampledMatmul: _SampledMatmulWithTransforms,
    SumTokens: _SumTokensWithTransforms,
}


def _apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, with rules for forward mode and `torch.vmap` where one of them asks.

    torch.compile does not trace a Function that has a jvp, hence two classes of each.
    """
    return (_WITH_TRANSFORMS[function] if ops.is_transformed() else function).apply(*arguments)


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
        backend: one of the names in `available_backends`, by default the fastest that can run this.
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
    if not isinstance(layout, FanInLayout):
        raise TypeError(f"layout must be a FanInLayout, got {type(layout).__name__}")
    if not isinstance(transpose, bool):
        raise TypeError(f"transpose must be a bool, got {type(transpose).__name__}")
    checks.refuse_jit_trace()
    return linear(x, values, layout, bias, backend, transpose)


def linear(
    x: Tensor,
    values: Tensor,
    layout: FanInLayout | ops.Pattern,
    bias: Tensor | None,
    backend: str | None,
    transpose: bool,
) -> Tensor:
    """`sparse_linear`, which says more; while tracing, `layout` may be the `Pattern` of one."""
    _check(x, values, layout, bias, transpose)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, values = _autocast(x), _autocast(values)
        bias = None if bias is None else _autocast(bias)
    checks.check_float("x", x)
    if values.dtype != x.dtype:
        raise TypeError(f"values must have the dtype of x, {x.dtype}, got {values.dtype}")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
    product = "grad_input" if transpose else "forward"
    name = backends.choose_product(x, layout, product, backend)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if ops.is_differentiated(x, values, bias):
        y: Tensor = _apply(SparseMatmul, tokens, values, bias, layout, name, transpose)
    else:  # what autograd would record costs more than a product of few tokens
        y = (ops.grad_input if transpose else ops.forward)(tokens, values, layout, bias, name)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def grad_weight(
    grad_output: Tensor, x: Tensor, layout: FanInLayout, backend: str | None = None
) -> Tensor:
    """`dW = dY^T X` at the blocks of `layout` alone: the gradient of weights that need not exist.

    It is what rewiring asks about connections that a layer could grow. Differentiable.

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
    if not isinstance(layout, FanInLayout):
        raise TypeError(f"layout must be a FanInLayout, got {type(layout).__name__}")
    for name, tensor, width in (
        ("grad_output", grad_output, layout.out_features),
        ("x", x, layout.in_features),
    ):
        _check_tensor(name, tensor, layout)
        if tensor.dim() == 0 or tensor.shape[-1] != width:
            raise ValueError(
                f"{name} must have {width} as its last dimension, got shape {tuple(tensor.shape)}"
            )
    if x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"x must have the leading dimensions of grad_output {tuple(grad_output.shape[:-1])}, "
            f"got {tuple(x.shape[:-1])}"
        )
    checks.check_float("x", x)
    if grad_output.dtype != x.dtype:
        raise TypeError(f"grad_output must have the dtype of x, {x.dtype}, got {grad_output.dtype}")
    name = backends.choose_product(x, layout, "grad_weight", backend)
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (grad_output, x)]
    values: Tensor = _apply(SampledMatmul, *rows, layout, name)
    return values


def _autocast(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check(
    x: Tensor,
    values: Tensor,
    layout: FanInLayout | ops.Pattern,
    bias: Tensor | None,
    transpose: bool,
) -> None:
    """Types, devices and shapes of `sparse_linear`'s arguments."""
    _check_tensor("x", x, layout)
    _check_tensor("values", values, layout)
    outputs, inputs = layout.out_features, layout.in_features
    if transpose:
        outputs, inputs = inputs, outputs
    if x.dim() == 0 or x.shape[-1] != inputs:
        side = "out_features" if transpose else "in_features"
        raise ValueError(
            f"x must have the layout's {side} = {inputs} as its last dimension, "
            f"got shape {tuple(x.shape)}"
        )
    if values.shape != layout.values_shape:
        raise ValueError(
            f"values must have shape {layout.values_shape} (layout.values_shape), "
            f"got {tuple(values.shape)}"
        )
    if bias is not None:
        _check_tensor("bias", bias, layout)
        if bias.shape != (outputs,):
            raise ValueError(f"bias must have shape ({outputs},), got {tuple(bias.shape)}")


def _check_tensor(name: str, tensor: object, layout: FanInLayout | ops.Pattern) -> None:
    tensor = checks.check_is_tensor(name, tensor)
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be an ordinary strided tensor, got {tensor.layout}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}")
    if tensor.device != layout.device:
        raise ValueError(
            f"{name} must be on the layout's device {layout.device}, got {tensor.device}"
        )
