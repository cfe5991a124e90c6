"""Every operation in plain PyTorch: the specification, and a backend like the others.

It computes in float64, slowly and accurately, and reads only the blocks that exist: an input that
no block reads changes nothing, even if it is NaN. Each function takes two-dimensional inputs of any
strides and returns a contiguous result in their dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_kernels.checks import (
    FLOAT_DTYPES,
    check_fan_in,
    check_geometry,
    check_has_values,
    check_strided,
    check_tensor,
    wide_dtype,
)
from sparse_kernels.layout import FanInLayout, Problem, check_layout


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if problem.dtype not in FLOAT_DTYPES:
        return f"reference needs float32, bfloat16, float16 or float64, got {problem.dtype}"
    return None


def to_dense(values: Tensor, layout: FanInLayout) -> Tensor:
    """`W (N, K)` with its zeros, from the kept blocks; differentiable in `values`.

    `W[r * block_out + a, indices[r, f] * block_in + b] = values[r, f, a, b]`.

    Args:
        values: `layout.values_shape`, any dtype, on the layout's device.
        layout: which blocks exist.

    Raises:
        TypeError: a wrong type. ValueError: a wrong shape or device.
    """
    check_layout("layout", layout)
    dtype = check_strided("values", values).dtype
    check_tensor("values", values, layout.values_shape, dtype, layout.device)
    block_out, block_in = layout.block
    dense = values.new_zeros(layout.block_rows, layout.block_cols, block_out, block_in)
    rows = torch.arange(layout.block_rows, device=values.device).unsqueeze(1)
    dense = dense.index_put((rows, layout.indices.long()), values)
    return dense.transpose(1, 2).reshape(layout.out_features, layout.in_features)


def from_dense(
    weight: Tensor, fan_in: int, block: tuple[int, int] = (1, 1)
) -> tuple[FanInLayout, Tensor]:
    """The layout of the largest-magnitude blocks of each block-row, and their values.

    Blocks are compared by their L2 norm in float64, for `(1, 1)` by `|w|`; among equals the lowest
    index stays. The result is the closest fixed-fan-in matrix in the L2 norm.

    Args:
        weight: `W (N, K)`, floating point, without NaN.
        fan_in: inputs kept by each output in elements, a multiple of `block_in`, at most `K`.
        block: `(block_out, block_in)`, dividing `(N, K)`.

    Returns:
        `(layout, values)`; values of `layout.values_shape`, contiguous, detached, in the dtype and
        on the device of `weight`.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape or size, or a NaN.
    """
    check_strided("weight", weight)
    if not weight.is_floating_point():
        raise TypeError(f"weight must have a floating-point dtype, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(
            f"weight must have two dimensions (out_features, in_features), "
            f"got shape {tuple(weight.shape)}"
        )
    check_has_values("weight", weight)
    weight = weight.detach()
    out_features, in_features = weight.shape
    block_out, block_in = check_geometry(out_features, in_features, block)
    count = check_fan_in(fan_in, in_features, block_in)
    blocks = weight.reshape(out_features // block_out, block_out, -1, block_in)
    norms = torch.linalg.vector_norm(blocks.double(), dim=(1, 3))  # (R, C)
    if norms.isnan().any():
        raise ValueError("weight must not hold NaN: magnitudes cannot be compared with it")
    order = norms.sort(dim=1, descending=True, stable=True).indices
    layout = FanInLayout(
        order[:, :count].sort(dim=1).values, in_features, out_features, (block_out, block_in)
    )
    return layout, gather(weight, layout)


def gather(dense: Tensor, layout: FanInLayout) -> Tensor:
    """`values (R, F, block_out, block_in)` from `W (N, K)`: the elements at the kept blocks."""
    blocks = dense.reshape(layout.block_rows, layout.block[0], layout.block_cols, layout.block[1])
    rows = torch.arange(layout.block_rows, device=dense.device).unsqueeze(1)
    return blocks.transpose(1, 2)[rows, layout.indices.long()].contiguous()


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x `(M, K)`, values `(R, F, ...)`, bias `(N,)` -> `(M, N)`."""
    block_out, block_in = layout.block
    blocks = x.double().unflatten(1, (layout.block_cols, block_in))
    y = blocks.new_zeros(x.shape[0], layout.block_rows, block_out)
    for slot, columns in enumerate(layout.indices.long().unbind(1)):
        y += _products(blocks[:, columns], values[:, slot].transpose(1, 2))
    return _finish(y, bias, x.dtype)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: grad_output `(M, N)`, bias `(K,)` -> `(M, K)`.

    It is the forward product of a fixed-fan-out layer, hence the bias.
    """
    block_out, block_in = layout.block
    blocks = grad_output.double().unflatten(1, (layout.block_rows, block_out))
    grad = blocks.new_zeros(grad_output.shape[0], layout.block_cols, block_in)
    for slot, columns in enumerate(layout.indices.long().unbind(1)):
        grad.index_add_(1, columns, _products(blocks, values[:, slot]))
    return _finish(grad, bias, grad_output.dtype)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: grad_output `(M, N)`, x `(M, K)` -> values' shape."""
    with torch.autocast(x.device.type, enabled=False):
        return gather(grad_output.double().t() @ x.double(), layout).to(x.dtype)


