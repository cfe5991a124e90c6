"""The CUDA backend: allocates, and hands addresses to the CUDA kernels; `ops` checks arguments.

The kernels (`csrc/cuda/`) keep a tile of tokens in shared memory and stream the blocks past it, so
they serve unstructured weights and small blocks; square blocks from 32 to 128 in 16 bits have
kernels of their own on compute capability 9.0. They are launched on PyTorch's current stream and
nothing here waits for the device, so that CUDA graphs can capture them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from sparse_kernels.checks import Orientation
from sparse_kernels.layout import FanInLayout, Problem
from sparse_kernels.reference import bias_grad as bias_grad  # as good on a GPU


def _why_driver_is_too_old(extension: ModuleType) -> str | None:
    """A driver serves all runtimes of its own major version and of those before.

    PyTorch may run nevertheless: it brings a runtime of its own.
    """
    serves, needs = extension.driver_version(), extension.runtime_version()
    if serves // 1000 >= needs // 1000:
        return None
    serves, needs = (f"{version // 1000}.{version % 1000 // 10}" for version in (serves, needs))
    return (
        f"the extension was built with CUDA {needs}, and the GPU driver serves only {serves}: "
        "install a newer driver, or build with an older toolkit"
    )


_missing: str | None = None
try:
    import _sparse_kernels_cuda as _extension

    _missing = _why_driver_is_too_old(_extension)
except ImportError as error:
    _extension: ModuleType | None = None  # type: ignore[no-redef]
    _missing = (
        f"the CUDA extension _sparse_kernels_cuda could not be imported ({error}): to build it, "
        "install the CUDA toolkit (nvcc) and run `SPARSE_KERNELS_CUDA=1 pip install .` in the "
        "source folder"
    )

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# "cpu" in tests that run the kernels on the CPU: see `_emulated`.
_device_type = "cuda"
# A whole block lies in shared memory and is one part of a sum.
_MAX_BLOCK_SIDE = 128
_MAX_BLOCKS = 2**31 - 1
_MAX_ROW = 2**30
# Neighbouring units that the order of the columns keeps together: csrc/cuda/spmm.cu.
_RUN = 32
# Block-rows that the kernel of 32 x 32 blocks takes together: csrc/cuda/kernels.h.
_GROUP_ROWS = 22
# The most features of a tile in shared memory at a time, if they fit. Tests lower them.
_SLICE_FEATURES = 2**20
_GRAD_WEIGHT_SLICE_FEATURES = 2**20
# Rows of `abs_topk` up to this size are held in registers, if they fit.
_HELD_BYTES = 2**20


@contextmanager
def _emulated(extension: ModuleType) -> Iterator[None]:
    """For tests: runs the body with kernels that were built for the CPU, on CPU tensors only."""
    global _extension, _missing, _device_type
    before = _extension, _missing, _device_type
    _extension, _missing, _device_type = extension, _why_driver_is_too_old(extension), "cpu"
    try:
        yield
    finally:
        _extension, _missing, _device_type = before


def why_not(problem: Problem) -> str | None:
    """None if this backend can run `problem`, else a sentence that says why not."""
    if problem.device != _device_type:
        return f"it runs on {_device_type} tensors, and the device is {problem.device}"
    if _missing is not None:
        return _missing
    if _device_type == "cuda" and not torch.cuda.is_available():
        return "PyTorch finds no GPU (torch.cuda.is_available() is False)"
    if problem.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, and the dtype is {problem.dtype}"
    if problem.product == "attention":
        return "it has no attention: torch.nn.functional.scaled_dot_product_attention serves GPUs"
    block_out, block_in = problem.block
    if max(problem.block) > _MAX_BLOCK_SIDE:
        return (
            f"the sides of its blocks are at most {_MAX_BLOCK_SIDE}, and the block is "
            f"({block_out}, {block_in})"
        )
    if max(problem.out_features, problem.in_features) > _MAX_BLOCKS:
        return (
            f"it counts at most {_MAX_BLOCKS} features, and the layout has "
            f"{max(problem.out_features, problem.in_features)}"
        )
    blocks = problem.out_features // block_out * (problem.fan_in // block_in)
    if blocks > _MAX_BLOCKS:
        return f"it counts at most {_MAX_BLOCKS} blocks, and the layout has {blocks}"
    return None


def _is_narrow(columns: int) -> bool:
    """Whether 16 bits hold the indices of that many columns."""
    return columns <= 2**16


def _units(rows: int, size: int) -> int:
    """The number of units: 4, 2 or 1 neighbouring outputs of block-rows of `size` outputs."""
    return rows * size // (4 if size % 4 == 0 else 2 if size % 2 == 0 else 1)


def _order(lengths: Tensor, block_in: int) -> Tensor:
    """The order in which the kernel takes the units of block columns with lists of these lengths.

    Runs of 32 units stay together, so that stores are coalesced. The run with the longest list
    comes first; if units are single outputs, the longest list of each run comes first too. The sort
    is stable, and an incomplete last run stays the last.
    """
    count = _units(lengths.shape[0], block_in)
    units = torch.arange(count, device=lengths.device)
    full = count - count % _RUN
    of_units = lengths.repeat_interleave(count // lengths.shape[0])
    runs = units[:full].view(-1, _RUN)
    if block_in == 1:
        inside = of_units[:full].view(-1, _RUN).sort(dim=1, descending=True, stable=True).indices
        runs = runs.gather(1, inside)
        units[full:] = full + of_units[full:].sort(descending=True, stable=True).indices
    longest = of_units[:full].view(-1, _RUN).amax(1).sort(descending=True, stable=True).indices
    units[:full] = runs[longest].flatten()
    return units.to(torch.int32)


def build_schedule(layout: FanInLayout, lists: Orientation) -> tuple[Tensor, ...]:
    """What the kernels need beside the lists.

    For "columns": the stored block of each entry, the order of the units (see `_order`), and for
    1 x 1 blocks the start of each list in that order, in groups of 4 entries, the first block of
    words of each eight lists (as many as the longest has groups), and the eight of each block;
    int32. For both: the column indices as unsigned 16-bit integers, if these are wide enough.
    """
    parts = []
    columns, count = layout.indices.flatten(), layout.block_cols
    if lists == "columns":
        transposed = layout.transposed
        columns, count = transposed.rows, layout.block_rows
        parts.append(transposed.rows * layout.blocks_per_row + transposed.slots)
        lengths = transposed.offsets.diff()
        parts.append(_order(lengths, layout.block[1]))
        if layout.block == (1, 1):
            fours = ((lengths + 3) // 4)[parts[-1]].cumsum(0)
            parts.append(torch.nn.functional.pad(fours, (1, 0)).to(torch.int32))
            eights = torch.nn.functional.pad(lengths, (0, -len(lengths) % 8)).view(-1, 8)
            blocks = ((eights.amax(1) + 3) // 4).clamp(min=1)
            octets = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)
            parts.append(torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).to(torch.int32))
            parts.append(octets.repeat_interleave(blocks))
    if _is_narrow(count):
        # The upper half of the unsigned numbers has the bits of negative ones.
        parts.append((columns - (columns >= 2**15).int() * 2**16).to(torch.int16))
    return tuple(parts)


def _scheduled(
    layout: FanInLayout, lists: Orientation
) -> tuple[_extension.Lists, tuple[Tensor, ...]]:
    """The extension's pointers to the lists and their schedule, and the schedule's tensors."""
    tensors = layout.derive(f"cuda.{lists}", lambda this: build_schedule(this, lists))
    geometry = (layout.block_rows, layout.blocks_per_row, layout.block_cols, *layout.block)
    transposed = lists == "columns"
    narrow = _is_narrow(layout.block_rows if transposed else layout.block_cols)
    wide = layout.transposed.rows if transposed else layout.indices
    columns = (tensors[-1] if narrow else wide).data_ptr(), narrow, wide.data_ptr()
    if not transposed:
        return _extension.Lists.rows(*geometry, *columns), tensors
    offsets, (ids, order) = layout.transposed.offsets, tensors[:2]
    words = tensors[2:5] if layout.block == (1, 1) else ()
    addresses = [part.data_ptr() for part in words] or [0, 0, 0]
    pointers = ids.data_ptr(), order.data_ptr(), *addresses, words[-1].numel() if words else 0
    return _extension.Lists.columns(*geometry, offsets.data_ptr(), *columns, *pointers), tensors


def _slots(layout: FanInLayout, lists: Orientation, queue: tuple[int, int]) -> tuple[Tensor]:
    """Which weight lies in which slot of the words of 1 x 1 blocks in 16 bits."""
    pointed, _ = _scheduled(layout, lists)
    count = _extension.spmm_slots(pointed, _SLICE_FEATURES, queue[0])
    slots = torch.empty(count, dtype=torch.int32, device=layout.device)
    _extension.order_slots(pointed, slots.data_ptr(), *queue)
    return (slots,)


def build_groups(layout: FanInLayout, lists: Orientation) -> tuple[Tensor, ...]:
    """The groups of block-rows that the kernel of 32 x 32 blocks takes together (`Groups`).

    Rows are dealt to groups, and to the blocks of threads and warps of each, the longest first.
    """
    columns, count = layout.indices.flatten(), layout.block_cols
    lengths = columns.new_full((layout.block_rows,), layout.blocks_per_row)
    if lists == "columns":
        columns, count = layout.transposed.rows, layout.block_rows
        lengths = layout.transposed.offsets.diff()
    rows = len(lengths)
    groups = -(-rows // _GROUP_ROWS)
    places = torch.arange(rows, device=columns.device)
    order = lengths.argsort(descending=True, stable=True)
    members = torch.full((groups, _GROUP_ROWS), -1, dtype=torch.int32, device=columns.device)
    members[places % groups, places // groups] = order.to(torch.int32)
    group_of = torch.empty_like(places)
    group_of[order] = places % groups
    entries = group_of.repeat_interleave(lengths)
    # Each column of a group once, ascending.
    keys, found, readers = (entries * count + columns).unique(
        return_inverse=True, return_counts=True
    )
    begins = torch.searchsorted(keys, torch.arange(groups + 1, device=keys.device) * count)
    read = torch.stack((keys % count, readers), 1)
    return tuple(part.to(torch.int32) for part in (members, begins, read, found - begins[entries]))


def _dealt(layout: FanInLayout, count: int, queue: tuple[int, int]) -> tuple[Tensor]:
    """How the rows that `grad_weight` gathers are dealt to matrices."""
    dealt = torch.empty(count, dtype=torch.int64, device=layout.device)
    _extension.deal_rows(_scheduled(layout, "rows")[0], dealt.data_ptr(), *queue)
    return (dealt,)


def _queue(tensor: Tensor) -> tuple[int, int]:
    """The index of the tensor's device and the address of its current stream."""
    if _device_type != "cuda":
        return 0, 0
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def _on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one of PyTorch."""
    if _device_type != "cuda" or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def _check_row(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] > _MAX_ROW:
        raise ValueError(
            f"{name} must have rows of at most {_MAX_ROW} entries, got {tensor.shape[1]}"
        )


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    """The address and strides of a matrix."""
    return tensor.data_ptr(), *tensor.stride()


def _spmm(
    product: str, x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None
) -> Tensor:
    transposed = product == "grad_input"
    dtype, size = _DTYPES[x.dtype], values.element_size()
    bias = None if bias is None else bias.contiguous()
    values = values.contiguous()
    with _on_device_of(x):
        out = x.new_empty(x.shape[0], layout.in_features if transposed else layout.out_features)
        if out.shape[0] == 0:
            return out
        queue = _queue(x)
        lists: Orientation = "columns" if transposed else "rows"
        pointed, schedule = _scheduled(layout, lists)
        # 1 x 1 blocks are packed into words together with their indices, if these fit.
        count = _extension.spmm_words(dtype, pointed, _SLICE_FEATURES, queue[0])
        words = torch.empty(count * max(1, size // 2), dtype=torch.int32, device=x.device)
        if count and size == 2:
            (slots,) = layout.derive(f"cuda.{lists}.slots", lambda this: _slots(this, lists, queue))
            pointed.set_slots(slots.data_ptr())
        x_matrix, rows = _matrix(x), x.shape[0]
        problem = dtype, pointed, x_matrix, values.data_ptr(), rows
        on_hopper = _extension.spmm_on_hopper(*problem, *queue)
        if on_hopper and layout.block == (32, 32):
            groups = layout.derive(f"cuda.{lists}.groups", lambda this: build_groups(this, lists))
            pointed.set_groups(*(part.data_ptr() for part in groups))
        if transposed and not count and not on_hopper:
            # Each tile of tokens reads all values in the order of the lists: sort them once.
            ordered = torch.empty_like(values)
            shape = layout.num_blocks, layout.block[0] * layout.block[1] * size, size
            pointers = values.data_ptr(), ordered.data_ptr()
            _extension.pack_blocks(schedule[0].data_ptr(), *shape, *pointers, *queue)
            values = ordered
        inputs = *x_matrix, values.data_ptr(), 0 if bias is None else bias.data_ptr()
        outputs = words.data_ptr() if count else 0, out.data_ptr()
        sizes = rows, _SLICE_FEATURES, on_hopper
        _extension.spmm(product, dtype, pointed, *inputs, *outputs, *sizes, *queue)
    return out


def forward(x: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None) -> Tensor:
    """`Y = X W^T (+ b)`: x (M, K), any strides, to (M, N) contiguous. See `reference.forward`.

    float32, bfloat16 or float16, summed in float32.

    Raises:
        RuntimeError: CUDA refuses the launch, or memory runs out; it names kernel and problem.
    """
    return _spmm("forward", x, values, layout, bias)


def grad_input(
    grad_output: Tensor, values: Tensor, layout: FanInLayout, bias: Tensor | None = None
) -> Tensor:
    """`dX = dY W (+ b)`: (M, N), any strides, to (M, K) contiguous. See `reference.grad_input`.

    Needs working memory of the size of `values`, for 1 x 1 blocks also of their indices; in 16 bits
    8.5 bytes for each weight of eight neighbouring lists that are as long as their longest. Square
    blocks of 32, 64 and 128 in 16 bits on compute capability 9.0 need none.
    """
    return _spmm("grad_input", grad_output, values, layout, bias)


def grad_weight(grad_output: Tensor, x: Tensor, layout: FanInLayout) -> Tensor:
    """`dW = dY^T X` at the kept blocks: (M, N), (M, K), any strides, to `layout.values_shape`.

    Needs working memory of at most 16 float32 for each element of the result, for unstructured
    weights in 16 bits 132. Their number depends only on M, the layout and the kernel, and with it
    the order of the sums.
    """
    dtype = _DTYPES[x.dtype]
    with _on_device_of(x):
        out = x.new_empty(layout.values_shape)
        pointed, _ = _scheduled(layout, "rows")
        matrices, rows = (_matrix(grad_output), _matrix(x)), x.shape[0]
        queue = _queue(x)
        on_hopper = _extension.sddmm_on_hopper(dtype, pointed, *matrices, rows, *queue)
        parts = _extension.sddmm_parts(dtype, pointed, rows, on_hopper)
        partial = torch.empty((parts, layout.nnz), dtype=torch.float32, device=x.device)
        if count := _extension.sddmm_gathers(dtype, pointed):
            (dealt,) = layout.derive("cuda.rows.dealt", lambda this: _dealt(this, count, queue))
            pointed.set_dealt(dealt.data_ptr())
        inputs, outputs = (*matrices[0], *matrices[1]), (partial.data_ptr(), out.data_ptr())
        sizes = rows, _GRAD_WEIGHT_SLICE_FEATURES, on_hopper
        _extension.sddmm(dtype, pointed, *inputs, *outputs, *sizes, *queue)
    return out


def abs_topk(x: Tensor, k: int) -> Tensor:
    """Keeps the `k` entries of largest magnitude of each row of x (M, D), any strides.

    Exact: among equals the lowest index stays, NaN counts as larger than infinity.
    """
    return _abs_topk("abs_topk", x, k)


def gelu_abs_topk(x: Tensor, k: int) -> Tensor:
    """`abs_topk(gelu(x), k)` of x (M, D), any strides. See `reference.gelu_abs_topk`."""
    return _abs_topk("gelu_abs_topk", x, k)


def norm_abs_topk(x: Tensor, weight: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.norm_abs_topk`; x (M, D) with any strides."""
    weight, scales = weight.contiguous(), x.new_empty(x.shape[0], dtype=torch.float32)
    more = weight.data_ptr(), eps, scales.data_ptr()
    return _abs_topk("norm_abs_topk", x, k, *more), scales


