"""Every operation in plain PyTorch: the specification, and a backend like the others.

It forms the dense matrix and computes in float64, so it is slow, large and accurate. Each function
takes two-dimensional inputs of any strides and returns a contiguous result in their dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.layout import FanInLayout, Problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if problem.dtype not in _DTYPES:
        return f"reference needs float32, bfloat16, float16 or float64, got {problem.dtype}"
    return None


def to_dense(values: Tensor, layout: FanInLayout) -> Tensor:
    """`W (N, K)` from `values (R, F, block_out, block_in)`: the kept blocks, zero elsewhere."""
    block_out, block_in = layout.block
    dense = values.new_zeros(layout.block_rows, layout.block_cols, block_out, block_in)
    rows = torch.arange(layout.block_rows, device=values.device).unsqueeze(1)
    dense[rows, layout.indices.long()] = values
    return dense.transpose(1, 2).reshape(layout.out_features, layout.in_features)


def gather(dense: Tensor, layout: FanInLayout) -> Tensor:
    """`values (R, F, block_out, block_in)` from `W (N, K)`: the elements at the kept blocks."""
    blocks = dense.reshape(layout.block_rows, layout.block[0], layout.block_cols, layout.block[1])
    rows = torch.arange(layout.block_rows, device=dense.device).unsqueeze(1)
    return blocks.transpose(1, 2)[rows, layout.indices.long()].contiguous()


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x `(M, K)`, values `(R, F, ...)`, bias `(N,)` -> `(M, N)`."""
    return _affine(x, to_dense(values, layout).t(), bias)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: grad_output `(M, N)`, bias `(K,)` -> `(M, K)`.

    It is the forward product of a fixed-fan-out layer, hence the bias.
    """
    return _affine(grad_output, to_dense(values, layout), bias)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: grad_output `(M, N)`, x `(M, K)` -> values' shape."""
    with torch.autocast(x.device.type, enabled=False):
        return gather(grad_output.double().t() @ x.double(), layout).to(x.dtype)


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    # Autocast would compute the products in half precision again.
    with torch.autocast(x.device.type, enabled=False):
        y = x.double() @ matrix.double()
        if bias is not None:
            y = y + bias.double()
        return y.to(x.dtype)


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keeps the `k` largest `|x|` of each row of x `(M, D)`, zero elsewhere.

    Among equals the lowest index stays. NaN counts as the largest, as in `torch.topk`.
    """
    order = x.abs().sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :k], True)
    return torch.where(kept, x, 0).contiguous()


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`dX = dY` where the result `y` of `abs_topk` is not zero, zero elsewhere; all `(M, D)`."""
    return torch.where(y != 0, grad_output, 0).contiguous()


def schedule_shapes(
    out_features: int, in_features: int, blocks_per_row: int, block: tuple[int, int], product: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of `build_schedule`'s result: this backend needs none."""
    return []


def build_schedule(layout: FanInLayout, product: str) -> tuple[Tensor, ...]:
    """Tensors that the products want derived from the layout: this backend needs none."""
    return ()