def _products(blocks: Tensor, weights: Tensor) -> Tensor:
    """Of each block-row: blocks `(M, R, i)`, weights `(R, i, o)` -> `(M, R, o)`."""
    # Autocast would compute the products in half precision again.
    with torch.autocast(blocks.device.type, enabled=False):
        return torch.bmm(blocks.transpose(0, 1), weights.double()).transpose(0, 1)


def _finish(sums: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.flatten(1)
    return (y if bias is None else y + bias.double()).to(dtype)


def bias_grad(grad_output: Tensor) -> Tensor:
    """The gradient of a bias: `(M, N)` -> `(N,)`, accumulated in float32 at least."""
    wide = wide_dtype(grad_output.dtype)
    return grad_output.sum(0, dtype=wide).to(grad_output.dtype)


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keeps the `k` largest `|x|` of each row of x `(M, D)`, zero elsewhere.

    Among equals the lowest index stays. NaN counts as the largest, as in `torch.topk`.
    """
    order = x.abs().sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(x, dtype=torch.bool).scatter_(1, order[:, :k], True)
    return torch.where(kept, x, 0).contiguous()


def pack(y: Tensor, x: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """The places where y `(M, D)` is not zero, and what x `(M, D)` has there.

    Returns `bits`, int64 `(M, ceil(D / 64))`: bit `i % 64` of word `i // 64` of a row belongs to
    its entry i; and `values (M, room)`: the entries of x at those places, in order. Each row has at
    most `room` of them; behind them the row has no meaning.
    """
    rows, width = y.shape
    words = -(-width // 64)
    kept = torch.zeros(rows, words * 64, dtype=torch.bool, device=y.device)
    kept[:, :width] = y != 0
    weights = 1 << torch.arange(64, device=y.device)
    bits = (kept.view(rows, words, 64) * weights).sum(2)
    order = (~kept[:, :width]).to(torch.int8).sort(dim=1, stable=True).indices[:, :room]
    values = x.new_zeros(rows, room)
    values[:, :width] = x.gather(1, order)
    return bits, values


def unpack(values: Tensor, bits: Tensor, width: int, of_gelu: bool) -> Tensor:
    """`y (M, width)` from `pack(y, y)`, or if `of_gelu` from `pack(y, x)` where y is GELU of x."""
    kept = is_kept(bits, width)
    entries = _gelu(values) if of_gelu else values
    places = (kept.cumsum(1) - 1).clamp_(0, values.shape[1] - 1)
    return torch.where(kept, entries.gather(1, places), 0).contiguous()


def is_kept(bits: Tensor, width: int) -> Tensor:
    """The bits of `pack` as bools, `(M, width)`."""
    shifts = torch.arange(64, device=bits.device)
    return (bits[:, :, None] >> shifts & 1).flatten(1)[:, :width].bool()


def abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """y of `abs_topk`, and the bits of `pack(y, y, 0)`."""
    y = abs_topk(x, k)
    return y, pack(y, y, 0)[0]


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`dX = dY` where the result `y` of `abs_topk` is not zero, zero elsewhere; all `(M, D)`.

    In place of y its bits do, as `pack` makes them.
    """
    kept = is_kept(y, grad_output.shape[1]) if y.dtype == torch.int64 else y != 0
    return torch.where(kept, grad_output, 0).contiguous()


def gelu_abs_topk(x: Tensor, k: int) -> Tensor:
    """`abs_topk(gelu(x), k)` of x `(M, D)`, `gelu(x) = x P(X <= x)`, X standard normal."""
    return abs_topk(_gelu(x), k)


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x.double()).to(x.dtype)