def _abs_topk(kernel: str, x: Tensor, k: int, *before: float) -> Tensor:
    _check_row("x", x)
    with _on_device_of(x):
        out = x.new_empty(x.shape)
        inputs, sizes = (_DTYPES[x.dtype], *before), (*x.shape, k, _HELD_BYTES)
        run = getattr(_extension, kernel)
        run(*inputs, _matrix(x), out.data_ptr(), *sizes, *_queue(x))
    return out


def abs_topk_backward(grad_output: Tensor, y: Tensor) -> Tensor:
    """`grad_output` where the kept `y` (M, D) is not zero, elsewhere 0; both with any strides.

    A NaN in y is not zero.
    """
    return _abs_topk_backward(grad_output, y, (0, 0, 0))


def gelu_abs_topk_backward(grad_output: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """See `reference.gelu_abs_topk_backward`; all (M, D), any strides."""
    return _abs_topk_backward(grad_output, y, _matrix(x))


def _abs_topk_backward(grad_output: Tensor, y: Tensor, x: tuple[int, ...]) -> Tensor:
    _check_row("y", y)
    with _on_device_of(y):
        out = y.new_empty(y.shape)
        inputs = _matrix(grad_output), _matrix(y), x
        _extension.abs_topk_backward(
            _DTYPES[y.dtype], *inputs, out.data_ptr(), *y.shape, *_queue(y)
        )
    return out


def norm_abs_topk_backward(
    grad_output: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of x (M, D), any strides, and weight. See `reference.norm_abs_topk_backward`.

    Needs working memory of at most 528 float32 for each element of weight.
    """
    _check_row("y", y)
    weight, scales = weight.contiguous(), scales.contiguous()
    with _on_device_of(y):
        out, grad_weight = y.new_empty(y.shape), torch.zeros_like(weight)
        count = _extension.norm_partial(*y.shape)
        partial = torch.empty(count, dtype=torch.float32, device=y.device)
        inputs = *map(_matrix, (grad_output, y, x)), weight.data_ptr(), scales.data_ptr()
        outputs = partial.data_ptr(), out.data_ptr(), grad_weight.data_ptr()
        _extension.norm_abs_topk_backward(_DTYPES[y.dtype], *inputs, *outputs, *y.shape, *_queue(y))
    return out, grad_weight
