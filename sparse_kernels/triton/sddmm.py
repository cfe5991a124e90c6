"""`grad_weight`: products over the tokens, sampled at the kept blocks.

A program takes several blocks of one block-row: their inputs side by side are the rows of its tile,
the outputs of the block-row its columns, so that a strip of grad_output is read once for all of
them, and the tile fills a tensor core however small the blocks are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.layout import FanInLayout
from sparse_kernels.triton import configs
from sparse_kernels.triton.launch import dot, launch_kernel, naming_errors, precision, rounded

# Programs that fill the largest GPUs, and the fewest tokens that are worth a piece of their own.
_PROGRAMS = 512
_TOKENS = 1024
_SUM_BLOCK = 1024


@triton.jit
def sddmm_kernel(
    grad_ptr,  # (M, R * OUT): grad_output
    x_ptr,  # (M, K)
    out_ptr,  # (pieces, R, F, OUT, IN), contiguous, float32; or values where there is one piece
    indices_ptr,  # int32 (R, F)
    num_tokens,  # M
    tokens_per_piece,
    num_rows,  # R
    num_groups,  # programs that share the blocks of one block-row
    blocks_per_row,  # F
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # inputs
    BLOCK_K: tl.constexpr,  # tokens
):
    # Programs that run together read the same tokens.
    pid = tl.program_id(0)
    group = pid % num_groups
    row = pid // num_groups % num_rows
    piece = (pid // num_groups // num_rows).to(tl.int64)

    inputs = group * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = inputs < blocks_per_row * IN
    slots = row.to(tl.int64) * blocks_per_row + inputs // IN
    sources = tl.load(indices_ptr + slots, mask=inside, other=0)
    RUN: tl.constexpr = IN if IN < BLOCK_M else BLOCK_M
    columns = tl.max_contiguous(tl.multiple_of(sources * IN + inputs % IN, RUN), RUN)
    offs_n = tl.arange(0, OUT)

    start = piece * tokens_per_piece
    count = tl.minimum(num_tokens - start, tokens_per_piece).to(tl.int32)
    x_columns = x_ptr + start * stride_xm + columns.to(tl.int64)[:, None] * stride_xk
    outputs = (row * OUT + offs_n).to(tl.int64)
    grad_columns = grad_ptr + start * stride_gm + outputs[None, :] * stride_gn
    sums = tl.zeros((BLOCK_M, OUT), dtype=tl.float32)
    for token in range(0, count, BLOCK_K):
        offs_t = token + tl.arange(0, BLOCK_K)
        present = offs_t < count
        offs_t = offs_t.to(tl.int64)
        x = tl.load(
            x_columns + offs_t[None, :] * stride_xm,
            mask=inside[:, None] & present[None, :],
            other=0.0,
        )  # (BLOCK_M, BLOCK_K)
        grad = tl.load(
            grad_columns + offs_t[:, None] * stride_gm, mask=present[:, None], other=0.0
        )  # (BLOCK_K, OUT)
        sums = dot(x, grad, sums, PRECISION)

    elements = (piece * num_rows * blocks_per_row + slots) * (OUT * IN) + inputs % IN
    elements = tl.max_contiguous(tl.multiple_of(elements, RUN), RUN)
    out_ptrs = out_ptr + elements[:, None] + offs_n[None, :] * IN
    tl.store(out_ptrs, rounded(sums, out_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def sum_kernel(
    pieces_ptr,  # float32 (num_pieces, size), contiguous
    out_ptr,  # (size,)
    size,
    num_pieces,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, num_pieces):
        sums += tl.load(pieces_ptr + offs, mask=inside, other=0.0)
        pieces_ptr += size
    tl.store(out_ptr + offs, rounded(sums, out_ptr.dtype.element_ty), mask=inside)


def tokens_per_piece(tokens: int, layout: FanInLayout) -> int:
    """Tokens that one program sums: all, unless the kept blocks are too few to fill a GPU.

    It depends on the sizes alone, never on the machine, so that the same sums are formed anywhere.
    """
    programs = layout.block_rows * triton.cdiv(layout.fan_in, 128)
    pieces = min(triton.cdiv(_PROGRAMS, programs), max(1, tokens // _TOKENS))
    # A multiple of every tile size: tiles are powers of two up to 128.
    return triton.cdiv(triton.cdiv(tokens, pieces), 128) * 128


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), to `layout.values_shape`.

    The arguments are checked already. Works in memory of `pieces` float32 copies of the values
    where the tokens are cut.
    """
    out, into = layout.block
    tokens = x.shape[0]
    with naming_errors("grad_weight", x, layout), torch.cuda.device_of(x):
        grad = torch.empty(layout.values_shape, dtype=x.dtype, device=x.device)
        if tokens == 0:
            return grad.zero_()
        piece = tokens_per_piece(tokens, layout)
        pieces = triton.cdiv(tokens, piece)
        parts = grad
        if pieces > 1:
            shape = (pieces, *layout.values_shape)
            parts = torch.empty(shape, dtype=torch.float32, device=x.device)

        def run(tile: configs.Tile) -> None:
            groups = triton.cdiv(layout.fan_in, tile.block_m)
            launch_kernel(
                sddmm_kernel,
                groups * layout.block_rows * pieces,
                grad_output,
                x,
                parts,
                layout.indices,
                tokens,
                piece,
                layout.block_rows,
                groups,
                layout.blocks_per_row,
                grad_output.stride(0),
                grad_output.stride(1),
                x.stride(0),
                x.stride(1),
                OUT=out,
                IN=into,
                PRECISION=precision(x.dtype),
                BLOCK_M=tile.block_m,
                BLOCK_K=tile.block_k,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )

        configs.run(run, "sddmm", x, out, (tokens, layout.block, layout.fan_in))
        if pieces > 1:
            size = grad.numel()
            programs = triton.cdiv(size, _SUM_BLOCK)
            launch_kernel(
                sum_kernel, programs, parts, grad, size, pieces, BLOCK=_SUM_BLOCK, num_warps=4
            )
    return grad
