"""Checks of arguments: types, dtypes, shapes and devices, with the messages."""

from __future__ import annotations

from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# The lists that a product walks: the inputs of each output, or the outputs of each input.
Orientation = Literal["rows", "columns"]

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = {"cpu": CPU_DTYPES, "cuda": FLOAT_DTYPES}
_INT32_MAX = 2**31 - 1


def check_type(name: str, value: object, kind: Any, what: str) -> None:
    """Raises TypeError unless `value` is an instance of `kind`, which the message calls `what`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def check_int(name: str, value: object, minimum: int = 1) -> int:
    """Returns `value` as an int; numpy integers are ints, a bool is not.

    Raises:
        TypeError: `value` is not an int. ValueError: it is below `minimum`.
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

    Raises TypeError or ValueError; the message names the argument.
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
    """Returns `F = fan_in / block_in`, or raises TypeError or ValueError."""
    elements = check_int(name, fan_in)
    if elements % block_in:
        raise ValueError(
            f"{name} counts elements and must be a multiple of the block's extent {block_in} "
            f"along the same side, got {elements}"
        )
    if elements > in_features:
        raise ValueError(
            f"{name} must be at most {in_features}, the number of features, got {elements}"
        )
    return elements // block_in


def check_num_blocks(rows: int, count: int) -> None:
    """Raises ValueError if `rows` block-rows of `count` blocks are more than int32 can count."""
    if rows * count > _INT32_MAX:
        raise ValueError(
            f"a layout may have at most {_INT32_MAX} blocks, got {rows} block-rows of {count} = "
            f"{rows * count}: use a smaller fan or larger blocks"
        )


def has_values(tensor: object) -> bool:
    """False for tensors on the meta device or in a FakeTensorMode, which only have a shape."""
    return not isinstance(tensor, FakeTensor) and not getattr(tensor, "is_meta", False)


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raises ValueError if `tensor` only has a shape."""
    if not has_values(tensor):
        kind = "a FakeTensor" if isinstance(tensor, FakeTensor) else "a tensor on the meta device"
        raise ValueError(f"{name} must hold values, got {kind}")


def check_is_tensor(name: str, tensor: object) -> Tensor:
    """Returns `tensor` if it is a Tensor, else raises TypeError."""
    if isinstance(tensor, Tensor):
        return tensor
    hint = ""
    if type(tensor).__module__.startswith("torch.fx"):
        hint = "; torch.fx.symbolic_trace cannot trace it: use torch.export, or make it a leaf"
    raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")


def check_strided(name: str, tensor: object) -> Tensor:
    """Returns `tensor` if it is a Tensor that is not sparse, else raises TypeError."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        return tensor
    tensor = check_is_tensor(name, tensor)
    raise TypeError(f"{name} must be a strided tensor, got {tensor.layout}")


def check_float(name: str, tensor: object, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Returns `tensor` if it is a strided Tensor of `dtypes`, by default those of its device."""
    tensor = check_strided(name, tensor)
    allowed = dtypes
    if allowed is None:
        allowed = DTYPES["cpu" if tensor.is_cpu else "cuda"]
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        hint = ""
        if tensor.dtype == torch.float16 and tensor.is_cpu:
            hint = ": float16 runs on GPUs only, call .bfloat16() on the model and its input"
        raise TypeError(
            f"{name} must be one of {names} on {tensor.device.type}, got {tensor.dtype}{hint}"
        )
    return tensor


def check_tensor(
    name: str, tensor: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises TypeError or ValueError unless `tensor` is strided and has all of these."""
    if (
        isinstance(tensor, Tensor)
        and tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.layout is torch.strided
    ):
        return
    tensor = check_strided(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_kept(k: int, width: int) -> None:
    """Raises ValueError unless `k` entries can be kept of rows of `width`."""
    if not 1 <= k <= width:
        raise ValueError(f"k must be from 1 to {width}, the size of the last axis, got {k}")


def check_size(name: str, size: int) -> None:
    """Raises ValueError if `size` is negative."""
    if size < 0:
        raise ValueError(f"{name} must be at least 0, got {size}")


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


def finish(device: torch.device) -> None:
    """Waits for what the current stream of a GPU has written, so that all streams may read it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def refuse_jit_trace() -> None:
    """Raises RuntimeError while torch.jit.trace records, which cannot record these operations."""
    if not torch.compiler.is_dynamo_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record the operations of sparse_kernels: use torch.export"
        )
