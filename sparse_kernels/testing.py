"""Seeded problems and the bound on errors that tests and benchmarks share.

A result is accurate if it is at most twice as far from a float64 dense reference as PyTorch's own
dense operation on the same inputs in the same dtype, plus one rounding of the largest
value. The distance is the largest one of all elements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_kernels import reference
from sparse_kernels.layout import FanInLayout

# Rows of a large result that are compared: enough to meet every tile, few enough for float64.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class MatmulCase:
    """Inputs of the three products over one layout, all in one dtype, and the dense results.

    The two biases are those of the `forward` and of the `grad_input` product, or None.
    """

    layout: FanInLayout
    x: Tensor  # (M, K)
    values: Tensor  # layout.values_shape
    bias: Tensor | None  # (N,)
    grad_output: Tensor  # (M, N)
    input_bias: Tensor | None  # (K,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every input."""
        return self.x.dtype

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """`W (N, K)` with its zeros, in the case's dtype or another."""
        return reference.to_dense(self.values, self.layout).to(dtype or self.dtype)

    def reference64(self, product: str) -> Tensor:
        """The dense result of `product` in float64, from the inputs as they are rounded."""
        return self._dense(product, torch.float64)

    def torch_dense(self, product: str) -> Tensor:
        """What PyTorch's dense operation makes of `product` in the case's dtype."""
        return self._dense(product, self.dtype)

    def _dense(self, product: str, dtype: torch.dtype) -> Tensor:
        grad_output, x = self.grad_output.to(dtype), self.x.to(dtype)
        if product == "forward":
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(x, self.dense_weight(dtype), bias)
        if product == "grad_input":
            bias = None if self.input_bias is None else self.input_bias.to(dtype)
            return torch.nn.functional.linear(grad_output, self.dense_weight(dtype).t(), bias)
        if product == "grad_weight":
            return reference.gather(grad_output.t() @ x, self.layout)
        raise ValueError(f"product must be forward, grad_input or grad_weight, got {product!r}")


def make_problem(
    seed: int,
    tokens: int,
    in_features: int,
    out_features: int,
    fan_in: int,
    block: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> MatmulCase:
    """A random layout, random inputs and random cotangents; the same for the same arguments.

    Args:
        seed: of the generator that everything is drawn from, on the CPU.
        tokens, in_features, out_features: `M`, `K`, `N`.
        fan_in, block: as for `FanInLayout.random`.
        dtype: of all inputs, drawn in float64 and rounded.
        bias: False leaves both biases out.
        device: where the case is moved to.

    The weights have variance `1 / fan_in`, so that results are of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = FanInLayout.random(
        out_features, in_features, fan_in, block, generator=generator, device="cpu"
    )

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(dtype).to(device)

    values = draw(*layout.values_shape) / fan_in**0.5
    return MatmulCase(
        layout=layout.to(device),
        x=draw(tokens, in_features),
        values=values,
        bias=draw(out_features) if bias else None,
        grad_output=draw(tokens, out_features),
        input_bias=draw(in_features) if bias else None,
    )


def max_error(actual: Tensor, reference64: Tensor) -> float:
    """The largest distance from the reference over all elements; infinite where NaN meets a number.

    Infinities and NaNs that the reference has in the same places count as no distance.
    """
    if actual.shape != reference64.shape:
        raise ValueError(
            f"actual must have the shape of the reference {tuple(reference64.shape)}, "
            f"got {tuple(actual.shape)}"
        )
    if actual.numel() == 0:
        return 0.0
    wide = actual.detach().double()
    truth = reference64.detach().double()
    same = (wide == truth) | (wide.isnan() & truth.isnan())
    distance = torch.where(same, 0.0, (wide - truth).abs())
    return float(distance.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def allowed_error(torch_dense: Tensor, reference64: Tensor) -> float:
    """Twice PyTorch's own error, plus the rounding of the largest value in the tested dtype.

    In float64 the reference is itself PyTorch's result, whose own error cannot be seen; there the
    allowance is 64 roundings of the largest value.
    """
    finite = reference64[reference64.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    rounding = torch.finfo(torch_dense.dtype).eps * largest
    if torch_dense.dtype == torch.float64:
        return 64.0 * rounding
    return 2.0 * max_error(torch_dense, reference64) + rounding


@dataclass(frozen=True)
class Accuracy:
    """Errors, for products relative to the largest element in float64, and the verdict."""

    error: float
    torch_error: float
    correct: bool
    checked: str


def check_product(case: MatmulCase, product: str, result: Tensor) -> Accuracy:
    """Compares some rows of a result, each of them whole, with float64 and torch's dense product.

    They are tokens, or for `grad_weight` output features, spread evenly from the first to the last.
    """
    is_gradient = product == "grad_weight"
    tokens, layout = len(case.x), case.layout
    total, group = (layout.block_rows, layout.block[0]) if is_gradient else (tokens, 1)
    count = min(total, max(1, CHECKED_ROWS // group))
    rows = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()
    if is_gradient:
        features = (rows[:, None] * group + torch.arange(group)).flatten()
        part = replace(
            case,
            layout=FanInLayout(
                layout.indices[rows], layout.in_features, len(features), layout.block
            ),
            values=case.values[rows],
            grad_output=case.grad_output[:, features],
        )
        checked = f"{len(features)} of {layout.out_features} output features"
    else:
        part = replace(case, x=case.x[rows], grad_output=case.grad_output[rows])
        checked = f"{len(rows)} of {tokens} tokens"
    truth, stock = part.reference64(product), part.torch_dense(product)
    error = max_error(result[rows], truth)
    largest = max(max_error(torch.zeros_like(truth), truth), torch.finfo(torch.float64).tiny)
    return Accuracy(
        error=min(error, sys.float_info.max) / largest,
        torch_error=max_error(stock, truth) / largest,
        correct=error <= allowed_error(stock, truth),
        checked=checked,
    )
