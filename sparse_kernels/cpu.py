"""The CPU backend: allocates, and hands pointers to the C++ kernels; `ops` checks the arguments.

The kernels (`csrc/cpu/`) cut the tokens into tiles, pack a tile feature-major, and walk the blocks
in the order of a *schedule*, which is computed once and cached in the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch  # before the extension, so that both share one OpenMP runtime
from torch import Tensor

from sparse_kernels.checks import CPU_DTYPES, Orientation, wide_dtype
from sparse_kernels.layout import FanInLayout, Problem

_missing: str | None = None
try:
    import _sparse_kernels_cpu as _extension

    if not hasattr(_extension, "spmm"):
        raise ImportError("it was built from an older version of the sources")
except ImportError as error:
    _extension: ModuleType | None = None  # type: ignore[no-redef]
    _missing = (
        f"the C++ extension _sparse_kernels_cpu could not be imported ({error}); "
        "build it with `pip install .` in the source folder"
    )

# The extension's numbers of dtypes and instruction sets.
_DTYPES = {dtype: number for number, dtype in enumerate(CPU_DTYPES)}
_isa: int = _extension.default_isa() if _extension is not None else 0
# Inputs in a panel, at most (or one block): a tile of a panel fits the cache.
_PANEL_FEATURES = 2048
# Results of at least this size are allocated in huge pages.
_LARGE_BYTES = 4 << 20
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
    return isas()[_isa]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the body with the kernels of another instruction set (for tests and measurements).

    Raises:
        ValueError: `name` is not in `isas()`.
    """
    global _isa
    if name not in isas():
        raise ValueError(f"name must be one of {', '.join(isas())}, got {name!r}")
    before = _isa
    _isa = isas().index(name)
    try:
        yield
    finally:
        _isa = before


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if _missing is not None:
        return _missing
    if problem.device != "cpu":
        return f"it runs on cpu tensors, and the device is {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float64, and the dtype is {problem.dtype}"
    return None


