"""The Triton backend: launches the kernels of this folder; `ops` checks the arguments.

Blocks have both sides a power of two from 16 to 128, so that a block is a tile of the tensor cores.
Sums are float32; float32 inputs are multiplied exactly (IEEE) unless PyTorch is told to allow TF32.
Nothing is added atomically: the same inputs give the same bits.

`spmm.py` serves `forward` and `grad_input`, `sddmm.py` `grad_weight`, `topk.py` `abs_topk`. (A
file of the same name as a function would take its place in this package once it is imported.)

triton itself is imported when a kernel runs for the first time, never by `import sparse_kernels`.
With TRITON_INTERPRET=1 in the environment the kernels are interpreted, slowly, on cpu tensors.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from sparse_kernels.layout import FanInLayout, Problem
from sparse_kernels.reference import bias_grad as bias_grad  # as good on a GPU

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIDES = (16, 32, 64, 128)
_MAX_FEATURES = 2**30
# The spellings that triton itself takes for true.
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_device = "cpu" if _interpreted else "cuda"


def _find_triton() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ImportError:
        found = False
    return None if found else "the package triton is not installed (`pip install triton`, on Linux)"


_missing = _find_triton()


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if _missing is not None:
        return _missing
    if problem.device != _device and not (_interpreted and problem.device == "cuda"):
        return f"it runs on cuda tensors, and the device is {problem.device}"
    if torch.version.hip is not None:
        return "its tiles are for NVIDIA GPUs, and this PyTorch is built for AMD's"
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, and the dtype is {problem.dtype}"
    if problem.product == "attention":
        return "it has no attention: torch.nn.functional.scaled_dot_product_attention serves GPUs"
    if problem.product not in ("forward", "grad_input", "grad_weight"):  # it has no layout
        return None
    if problem.block[0] not in _SIDES or problem.block[1] not in _SIDES:
        return (
            f"it needs blocks with both sides one of 16, 32, 64, 128, and the block is "
            f"{problem.block}"
        )
    widest = max(problem.out_features, problem.in_features)
    if widest > _MAX_FEATURES:
        return f"it counts features in 32 bits, at most {_MAX_FEATURES}, and one side has {widest}"
    return None


def build_schedule(layout: FanInLayout) -> tuple[Tensor, ...]:
    """The input block columns, longest lists first, so that the last ones to run are short."""
    lengths = layout.transposed.offsets.diff()
    return (lengths.argsort(descending=True, stable=True).to(torch.int32),)


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), any strides, to (M, N) contiguous. See `reference.forward`.

    float32, bfloat16 or float16; bias is added in float32 before the one rounding.

    Raises:
        RuntimeError: the kernel cannot be compiled or launched. torch.OutOfMemoryError: no room
            for the result.
    """
    from sparse_kernels.triton import spmm

    bias = None if bias is None else bias.contiguous()
    return spmm.forward(x, values.contiguous(), layout, bias)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: (M, N), any strides, to (M, K) contiguous. See `reference.grad_input`."""
    from sparse_kernels.triton import spmm

    (order,) = layout.derive("triton.columns", build_schedule)
    bias = None if bias is None else bias.contiguous()
    return spmm.grad_input(grad_output, values.contiguous(), layout, bias, order)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), any strides, to `layout.values_shape`.

    Many tokens are cut at places that depend on the sizes alone; the float32 sums of the pieces are
    added in their order.
    """
    from sparse_kernels.triton import sddmm

    return sddmm.grad_weight(grad_output, x, layout)


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keeps the `k` entries of largest magnitude of each row of x (M, D), any strides.

    Exact, the lowest index first among equals, NaN above infinity. See `reference.abs_topk`.
    """
    from sparse_kernels.triton import topk

    return topk.abs_topk(x, k)


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`grad_output` where the kept `y` (M, D) is not zero, elsewhere 0; both with any strides."""
    from sparse_kernels.triton import topk

    return topk.abs_topk_backward(grad_output, y)
