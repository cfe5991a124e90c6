"""What every entrance refuses before a pointer is read: types, dtypes, shapes and devices."""

from __future__ import annotations

from numbers import Integral
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# The lists that a product walks: the inputs of each output, or the outputs of each input.
Orientation = Literal["rows", "columns"]


class Geometry(Protocol):
    """What the checks need to know of a pattern: a FanInLayout has it, and what tracers see."""

    @property
    def in_features(self) -> int:
        """`K`."""

    @property
    def out_features(self) -> int:
        """`N`."""

    @property
    def block(self) -> tuple[int, int]:
        """`(block_out, block_in)`."""

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """`(R, F, block_out, block_in)`."""

    @property
    def device(self) -> torch.device:
        """Where the pattern lives."""


CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DTYPES = {"cpu": CPU_DTYPES, "cuda": (*CPU_DTYPES[:2], torch.float16, torch.float64)}


_INT32_MAX = 2**31 - 1


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as a message lists them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_int(name: str, value: object, minimum: int = 1) -> int:
    """Returns `value` as an int if it is one, numpy's included (a bool is not), of `minimum` up.

    Raises TypeError or ValueError with `name`, what it got and what it needs.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_block(block: object) -> tuple[int, int]:
    """Returns `block` as a pair of positive ints, or raises TypeError or ValueError."""
    if not isinstance(block, (tuple, list)) or len(block) != 2:
        raise TypeError(f"block must be a pair (block_out, block_in) of ints, got {block!r}")
    return check_int("block[0] (block_out)", block[0]), check_int("block[1] (block_in)", block[1])


def check_geometry(out_features: object, in_features: object, block: object) -> tuple[int, int]:
    """Returns `block` as a pair of ints that divides the `(out_features, in_features)` matrix.

    Raises TypeError or ValueError with the argument's name, what it got and what it needs.
    """
    sizes = {
        "out_features": check_int("out_features", out_features),
        "in_features": check_int("in_features", in_features),
    }
    pair = check_block(block)
    for (name, size), part, extent in zip(
        sizes.items(), ("block_out", "block_in"), pair, strict=True
    ):
        if size % extent:
            raise ValueError(
                f"block {pair} does not fit: {part} must divide {name}, "
                f"and {extent} does not divide {size}"
            )
        if size // extent > _INT32_MAX:
            raise ValueError(f"{name} / {part} must be at most {_INT32_MAX}, got {size // extent}")
    return pair


def check_fan_in(fan_in: object, in_features: int, block_in: int, name: str = "fan_in") -> int:
    """Returns `F`, the number of blocks that `fan_in` elements of each output's inputs make.

    Raises TypeError or ValueError with `name`, what it got and what it needs.
    """
    elements = check_int(name, fan_in)
    if elements % block_in:
        raise ValueError(
            f"{name} counts elements and must be a multiple of the block's extent {block_in} "
            f"along the same side, got {elements}"
        )
    if elements > in_features:
        raise ValueError(
            f"{name} must be at most {in_features}, the features there, got {elements}"
        )
    return elements // block_in


def check_num_blocks(rows: int, count: int) -> None:
    """Raises ValueError if a layout of `count` blocks in each of `rows` has too many to number."""
    if rows * count > _INT32_MAX:
        raise ValueError(
            f"a layout may have at most {_INT32_MAX} blocks, got {rows} block-rows of {count} = "
            f"{rows * count}: use a smaller fan or larger blocks"
        )


def check_is_tensor(name: str, tensor: object) -> Tensor:
    """Returns `tensor` if it is a Tensor, else raises TypeError with what to do about it."""
    if isinstance(tensor, Tensor):
        return tensor
    hint = ""
    if type(tensor).__module__.startswith("torch.fx"):
        hint = "; torch.fx.symbolic_trace cannot trace it: use torch.export, or make it a leaf"
    raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")


def has_values(tensor: Tensor) -> bool:
    """False for tensors of the meta device or of a FakeTensorMode, which are shapes alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raises ValueError if `tensor` is only a shape."""
    if not has_values(tensor):
        kind = "a FakeTensor" if isinstance(tensor, FakeTensor) else "a tensor on the meta device"
        raise ValueError(f"{name} must hold values, got {kind}")


def check_float(name: str, tensor: object, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Returns `tensor` if it is a Tensor of `dtypes`, by default what its device computes in."""
    tensor = check_is_tensor(name, tensor)
    where = ""
    if dtypes is None:
        if tensor.is_cpu and tensor.dtype in CPU_DTYPES:
            return tensor
        where = f" on {tensor.device.type}"
        dtypes = DTYPES.get(tensor.device.type, DTYPES["cuda"])
    if tensor.dtype not in dtypes:
        hint = ""
        if tensor.is_cpu and tensor.dtype == torch.float16:
            hint = ": float16 runs on GPUs only, call .bfloat16() on the model and its input"
        raise TypeError(
            f"{name} must be one of {names_of(dtypes)}{where}, got {tensor.dtype}{hint}"
        )
    return tensor


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype
) -> None:
    """Raises TypeError or ValueError unless `tensor` has this dtype and shape; None is any size."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(
        want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("M" if size is None else str(size) for size in shape)
        wanted += "," if len(shape) == 1 else ""
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_orientation(lists: str) -> None:
    """Raises ValueError unless `lists` is an `Orientation`."""
    if lists not in ("rows", "columns"):
        raise ValueError(f"lists must be 'rows' or 'columns', got {lists!r}")


def check_like(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """Raises ValueError unless both have one dtype and one device."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {other.dtype} on {other.device}, as {other_name} is, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def check_kept(k: int, width: int) -> None:
    """Raises ValueError unless `k` entries can be kept of rows of `width`."""
    if not 1 <= k <= width:
        raise ValueError(f"k must be from 1 to {width}, the size of the last axis, got {k}")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError during the capture of a CUDA graph, whose memory must not be cached.

    It belongs to the graph and holds nothing until the graph is replayed.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a layout's lists cannot be built while a CUDA graph is captured: run the step once "
            "before the capture"
        )


def refuse_jit_trace() -> None:
    """Raises RuntimeError while torch.jit.trace records, which cannot know these operations."""
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record the operations of sparse_kernels: use torch.export"
        )
