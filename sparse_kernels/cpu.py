"""The CPU backend: the C++ kernels, whose extension reads and makes tensors itself.

`ops` checks the arguments. The kernels (`csrc/cpu/`) cut the tokens into tiles, pack a tile
feature-major, and walk the blocks in the order of a *schedule*, which is computed once and cached
in the layout.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch  # before the extension, so that both share one OpenMP runtime
from torch import Tensor

from sparse_kernels.checks import CPU_DTYPES, Orientation, check_int, wide_dtype
from sparse_kernels.layout import FanInLayout, Problem

_missing: str | None = None
try:
    import _sparse_kernels_cpu as _extension

    if not hasattr(_extension, "keep_results"):
        raise ImportError("it was built from an older version of the sources")
except ImportError as error:
    _extension: ModuleType | None = None  # type: ignore[no-redef]
    _missing = (
        f"the C++ extension _sparse_kernels_cpu could not be imported ({error}); "
        "build it with `pip install .` in the source folder"
    )

if _extension is not None:
    _extension.set_isa(_extension.default_isa())
# The most terms of a running sum whose rounding errors do not show.
_LONGEST_SUM = 64


def is_available() -> bool:
    """Whether the extension could be imported."""
    return _extension is not None


def isas() -> list[str]:
    """The instruction sets that were built and that this processor has, lowest first."""
    return list(_extension.isas()) if _extension is not None else []


def isa() -> str:
    """The instruction set in use: the highest usable, or what SPARSE_KERNELS_CPU_ISA named."""
    return isas()[_extension.isa()]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the body with the kernels of another instruction set (for tests and measurements).

    Raises:
        ValueError: `name` is not in `isas()`.
    """
    if name not in isas():
        raise ValueError(f"name must be one of {', '.join(isas())}, got {name!r}")
    before = _extension.isa()
    _extension.set_isa(isas().index(name))
    try:
        yield
    finally:
        _extension.set_isa(before)


def keep_results(size: int) -> None:
    """How many bytes of freed results may serve the next ones, in place of fresh memory: 512 MiB.

    A result may take the memory of one that was up to a seventh larger. 0 is right where the C
    library keeps all freed memory, as after `sparse_transformer.keep_freed_memory`.

    Raises:
        TypeError: `size` is not an int. ValueError: it is negative.
    """
    size = check_int("size", size, 0)
    if _extension is not None:
        _extension.keep_results(min(size, sys.maxsize))


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if _missing is not None:
        return _missing
    if problem.device != "cpu":
        return f"it runs on cpu tensors, and the device is {problem.device}"
    if problem.dtype not in CPU_DTYPES:
        return f"it has float32, bfloat16 and float64, and the dtype is {problem.dtype}"
    return None


def _lists(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    """What the kernels walk: "rows", the inputs of each output, or "columns", the other way."""
    if lists == "rows":
        return _extension.Pattern.rows(layout.indices, layout.block_cols, layout.block)
    sizes = layout.block_rows, layout.blocks_per_row
    return _extension.Pattern.columns(layout.transposed, *sizes, layout.block)


def _scheduled(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    def build(layout: FanInLayout) -> _extension.Pattern:
        pattern = _lists(layout, lists)
        pattern.build_schedule()
        return pattern

    return layout.derive("cpu." + lists, build)


def _build_forward(layout: FanInLayout) -> _extension.Product:
    content = layout.indices, layout.checksum, layout.values_shape
    return _extension.Product(_scheduled(layout, "rows"), False, None, *content)


def _build_grad_input(layout: FanInLayout) -> _extension.Product:
    """It gathers over "columns", unless a block has several outputs and few inputs.

    Then it scatters over "rows", because the inputs of a block-row read the same rows of dY.
    Scattering keeps a running sum for each input, which must be short to be exact. One token
    scatters if blocks are single weights: it reads them in order; by columns it would read them in
    random order.
    """
    block_out, block_in = layout.block
    content = layout.indices, layout.checksum, layout.values_shape
    is_exact = int(layout.indices.flatten().bincount().max()) <= _LONGEST_SUM
    if is_exact and block_out % 4 == 0 and block_in % 4 != 0:
        return _extension.Product(_scheduled(layout, "rows"), True, None, *content)
    one_token = _lists(layout, "rows") if is_exact and layout.block == (1, 1) else None
    return _extension.Product(_scheduled(layout, "columns"), False, one_token, *content)


def try_spmm(
    x: Tensor,
    values: Tensor | None,
    layout: FanInLayout,
    bias: Tensor | None,
    transpose: bool,
    indices: Tensor | None = None,
) -> Tensor | None:
    """`forward`, or `grad_input` if `transpose`, if nothing about the call is special, else None.

    It is None unless all arguments are plain contiguous CPU tensors that fit each other, x with any
    strides and leading dimensions, of which no gradient is to be recorded; if `indices` are given
    and are not those of the layout; and at the first call with a layout. Checks everything in C++;
    the caller makes sure that no mode, transform, tracer, profiler or autocast is active.
    """
    product = layout.cache.get("cpu.grad_input" if transpose else "cpu.forward")
    return None if product is None else _extension.try_spmm(product, x, values, bias, indices)


def try_grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor | None:
    """`grad_weight`, or None, as for `try_spmm`."""
    rows = layout.cache.get("cpu.rows")
    return None if rows is None else _extension.try_sddmm(rows, grad_output, x)


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), any strides, to (M, N) contiguous. See `reference.forward`."""
    return _extension.spmm(layout.derive("cpu.forward", _build_forward), x, values, bias)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: (M, N), any strides, to (M, K) contiguous. See `reference.grad_input`."""
    product = layout.derive("cpu.grad_input", _build_grad_input)
    return _extension.spmm(product, grad_output, values, bias)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), any strides, to `layout.values_shape`."""
    return _extension.sddmm(_scheduled(layout, "rows"), grad_output, x)


def bias_grad(grad_output: Tensor) -> Tensor:
    """`(M, N)`, any strides, to `(N,)`, accumulated in float32 at least and rounded once."""
    return _extension.bias_grad(grad_output)


def pack(y: Tensor, x: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """y and x (M, D), any strides. See `reference.pack`."""
    return _extension.pack(y, x, room)


def unpack(values: Tensor, bits: Tensor, width: int, of_gelu: bool) -> Tensor:
    """See `reference.unpack`."""
    return _extension.unpack(values, bits, width, of_gelu)


def abs_topk(x: Tensor, k: int) -> Tensor:
    """See `reference.abs_topk`; x (M, D) with any strides, as for all of these."""
    return _extension.abs_topk(x, k, -1)[0]


def abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.abs_topk_packed`."""
    y, _, bits, _ = _extension.abs_topk(x, k, 0)
    return y, bits


