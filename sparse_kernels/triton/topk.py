"""`abs_topk` and its gradient, exact: the threshold is found bit by bit.

Magnitudes are compared as integers, their bit patterns without the sign, which order them as the
numbers do. A program takes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.triton.launch import launch_kernel, naming_errors

# Numbers of a row that a program holds in its registers; a longer row is read again at each bit.
_CHUNK = 16384
_BACKWARD_BLOCK = 1024
# The bit pattern of infinity.
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def _magnitudes(x, inside, INFINITY: tl.constexpr):
    """int32 that order as |x| does, all NaNs equal and above infinity, -1 outside the row."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return tl.where(inside, tl.minimum(bits, INFINITY + 1), -1)


@triton.jit
def _count(x_ptr, cols, stride_xn, threshold, INFINITY: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the row's magnitudes are `threshold` or more."""
    count = 0
    for start in range(0, cols, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs.to(tl.int64) * stride_xn, mask=offs < cols, other=0.0)
        magnitudes = _magnitudes(x, offs < cols, INFINITY)
        count += tl.sum((magnitudes >= threshold).to(tl.int32))
    return count


@triton.jit
def topk_kernel(
    x_ptr,  # (M, cols)
    y_ptr,  # (M, cols), contiguous
    cols,
    k,
    stride_xm,
    stride_xn,
    BITS: tl.constexpr,  # of a magnitude
    INFINITY: tl.constexpr,  # its bit pattern
    ONE_CHUNK: tl.constexpr,  # CHUNK holds the whole row
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    y_ptr += row * cols
    if ONE_CHUNK:
        offs = tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs.to(tl.int64) * stride_xn, mask=offs < cols, other=0.0)
        held = _magnitudes(x, offs < cols, INFINITY)

    # The largest threshold that at least k magnitudes reach: the k-th largest magnitude.
    threshold = 0
    for bit in range(0, BITS):
        higher = threshold + (1 << (BITS - 1 - bit))
        if ONE_CHUNK:
            count = tl.sum((held >= higher).to(tl.int32))
        else:
            count = _count(x_ptr, cols, stride_xn, higher, INFINITY, CHUNK)
        threshold = tl.where(count >= k, higher, threshold)

    # Among those equal to it the first ones stay, as many as there is room for.
    if ONE_CHUNK:
        room = k - tl.sum((held > threshold).to(tl.int32))
    else:
        room = k - _count(x_ptr, cols, stride_xn, threshold + 1, INFINITY, CHUNK)
    for start in range(0, cols, CHUNK):
        offs = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + offs.to(tl.int64) * stride_xn, mask=offs < cols, other=0.0)
        magnitudes = _magnitudes(x, offs < cols, INFINITY)
        equal = (magnitudes == threshold).to(tl.int32)
        kept = (magnitudes > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
        room -= tl.sum(equal)
        tl.store(y_ptr + offs, tl.where(kept, x, tl.zeros_like(x)), mask=offs < cols)


@triton.jit
def topk_backward_kernel(
    grad_ptr,  # (M, cols)
    y_ptr,  # (M, cols)
    out_ptr,  # (M, cols), contiguous
    cols,
    num_blocks,  # programs that share a row
    stride_gm,
    stride_gn,
    stride_ym,
    stride_yn,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    row = (pid // num_blocks).to(tl.int64)
    offs = (pid % num_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < cols
    y = tl.load(y_ptr + row * stride_ym + offs * stride_yn, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + row * stride_gm + offs * stride_gn, mask=inside, other=0.0)
    grad = tl.where(y.to(tl.float32) != 0.0, grad, tl.zeros_like(grad))
    tl.store(out_ptr + row * cols + offs, grad, mask=inside)


def chunk(cols: int) -> tuple[int, int]:
    """Numbers that a program holds at a time, and the warps that hold them."""
    size = max(32, min(_CHUNK, triton.next_power_of_2(cols)))
    return size, max(1, min(16, size // 256))


def abs_topk(x: Tensor, k: int) -> Tensor:
    """The `k` largest `|x|` of each row of x (M, D), zero elsewhere; arguments are checked."""
    rows, cols = x.shape
    with naming_errors("abs_topk", x, k), torch.cuda.device_of(x):
        y = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
        if rows == 0:
            return y
        size, warps = chunk(cols)
        launch_kernel(
            topk_kernel,
            rows,
            x,
            y,
            cols,
            k,
            x.stride(0),
            x.stride(1),
            BITS=31 if x.dtype == torch.float32 else 15,
            INFINITY=_INFINITY[x.dtype],
            ONE_CHUNK=cols <= size,
            CHUNK=size,
            num_warps=warps,
        )
    return y


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`grad_output` where y (M, D) is not zero, elsewhere 0; arguments are checked."""
    rows, cols = y.shape
    with naming_errors("abs_topk_backward", y, None), torch.cuda.device_of(y):
        out = torch.empty((rows, cols), dtype=y.dtype, device=y.device)
        if out.numel() == 0:
            return out
        blocks = triton.cdiv(cols, _BACKWARD_BLOCK)
        launch_kernel(
            topk_backward_kernel,
            rows * blocks,
            grad_output,
            y,
            out,
            cols,
            blocks,
            grad_output.stride(0),
            grad_output.stride(1),
            y.stride(0),
            y.stride(1),
            BLOCK=_BACKWARD_BLOCK,
            num_warps=4,
        )
    return out
