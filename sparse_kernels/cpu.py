"""The CPU backend: checks, allocates, and hands pointers to the C++ kernels.

The kernels (`csrc/cpu/`) cut the tokens into tiles, pack a tile feature-major, and walk the blocks
in the order of a *schedule*, which is derived from the layout once and cached on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch  # before the extension, so that both share one OpenMP runtime
from torch import Tensor

from sparse_kernels.checks import (
    CPU_DTYPES,
    Orientation,
    check_float,
    check_kept,
    check_orientation,
    check_tensor,
    wide_dtype,
)
from sparse_kernels.layout import FanInLayout, Problem

_missing: str | None = None
try:
    import _sparse_kernels_cpu as _extension
except ImportError as error:
    _extension: ModuleType | None = None  # type: ignore[no-redef]
    _missing = (
        f"the C++ extension _sparse_kernels_cpu could not be imported ({error}); "
        "build it with `pip install .` in the source folder"
    )

# The extension's numbers of dtypes and instruction sets.
_DTYPES = {dtype: number for number, dtype in enumerate(CPU_DTYPES)}
_isa: int = _extension.default_isa() if _extension is not None else 0
# Inputs are cut into panels of at most this many (or one block): a tile of them fits a cache.
_PANEL_FEATURES = 2048
_HUGE_BYTES = 4 << 20
# Blocks that a sum may meet one after the other.
_LONGEST_SUM = 64
# The most blocks that an input of a layout has.
_longest: weakref.WeakKeyDictionary[FanInLayout, int] = weakref.WeakKeyDictionary()


def is_available() -> bool:
    """Whether the extension is there."""
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

    One panel holds all inputs where several would find less than 4 blocks of a row each: the
    schedule has an entry for every row and panel, and must not outgrow the blocks themselves.
    """
    size = min(features, max(1, _PANEL_FEATURES // in_block) * in_block)
    panels = -(-features // size)
    return (size, panels) if 4 * panels <= blocks_per_row else (features, 1)


def _walks(layout: FanInLayout) -> Orientation:
    """The lists that `grad_input` walks; the other products walk "rows", inputs of each output.

    It gathers over "columns", outputs of each input, except where a block has several outputs but
    too few inputs: then the inputs of a block-row share the rows of dY that they meet, and it
    scatters over the rows. There each block adds to a running sum, which must not get so long that
    its rounding errors show.
    """
    block_out, block_in = layout.block
    gathers = block_out % 4 != 0 or block_in % 4 == 0 or not _scatters_exactly(layout)
    return "columns" if gathers else "rows"


def _scatters_exactly(layout: FanInLayout) -> bool:
    longest = _longest.get(layout)
    if longest is None:
        counts = torch.bincount(layout.indices.flatten(), minlength=1)
        longest = _longest[layout] = int(counts.max())
    return longest <= _LONGEST_SUM


class _Schedule(tuple[Tensor, ...]):
    """What a layout derives for this backend, and the handle of the extension that points there."""

    pattern: _extension.Pattern


def _lists(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    """The lists for the extension, as yet without a schedule."""
    assert _extension is not None, _missing
    geometry = layout.block_rows, layout.blocks_per_row, layout.block_cols, *layout.block
    make = _extension.Pattern.columns if lists == "columns" else _extension.Pattern.rows
    tensors = layout.transposed if lists == "columns" else (layout.indices,)
    pattern = make(*geometry, *(tensor.data_ptr() for tensor in tensors))
    # It has pointers only, and of threads that derive the same lists the layout keeps one copy.
    pattern.tensors = tensors
    return pattern


def build_schedule(layout: FanInLayout, lists: Orientation) -> tuple[Tensor, ...]:
    """The order in which the kernels walk the lists: three int tensors."""
    check_orientation(lists)
    _check_device("layout", layout.indices)
    rows, features, in_block = layout.block_rows, layout.in_features, layout.block[1]
    if lists == "columns":
        rows, features, in_block = layout.block_cols, layout.out_features, layout.block[0]
    size, panels = _panel(features, in_block, layout.num_blocks / rows)
    schedule = _Schedule(
        (
            torch.empty(panels * rows + 1, dtype=torch.int64),  # first feature of each entry
            torch.empty(layout.num_blocks * in_block, dtype=torch.int32),  # within its panel
            torch.empty(layout.num_blocks, dtype=torch.int32),  # stored block
        )
    )
    schedule.pattern = _lists(layout, lists)
    schedule.pattern.tensors += tuple(schedule)
    schedule.pattern.build_schedule(size, *(tensor.data_ptr() for tensor in schedule))
    return schedule


def _scheduled(layout: FanInLayout, lists: Orientation) -> _extension.Pattern:
    schedule = layout.cache.get(f"cpu.{lists}")
    if schedule is None:
        schedule = layout.derive(f"cpu.{lists}", lambda this: build_schedule(this, lists))
    assert isinstance(schedule, _Schedule)
    return schedule.pattern


def _check_device(name: str, tensor: Tensor) -> None:
    if not tensor.is_cpu:
        raise ValueError(f"{name} must be on the cpu, got {tensor.device}")


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    _check_device(name, tensor)
    check_tensor(name, tensor, shape, dtype)


def _check_first(name: str, tensor: Tensor) -> int:
    """The extension's number of the dtype that all arguments share."""
    assert _extension is not None, _missing
    check_float(name, tensor, CPU_DTYPES)
    return _DTYPES[tensor.dtype]


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Memory for a result: a large one is asked for in huge pages, as numpy does.

    Else the kernels would wait for the system at each of its small pages.
    """
    out = like.new_empty(shape)
    if out.nbytes >= _HUGE_BYTES:
        assert _extension is not None
        _extension.use_huge_pages(out.data_ptr(), out.nbytes)
    return out


def _gather(
    name: str,
    x: Tensor,
    values: Tensor,
    layout: FanInLayout,
    bias: Tensor | None,
    widths: tuple[int, int],
    scatters: bool,
    pattern: _extension.Pattern,
) -> Tensor:
    dtype = _check_first(name, x)
    width, out_width = widths
    tokens = x.shape[0]
    # At once where all fits, for the sake of calls with one token.
    if x.shape != (tokens, width) or not x.is_cpu:
        _check(name, x, (None, width), x.dtype)
    if values.shape != layout.values_shape or values.dtype != x.dtype or not values.is_cpu:
        _check("values", values, layout.values_shape, x.dtype)
    if bias is not None:
        if bias.shape != (out_width,) or bias.dtype != x.dtype or not bias.is_cpu:
            _check("bias", bias, (out_width,), x.dtype)
        bias = bias.contiguous()
    values = values.contiguous()
    out = _empty(x, tokens, out_width)
    (_extension.scatter if scatters else _extension.gather)(
        _isa,
        dtype,
        pattern,
        x.data_ptr(),
        *x.stride(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        tokens,
        torch.get_num_threads(),
    )
    return out


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), any strides, to (M, N) contiguous. See `reference.forward`."""
    widths = layout.in_features, layout.out_features
    return _gather("x", x, values, layout, bias, widths, False, _scheduled(layout, "rows"))


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: (M, N), any strides, to (M, K) contiguous. See `reference.grad_input`."""
    widths = layout.out_features, layout.in_features
    walked = _walks(layout)
    scatters = walked == "rows"
    if grad_output.shape[0] == 1 and layout.block == (1, 1) and _scatters_exactly(layout):
        # One token meets the values in order, where the columns would send it all over them.
        scatters, pattern = True, _lists(layout, "rows")
    else:
        pattern = _scheduled(layout, walked)
    return _gather("grad_output", grad_output, values, layout, bias, widths, scatters, pattern)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), any strides, to `layout.values_shape`."""
    dtype = _check_first("grad_output", grad_output)
    _check("grad_output", grad_output, (None, layout.out_features), grad_output.dtype)
    _check("x", x, (grad_output.shape[0], layout.in_features), grad_output.dtype)
    out = _empty(x, *layout.values_shape)
    _extension.grad_weight(
        _isa,
        dtype,
        _scheduled(layout, "rows"),
        grad_output.data_ptr(),
        *grad_output.stride(),
        x.data_ptr(),
        *x.stride(),
        out.data_ptr(),
        x.shape[0],
        torch.get_num_threads(),
    )
    return out


def sum_tokens(grad_output: Tensor) -> Tensor:
    """`(M, N)`, any strides, to `(N,)`, accumulated in float32 at least and rounded once."""
    dtype = _check_first("grad_output", grad_output)
    _check("grad_output", grad_output, (None, None), grad_output.dtype)
    if grad_output.stride(1) != 1:
        grad_output = grad_output.contiguous()
    out = torch.empty(grad_output.shape[1], dtype=grad_output.dtype)
    _extension.sum_tokens(
        _isa,
        dtype,
        grad_output.data_ptr(),
        grad_output.stride(0),
        out.data_ptr(),
        *grad_output.shape,
        torch.get_num_threads(),
    )
    return out


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keeps the `k` entries of largest magnitude of each row of x (M, D), any strides."""
    return _topk(x, k, "abs_topk")


def gelu_abs_topk(x: Tensor, k: int) -> Tensor:
    """`abs_topk(gelu(x), k)` of x (M, D), any strides, without the tensor in between."""
    return _topk(x, k, "gelu_abs_topk")


def _topk(x: Tensor, k: int, kernel: str) -> Tensor:
    dtype = _check_first("x", x)
    _check("x", x, (None, None), x.dtype)
    check_kept(k, x.shape[1])
    out = _empty(x, *x.shape)
    getattr(_extension, kernel)(
        _isa,
        dtype,
        x.data_ptr(),
        *x.stride(),
        out.data_ptr(),
        *x.shape,
        k,
        torch.get_num_threads(),
    )
    return out


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`grad_output` where the kept `y` (M, D) is not zero, elsewhere 0; both with any strides."""
    dtype = _check_first("grad_output", grad_output)
    _check("grad_output", grad_output, (None, None), grad_output.dtype)
    _check("y", y, tuple(grad_output.shape), grad_output.dtype)
    out = _empty(y, *y.shape)
    _extension.abs_topk_backward(
        _isa,
        dtype,
        grad_output.data_ptr(),
        *grad_output.stride(),
        y.data_ptr(),
        *y.stride(),
        out.data_ptr(),
        *y.shape,
        torch.get_num_threads(),
    )
    return out


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`grad_output * gelu'(x)` where the kept `y` (M, D) is not zero, elsewhere 0; any strides."""
    dtype = _check_first("grad_output", grad_output)
    _check("grad_output", grad_output, (None, None), grad_output.dtype)
    _check("y", y, tuple(grad_output.shape), grad_output.dtype)
    _check("x", x, tuple(grad_output.shape), grad_output.dtype)
    out = _empty(y, *y.shape)
    _extension.gelu_abs_topk_backward(
        _isa,
        dtype,
        grad_output.data_ptr(),
        *grad_output.stride(),
        y.data_ptr(),
        *y.stride(),
        x.data_ptr(),
        *x.stride(),
        out.data_ptr(),
        *y.shape,
        torch.get_num_threads(),
    )
    return out


def norm_abs_topk(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor]:
    """`abs_topk` of RMSNorm of x (M, D), any strides, and each row's scale.

    See `reference.norm_abs_topk`.
    """
    dtype = _check_first("x", x)
    _check("x", x, (None, None), x.dtype)
    _check("weight", weight, (x.shape[1],), x.dtype)
    check_kept(k, x.shape[1])
    weight = weight.contiguous()
    wide = wide_dtype(x.dtype)
    y, scales = _empty(x, *x.shape), torch.empty(x.shape[0], dtype=wide)
    _extension.norm_abs_topk(
        _isa,
        dtype,
        x.data_ptr(),
        *x.stride(),
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        scales.data_ptr(),
        *x.shape,
        k,
        torch.get_num_threads(),
    )
    return y, scales


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x (M, D) and weight (D,). See `reference.norm_abs_topk_backward`."""
    dtype = _check_first("grad_output", grad_output)
    _check("grad_output", grad_output, (None, None), grad_output.dtype)
    M, D = grad_output.shape
    for name, tensor in (("y", y), ("x", x)):
        _check(name, tensor, (M, D), grad_output.dtype)
    _check("weight", weight, (D,), grad_output.dtype)
    wide = wide_dtype(x.dtype)
    _check("scales", scales, (M,), wide)
    grad_output, y, x = (
        tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (grad_output, y, x)
    )
    weight, scales = weight.contiguous(), scales.contiguous()
    grad, grad_weight = _empty(x, M, D), torch.empty(D, dtype=x.dtype)
    _extension.norm_abs_topk_backward(
        _isa,
        dtype,
        grad_output.data_ptr(),
        grad_output.stride(0),
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        scales.data_ptr(),
        grad.data_ptr(),
        grad_weight.data_ptr(),
        M,
        D,
        torch.get_num_threads(),
    )
    return grad, grad_weight


def _heads(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`(B, T, H, d)` with neighbouring channels next to each other."""
    _check(name, tensor, shape, dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _heads_pointer(tensor: Tensor) -> tuple[int, int, int, int]:
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)


def _wide_sinks(sinks: Tensor | None, heads: int, wide: torch.dtype) -> Tensor | None:
    if sinks is None:
        return None
    _check("sinks", sinks, (heads,), sinks.dtype)
    return sinks.to(wide).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """q `(B, T, H, d)`, k and v `(B, S, H, d)`, any strides. See `reference.attention`."""
    dtype = _check_first("q", q)
    B, T, H, d = q.shape
    S = k.shape[1]
    if T > S:
        raise ValueError(f"q must have at most the {S} positions of k, got {T}")
    q = _heads("q", q, (B, T, H, d), q.dtype)
    k = _heads("k", k, (B, S, H, d), q.dtype)
    v = _heads("v", v, (B, S, H, d), q.dtype)
    wide = wide_dtype(q.dtype)
    sinks = _wide_sinks(sinks, H, wide)
    y = _empty(q, B, T, H, d)
    lse = torch.empty((B, H, T), dtype=wide)
    _extension.attention(
        _isa,
        dtype,
        (B, T, S, H, d),
        _heads_pointer(q),
        _heads_pointer(k),
        _heads_pointer(v),
        0 if sinks is None else sinks.data_ptr(),
        y.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return y, lse


def attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """qkv `(B, T, 3, H, d)`, any strides. See `reference.attention_backward`."""
    dtype = _check_first("qkv", qkv)
    B, T, _, H, d = qkv.shape
    shape = (B, T, H, d)
    q, k, v = (_heads("qkv", part, shape, qkv.dtype) for part in qkv.unbind(2))
    y = _heads("y", y, shape, qkv.dtype)
    grad_y = _heads("grad_y", grad_y, shape, qkv.dtype)
    wide = wide_dtype(qkv.dtype)
    _check("lse", lse, (B, H, T), wide)
    lse = lse.contiguous()
    wide_sinks = _wide_sinks(sinks, H, wide)
    grad = _empty(qkv, B, T, 3, H, d)
    grad_sinks = torch.zeros((B, H), dtype=wide)
    _extension.attention_backward(
        _isa,
        dtype,
        (B, T, T, H, d),
        _heads_pointer(q),
        _heads_pointer(k),
        _heads_pointer(v),
        0 if wide_sinks is None else wide_sinks.data_ptr(),
        _heads_pointer(y),
        _heads_pointer(grad_y),
        lse.data_ptr(),
        *(_heads_pointer(part) for part in grad.unbind(2)),
        grad_sinks.data_ptr(),
        torch.get_num_threads(),
    )
    if sinks is None:
        return grad, grad.new_empty(0)
    return grad, grad_sinks.sum(0).to(sinks.dtype)
