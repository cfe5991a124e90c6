"""`forward` and `grad_input`: each output block gathers the input blocks on its list.

One kernel serves both. `forward` walks the layout's own lists and multiplies by the transposed
blocks; `grad_input` walks the transposed lists and multiplies by the blocks as they are. Tokens are
rows of the tensor-core tile and features its columns, which suits blocks as narrow as 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.layout import FanInLayout
from sparse_kernels.triton import configs
from sparse_kernels.triton.launch import dot, launch_kernel, naming_errors, precision, rounded


@triton.jit
def spmm_kernel(
    x_ptr,  # (M, features): x, or grad_output where TRANSPOSED
    values_ptr,  # (R, F, block_out, block_in), contiguous
    bias_ptr,  # (num_rows * OUT,) where HAS_BIAS
    y_ptr,  # (M, num_rows * OUT), contiguous
    sources_ptr,  # int32, each entry's block of x: indices (R, F), or transposed.rows (R * F,)
    slots_ptr,  # int32 (R * F,), transposed.slots where TRANSPOSED
    offsets_ptr,  # int64 (num_rows + 1,), transposed.offsets where TRANSPOSED
    order_ptr,  # int32 (num_rows,), which row a program takes, where TRANSPOSED
    num_tokens,  # M
    num_rows,  # output blocks: R, or C where TRANSPOSED
    blocks_per_row,  # F
    stride_xm,
    stride_xk,
    OUT: tl.constexpr,  # features of an output block
    IN: tl.constexpr,  # features of an input block
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides every list's features
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that run together share a tile of tokens, which then stays in the L2 cache.
    pid = tl.program_id(0)
    row = pid % num_rows
    if TRANSPOSED:
        row = tl.load(order_ptr + row)
        first = tl.load(offsets_ptr + row)
        depth = (tl.load(offsets_ptr + row + 1) - first).to(tl.int32) * IN
    else:
        first = row.to(tl.int64) * blocks_per_row
        depth = blocks_per_row * IN

    offs_m = (pid // num_rows).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, OUT)
    tokens = offs_m < num_tokens
    x_rows = x_ptr + offs_m[:, None] * stride_xm
    sums = tl.zeros((BLOCK_M, OUT), dtype=tl.float32)
    # The list's features in a row: a step takes several narrow blocks, or a part of a wide one.
    RUN: tl.constexpr = IN if IN < BLOCK_K else BLOCK_K
    for k in range(0, depth, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        inside = offs_k < depth
        entries = first + offs_k // IN
        within = offs_k % IN
        # What the compiler cannot see in a gather: features come in aligned runs of a block.
        if EVEN_K:
            sources = tl.load(sources_ptr + entries)
        else:
            sources = tl.load(sources_ptr + entries, mask=inside, other=0)
        columns = tl.max_contiguous(tl.multiple_of(sources * IN + within, RUN), RUN)
        if TRANSPOSED:
            if EVEN_K:
                slots = tl.load(slots_ptr + entries)
            else:
                slots = tl.load(slots_ptr + entries, mask=inside, other=0)
            blocks = (sources.to(tl.int64) * blocks_per_row + slots) * (OUT * IN)
            w_ptrs = values_ptr + (blocks + within * OUT)[:, None] + offs_n[None, :]
        else:
            weights = entries * (OUT * IN) + within
            weights = tl.max_contiguous(tl.multiple_of(weights, RUN), RUN)
            w_ptrs = values_ptr + weights[:, None] + offs_n[None, :] * IN
        x_ptrs = x_rows + columns.to(tl.int64)[None, :] * stride_xk
        if EVEN_K:
            x = tl.load(x_ptrs, mask=tokens[:, None], other=0.0)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptrs)  # (BLOCK_K, OUT)
        else:
            x = tl.load(x_ptrs, mask=tokens[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        sums = dot(x, w, sums, PRECISION)

    if HAS_BIAS:
        sums += tl.load(bias_ptr + row * OUT + offs_n).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * num_rows * OUT + (row * OUT + offs_n)[None, :]
    tl.store(y_ptrs, rounded(sums, y_ptr.dtype.element_ty), mask=tokens[:, None])


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), values contiguous, to (M, N); arguments are checked already."""
    return _launch("forward", x, values, layout, bias, None)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None, order: Tensor
) -> Tensor:
    """`dX = dY W (+ b)`: grad_output (M, N), values contiguous, to (M, K).

    `order` (C,) int32 says which input block column each program takes.
    """
    return _launch("grad_input", grad_output, values, layout, bias, order)


def _launch(
    product: str,
    x: Tensor,
    values: Tensor,
    layout: FanInLayout,
    bias: Tensor | None,
    order: Tensor | None,
) -> Tensor:
    out, into = layout.block
    rows, width, depth = layout.block_rows, layout.out_features, layout.fan_in
    sources, slots, offsets = layout.indices, None, None
    if order is not None:
        out, into = into, out
        # The lists have any number of blocks, so that only one block is sure to divide them.
        rows, width, depth = layout.block_cols, layout.in_features, into
        offsets, sources, slots = layout.transposed
    tokens = x.shape[0]
    with naming_errors(product, x, layout), torch.cuda.device_of(x):
        y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
        if tokens == 0:
            return y

        def run(tile: configs.Tile) -> None:
            tile = configs.without_mask(tile, depth)
            launch_kernel(
                spmm_kernel,
                triton.cdiv(tokens, tile.block_m) * rows,
                x,
                values,
                bias,
                y,
                sources,
                slots,
                offsets,
                order,
                tokens,
                rows,
                layout.blocks_per_row,
                x.stride(0),
                x.stride(1),
                OUT=out,
                IN=into,
                TRANSPOSED=order is not None,
                HAS_BIAS=bias is not None,
                EVEN_K=depth % tile.block_k == 0,
                PRECISION=precision(x.dtype),
                BLOCK_M=tile.block_m,
                BLOCK_K=tile.block_k,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

        configs.run(run, "spmm", x, out, (product, tokens, layout.block, layout.fan_in))
    return y
