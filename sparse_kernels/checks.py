"""What every entrance refuses before a pointer is read: types, dtypes, shapes and devices."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

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


def names_of(dtypes: tuple[torch.dtype, ...]) -> str:
    """The dtypes as a message lists them."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_is_tensor(name: str, tensor: object) -> Tensor:
    """Returns `tensor` if it is a Tensor, else raises TypeError with what to do about it."""
    if isinstance(tensor, Tensor):
        return tensor
    hint = ""
    if type(tensor).__module__.startswith("torch.fx"):
        hint = "; torch.fx.symbolic_trace cannot trace it: use torch.export, or make it a leaf"
    raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")


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
        raise TypeError(f"{name} must be one of {names_of(dtypes)}{where}, got {tensor.dtype}")
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