def _panel(features: int, in_block: int, blocks_per_row: float) -> tuple[int, int]:
    """Inputs in a panel (a multiple of the block) and the number of panels.

    The schedule has an entry for each row and panel. There is one panel if each of several would
    have less than 4 blocks of a row: else the schedule would be larger than the blocks.
    """
    size = min(features, max(1, _PANEL_FEATURES // in_block) * in_block)
    panels = -(-features // size)
    return (size, panels) if 4 * panels <= blocks_per_row else (features, 1)


def _walks(layout: FanInLayout) -> Orientation:
    """The lists that `grad_input` walks; the other products walk "rows", the inputs of each output.

    It gathers over "columns", the outputs of each input, unless a block has several outputs and few
    inputs: then it scatters over the rows, because the inputs of a block-row read the same rows of
    dY. Scattering keeps a running sum for each input, which must be short to be exact.
    """
    block_out, block_in = layout.block
    gathers = block_out % 4 != 0 or block_in % 4 == 0 or not _scatters_exactly(layout)
    return "columns" if gathers else "rows"


def _scatters_exactly(layout: FanInLayout) -> bool:
    (longest,) = layout.derive(
        "cpu.longest", lambda this: (this.indices.flatten().bincount().max(),)
    )
    return int(longest) <= _LONGEST_SUM


class _Schedule(tuple[Tensor, ...]):
    """The tensors that a layout caches for this backend, and the extension's pointers to them."""

    pattern: _extension.Pattern


def _lists(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    """The extension's pointers to the lists, without a schedule."""
    geometry = layout.block_rows, layout.blocks_per_row, layout.block_cols, *layout.block
    make = _extension.Pattern.columns if lists == "columns" else _extension.Pattern.rows
    tensors = layout.transposed if lists == "columns" else (layout.indices,)
    pattern = make(*geometry, *(tensor.data_ptr() for tensor in tensors))
    pattern.tensors = tensors  # keeps what it points to
    return pattern


def build_schedule(layout: FanInLayout, lists: Orientation) -> tuple[Tensor, ...]:
    """The order in which the kernels walk the lists: three int tensors."""
    rows, features, in_block = layout.block_rows, layout.in_features, layout.block[1]
    if lists == "columns":
        rows, features, in_block = layout.block_cols, layout.out_features, layout.block[0]
    size, panels = _panel(features, in_block, layout.num_blocks / rows)
    indices, blocks = layout.indices, layout.num_blocks
    schedule = _Schedule(
        (
            indices.new_empty(panels * rows + 1, dtype=torch.int64),  # first feature of each entry
            indices.new_empty(blocks * in_block, dtype=torch.int32),  # within its panel
            indices.new_empty(blocks, dtype=torch.int32),  # stored block
        )
    )
    schedule.pattern = _lists(layout, lists)
    schedule.pattern.tensors += tuple(schedule)
    schedule.pattern.build_schedule(size, *(tensor.data_ptr() for tensor in schedule))
    return schedule


def _scheduled(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    schedule = layout.derive("cpu." + lists, lambda this: build_schedule(this, lists))
    assert isinstance(schedule, _Schedule)
    return schedule.pattern


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Memory for a contiguous result; a large one gets its own, see `Memory` in csrc/cpu."""
    size = math.prod(shape) * like.itemsize
    if size < _LARGE_BYTES:
        return like.new_empty(shape)
    storage = torch.frombuffer(_extension.Memory(size), dtype=torch.uint8).untyped_storage()
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return like.new_empty(0).set_(storage, 0, shape, strides)


def _run(kernel: str, dtype: torch.dtype, *arguments: object) -> None:
    """Calls a kernel of the extension, for the instruction set in use, with torch's threads."""
    getattr(_extension, kernel)(_isa, _DTYPES[dtype], *arguments, torch.get_num_threads())


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    """The address and strides of a matrix."""
    return tensor.data_ptr(), *tensor.stride()


def _spmm(
    kernel: str, x: Tensor, values: Tensor, bias: Tensor | None, width: int, pattern: object
) -> Tensor:
    values, tokens = values.contiguous(), x.shape[0]
    bias = None if bias is None else bias.contiguous()
    out = _empty(x, tokens, width)
    pointers = values.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    _run(kernel, x.dtype, pattern, *_matrix(x), *pointers, tokens)
    return out


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), any strides, to (M, N) contiguous. See `reference.forward`."""
    return _spmm("spmm", x, values, bias, layout.out_features, _scheduled(layout, "rows"))


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: (M, N), any strides, to (M, K) contiguous. See `reference.grad_input`."""
    walked = _walks(layout)
    if grad_output.shape[0] == 1 and layout.block == (1, 1) and _scatters_exactly(layout):
        # One token reads the values in order; by columns it would read them in random order.
        walked, pattern = "rows", _lists(layout, "rows")
    else:
        pattern = _scheduled(layout, walked)
    kernel = "spmm_scatter" if walked == "rows" else "spmm"
    return _spmm(kernel, grad_output, values, bias, layout.in_features, pattern)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), any strides, to `layout.values_shape`."""
    out = _empty(x, *layout.values_shape)
    pattern, pointers = _scheduled(layout, "rows"), (*_matrix(grad_output), *_matrix(x))
    _run("sddmm", x.dtype, pattern, *pointers, out.data_ptr(), x.shape[0])
    return out


def bias_grad(grad_output: Tensor) -> Tensor:
    """`(M, N)`, any strides, to `(N,)`, accumulated in float32 at least and rounded once."""
    grad_output = _with_unit_stride(grad_output)
    out = grad_output.new_empty(grad_output.shape[1])
    pointers = *_matrix(grad_output)[:2], out.data_ptr()
    _run("bias_grad", out.dtype, *pointers, *grad_output.shape)
    return out


def _topk(
    kernel: str, x: Tensor, k: int, room: int = -1, weight: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, ...]:
    """y; the scales if there is a weight; the bits and values if `room` is not negative."""
    rows, width = x.shape
    results = [_empty(x, rows, width)]
    pointers = [0 if weight is None else weight.data_ptr(), eps, results[0].data_ptr()]
    if weight is not None:
        results.append(x.new_empty(rows, dtype=wide_dtype(x.dtype)))
    pointers.append(0 if weight is None else results[1].data_ptr())
    packed = _packed(x, room) if room >= 0 else ()
    pointers += [*(tensor.data_ptr() for tensor in packed), room] if packed else [0, 0, 0]
    _run(kernel, x.dtype, *_matrix(x), *pointers, rows, width, k)
    return *results, *packed


def _packed(x: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Memory for the bits and values of x (M, D), `room` of them in each row."""
    rows, width = x.shape
    bits = x.new_empty((rows, -(-width // 64)), dtype=torch.int64)
    return bits, _empty(x, rows, room)


def pack(y: Tensor, x: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """y and x (M, D), any strides. See `reference.pack`."""
    bits, values = _packed(x, room)
    pointers = *_matrix(y), *_matrix(x), bits.data_ptr(), values.data_ptr(), room
    _run("pack", x.dtype, *pointers, *x.shape)
    return bits, values


def unpack(values: Tensor, bits: Tensor, width: int, of_gelu: bool) -> Tensor:
    """See `reference.unpack`."""
    values, bits = values.contiguous(), bits.contiguous()
    y = _empty(values, values.shape[0], width)
    pointers = bits.data_ptr(), values.data_ptr(), values.shape[1], of_gelu, y.data_ptr()
    _run("unpack", y.dtype, *pointers, *y.shape)
    return y


def abs_topk(x: Tensor, k: int) -> Tensor:
    """See `reference.abs_topk`; x (M, D) with any strides, as for all of these."""
    return _topk("abs_topk", x, k)[0]


def abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, ...]:
    """See `reference.abs_topk_packed`."""
    return _topk("abs_topk", x, k, 0)[:2]


def gelu_abs_topk(x: Tensor, k: int) -> Tensor:
    """See `reference.gelu_abs_topk`."""
    return _topk("gelu_abs_topk", x, k)[0]


def gelu_abs_topk_packed(x: Tensor, k: int) -> tuple[Tensor, ...]:
    """See `reference.gelu_abs_topk_packed`."""
    return _topk("gelu_abs_topk", x, k, k)


def norm_abs_topk(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, ...]:
    """See `reference.norm_abs_topk`."""
    return _topk("norm_abs_topk", x, k, weight=weight.contiguous(), eps=eps)


def norm_abs_topk_packed(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, ...]:
    """See `reference.norm_abs_topk_packed`."""
    return _topk("norm_abs_topk", x, k, k, weight.contiguous(), eps)


def _topk_backward(kernel: str, grad_output: Tensor, bits: Tensor, values: Tensor) -> Tensor:
    bits, values = bits.contiguous(), values.contiguous()
    grad = _empty(grad_output, *grad_output.shape)
    pointers = bits.data_ptr(), values.data_ptr(), values.shape[-1], grad.data_ptr()
    _run(kernel, grad.dtype, *_matrix(grad_output), *pointers, *grad.shape)
    return grad


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """See `reference.abs_topk_backward`."""
    bits = y if y.dtype == torch.int64 else pack(y, y, 0)[0]
    return _topk_backward("abs_topk_backward", grad_output, bits, grad_output.new_empty(0))


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """See `reference.gelu_abs_topk_backward`."""
    return gelu_abs_topk_packed_backward(grad_output, *pack(y, x, x.shape[1]))


def gelu_abs_topk_packed_backward(grad_output: Tensor, bits: Tensor, values: Tensor) -> Tensor:
    """See `reference.gelu_abs_topk_packed_backward`."""
    return _topk_backward("gelu_abs_topk_backward", grad_output, bits, values)


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x (M, D) and weight (D,). See `reference.norm_abs_topk_backward`."""
    return norm_abs_topk_packed_backward(grad_output, pack(y, y, 0)[0], x, weight, scales)


def norm_abs_topk_packed_backward(
    grad_output: Tensor, bits: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.norm_abs_topk_packed_backward`."""
    grad_output, x = (_with_unit_stride(tensor) for tensor in (grad_output, x))
    bits, weight, scales = bits.contiguous(), weight.contiguous(), scales.contiguous()
    grad, grad_weight = _empty(x, *x.shape), torch.empty_like(weight)
    rows = *_matrix(grad_output)[:2], *_matrix(x)[:2]
    pointers = (tensor.data_ptr() for tensor in (bits, weight, scales, grad, grad_weight))
    _run("norm_abs_topk_backward", x.dtype, *rows, *pointers, *x.shape)
    return grad, grad_weight


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """q `(B, T, H, d)`, k and v `(B, S, H, d)`, any strides. See `reference.attention`."""
    B, T, H, d = q.shape
    q, k, v = (_with_unit_stride(tensor) for tensor in (q, k, v))
    wide = wide_dtype(q.dtype)
    sinks = _wide(sinks, wide)
    y, lse = _empty(q, B, T, H, d), q.new_empty((B, H, T), dtype=wide)
    inputs = *map(_heads, (q, k, v)), 0 if sinks is None else sinks.data_ptr()
    _run("attention", q.dtype, (B, T, k.shape[1], H, d), *inputs, y.data_ptr(), lse.data_ptr())
    return y, lse


def attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """qkv `(B, T, 3, H, d)`, any strides. See `reference.attention_backward`."""
    B, T, _, H, d = qkv.shape
    q, k, v, y, grad_y = (_with_unit_stride(tensor) for tensor in (*qkv.unbind(2), y, grad_y))
    wide_sinks, lse = _wide(sinks, lse.dtype), lse.contiguous()
    grad, grad_sinks = _empty(qkv, B, T, 3, H, d), lse.new_zeros(B, H)
    inputs = *map(_heads, (q, k, v)), 0 if wide_sinks is None else wide_sinks.data_ptr()
    outputs = *map(_heads, (y, grad_y)), lse.data_ptr(), *map(_heads, grad.unbind(2))
    _run("attention_backward", y.dtype, (B, T, T, H, d), *inputs, *outputs, grad_sinks.data_ptr())
    if sinks is None:
        return grad, grad.new_empty(0)
    return grad, grad_sinks.sum(0).to(sinks.dtype)


def token_losses_(
    logits: Tensor, targets: Tensor, bigram: Tensor | None, tokens: Tensor, scale: float
) -> Tensor:
    """See `transformer_ops.token_losses_`; all contiguous, bigram in the dtype of the losses."""
    losses = logits.new_empty(logits.shape[0], dtype=wide_dtype(logits.dtype))
    targets, tokens = targets.contiguous(), tokens.contiguous()
    table = 0 if bigram is None else bigram.data_ptr()
    inputs = logits.data_ptr(), targets.data_ptr(), table, tokens.data_ptr()
    _run("cross_entropy", logits.dtype, *inputs, losses.data_ptr(), scale, *logits.shape)
    if scale:
        torch.autograd.graph.increment_version(logits)
    return losses


def _with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied if its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _heads(tensor: Tensor) -> tuple[int, ...]:
    """The address of `(B, T, H, d)` and its strides, but for that of the channels."""
    return tensor.data_ptr(), *tensor.stride()[:3]


def _wide(sinks: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if sinks is None else sinks.to(dtype).contiguous()