def gelu_abs_topk(x: Tensor, k: int) -> Tensor:
    """See `reference.gelu_abs_topk`."""
    return _extension.gelu_abs_topk(x, k, -1)[0]


def gelu_abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.gelu_abs_topk_packed`."""
    y, _, bits, values = _extension.gelu_abs_topk(x, k, k)
    return y, bits, values


def norm_abs_topk(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.norm_abs_topk`."""
    y, scales, _, _ = _extension.norm_abs_topk(x, weight, k, eps, -1)
    return y, scales


def norm_abs_topk_packed(
    x: Tensor, weight: Tensor, k: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.norm_abs_topk_packed`."""
    return _extension.norm_abs_topk(x, weight, k, eps, k)


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """See `reference.abs_topk_backward`."""
    bits = y if y.dtype == torch.int64 else pack(y, y, 0)[0]
    return _extension.abs_topk_backward(grad_output, bits)


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """See `reference.gelu_abs_topk_backward`."""
    return gelu_abs_topk_packed_backward(grad_output, *pack(y, x, x.shape[1]))


def gelu_abs_topk_packed_backward(grad_output: Tensor, bits: Tensor, values: Tensor) -> Tensor:
    """See `reference.gelu_abs_topk_packed_backward`."""
    return _extension.gelu_abs_topk_backward(grad_output, bits, values)


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x (M, D) and weight (D,). See `reference.norm_abs_topk_backward`."""
    return norm_abs_topk_packed_backward(grad_output, pack(y, y, 0)[0], x, weight, scales)


def norm_abs_topk_packed_backward(
    grad_output: Tensor, bits: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_abs_topk_packed_backward`."""
    return _extension.norm_abs_topk_backward(grad_output, bits, x, weight, scales)


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """q `(B, T, H, d)`, k and v `(B, S, H, d)`, any strides. See `reference.attention`."""
    return _extension.attention(q, k, v, _wide(sinks, q.dtype))


def attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """qkv `(B, T, 3, H, d)`, any strides. See `reference.attention_backward`."""
    wide = _wide(sinks, y.dtype)
    grad, grad_sinks = _extension.attention_backward(qkv, wide, y, lse, grad_y)
    return grad, grad.new_empty(0) if sinks is None else grad_sinks.sum(0).to(sinks.dtype)


def _wide(sinks: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if sinks is None else sinks.to(wide_dtype(dtype))


def token_losses_(
    logits: Tensor, targets: Tensor, bigram: Tensor | None, tokens: Tensor, scale: float
) -> Tensor:
    """See `transformer_ops.token_losses_`; all contiguous, bigram in the dtype of the losses."""
    losses = _extension.cross_entropy(logits, targets, bigram, tokens, scale)
    if scale:
        torch.autograd.graph.increment_version(logits)
    return losses