def gelu_abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """y of `gelu_abs_topk`, and `pack(y, x, k)`."""
    y = gelu_abs_topk(x, k)
    return y, *pack(y, x, k)


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`dX = dY (P(X <= x) + x p(x))` where the result `y` is not zero, zero elsewhere."""
    wide = x.double()
    slope = torch.special.ndtr(wide) + wide * torch.exp(-0.5 * wide**2) / math.sqrt(2 * math.pi)
    return torch.where(y != 0, grad_output.double() * slope, 0).to(x.dtype).contiguous()


def gelu_abs_topk_packed_backward(grad_output: Tensor, bits: Tensor, values: Tensor) -> Tensor:
    """`gelu_abs_topk_backward` from the results of `gelu_abs_topk_packed`."""
    width = grad_output.shape[1]
    x, kept = unpack(values, bits, width, of_gelu=False), is_kept(bits, width)
    return gelu_abs_topk_backward(grad_output, kept, x)


def norm_abs_topk(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor]:
    """`abs_topk(n * weight, k)` of x `(M, D)`, `n = x s`, `s = 1 / sqrt(mean(x^2) + eps)`.

    Returns the result, and s `(M,)`.
    """
    scales = torch.rsqrt(x.double().square().mean(1) + eps)
    y = abs_topk((x.double() * scales[:, None] * weight.double()).to(x.dtype), k)
    return y, scales.to(wide_dtype(x.dtype))


def norm_abs_topk_packed(
    x: Tensor, weight: Tensor, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and scales of `norm_abs_topk`, and `pack(y, y, k)`."""
    y, scales = norm_abs_topk(x, weight, k, eps)
    return y, scales, *pack(y, y, k)


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight from the results of `norm_abs_topk`.

    With h = dY where y is not zero, elsewhere 0, and `g = h * weight`:
    `dX = s (g - n mean(g n))`, `dweight = sum over M of h n`.
    """
    h = torch.where(y != 0, grad_output.double(), 0)
    scale = scales.double()[:, None]
    n, g = x.double() * scale, h * weight.double()
    grad = scale * (g - n * (g * n).mean(1, keepdim=True))
    return grad.to(x.dtype).contiguous(), (h * n).sum(0).to(weight.dtype)


def norm_abs_topk_packed_backward(
    grad_output: Tensor, bits: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """`norm_abs_topk_backward` from the results of `norm_abs_topk_packed`."""
    return norm_abs_topk_backward(grad_output, is_kept(bits, x.shape[1]), x, weight, scales)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention of the last T of S positions, and the logarithm of each row's sum.

    With scores `z_ij = q_i k_j / sqrt(d)` for `j <= S - T + i` and a key of score `sinks[h]` and
    value zero, `Y = softmax(z) V` and `lse_i = log(exp(sinks[h]) + sum_j exp(z_ij))`.

    `(B, T, H, d)`, `(B, S, H, d)` twice, `(H,)` -> `(B, T, H, d)`, `(B, H, T)`.
    """
    with torch.autocast(q.device.type, enabled=False):
        z = _scores(q, k)
        lse = z.logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.double()[:, None])
        y = torch.exp(z - lse[..., None]) @ v.double().transpose(1, 2)
        wide = wide_dtype(q.dtype)
        return y.transpose(1, 2).to(q.dtype).contiguous(), lse.to(wide)


def attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv `(B, T, 3, H, d)` and of sinks from the results of `attention`.

    With `P_ij = exp(z_ij - lse_i)` and `D_i = dY_i Y_i`: `dV = P^T dY`,
    `dz = P * (dY V^T - D)`, `dQ = dz K / sqrt(d)`, `dK = dz^T Q / sqrt(d)`, and
    `d sinks[h] = -sum over B and i of exp(sinks[h] - lse_i) D_i`. Empty where there are no sinks.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = qkv.double().permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        g = grad_y.double().transpose(1, 2)
        p = torch.exp(_scores(*qkv.unbind(2)[:2]) - lse.double()[..., None])  # (B, H, T, T)
        share = (g * y.double().transpose(1, 2)).sum(-1)  # (B, H, T)
        grad_z = p * (g @ v.transpose(2, 3) - share[..., None]) * q.shape[3] ** -0.5
        grads = (grad_z @ k, grad_z.transpose(2, 3) @ q, p.transpose(2, 3) @ g)
        grad = torch.stack(grads, 2).permute(0, 3, 2, 1, 4).to(qkv.dtype).contiguous()
        if sinks is None:
            return grad, grad.new_empty(0)
        at_sink = torch.exp(sinks.double()[:, None] - lse.double())
        return grad, -(at_sink * share).sum((0, 2)).to(sinks.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """`(B, H, T, S)`, minus infinity where the last T of S positions may not look."""
    T, S = q.shape[1], k.shape[1]
    z = q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) * q.shape[3] ** -0.5
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    return z.masked_fill(hidden, -torch.inf)
