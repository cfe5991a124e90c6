"""Checks of arguments: types, dtypes, shapes and devices, with the messages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from sparse_kernels.layout import Layout

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
    if (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and tensor.numel()
        and not tensor.untyped_storage().nbytes()
    ):
        raise ValueError(f"{name} must hold values, and its storage was resized to 0")


def memory_of(tensor: Tensor) -> int:
    """A number that two tensors share if they are one or start at the same memory."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and has_values(tensor)
    return (plain and tensor.data_ptr()) or id(tensor)


def outside_transforms(tensor: Tensor) -> AbstractContextManager[Any]:
    """In its body what is made of `tensor` outlives a transform of `torch.func` in progress."""
    if (
        torch.compiler.is_dynamo_compiling()
        or not torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    ):
        return nullcontext()
    return torch._C._DisableFuncTorch()


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


def check_features(name: str, x: Tensor, layout: Layout, side: str) -> None:
    """x is `(..., side of the layout)`, on its device."""
    check_float(name, x)
    device = layout.indices.device
    if x.device != device:
        raise ValueError(f"{name} must be on the layout's device {device}, got {x.device}")
    width = getattr(layout, side)
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{name} must have the layout's {side} = {width} as its last dimension, "
            f"got shape {tuple(x.shape)}"
        )


def check_spmm(
    x: Tensor,
    values: Tensor,
    layout: Layout,
    bias: Tensor | None,
    transpose: bool,
    name: str = "x",
) -> None:
    """The operands of `Y = X W^T (+ b)`, or of `Y = X W (+ b)` if `transpose`; x is `(..., K)`."""
    check_features(name, x, layout, "out_features" if transpose else "in_features")
    check_tensor("values", values, layout.values_shape, x.dtype, x.device)
    if bias is not None:
        width = layout.in_features if transpose else layout.out_features
        check_tensor("bias", bias, (width,), x.dtype, x.device)


def check_sddmm(grad_output: Tensor, x: Tensor, layout: Layout) -> None:
    """The operands of `dW = dY^T X`, with any leading dimensions."""
    check_features("grad_output", grad_output, layout, "out_features")
    check_features("x", x, layout, "in_features")
    shape = (*grad_output.shape[:-1], layout.in_features)
    check_tensor("x", x, shape, grad_output.dtype, grad_output.device)


def check_rows(**tensors: Tensor) -> None:
    """Matrices of the shape, dtype and device of the first."""
    (first, like), *others = tensors.items()
    check_strided(first, like)
    if like.dim() != 2:
        raise ValueError(f"{first} must have two dimensions, got shape {tuple(like.shape)}")
    for name, tensor in others:
        check_tensor(name, tensor, like.shape, like.dtype, like.device)


def check_matrices(
    x: Tensor, values: Tensor, layout: Layout, bias: Tensor | None, transpose: bool
) -> None:
    name = "grad_output" if transpose else "x"
    check_rows(**{name: x})
    check_spmm(x, values, layout, bias, transpose, name)


def check_grad_weight(grad_output: Tensor, x: Tensor, layout: Layout) -> None:
    check_rows(grad_output=grad_output)
    check_sddmm(grad_output, x, layout)


def check_topk(x: Tensor, k: int) -> None:
    check_rows(x=x)
    if not 1 <= k <= x.shape[1]:
        raise ValueError(f"k must be from 1 to {x.shape[1]}, the size of the last axis, got {k}")


def check_norm(x: Tensor, weight: Tensor, k: int, eps: float) -> None:
    check_topk(x, k)
    check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)


def check_bits(bits: Tensor, rows: Tensor, width: int) -> None:
    """A bit for each entry of rows of `width`."""
    shape = (rows.shape[0], -(-width // 64))
    check_tensor("bits", bits, shape, torch.int64, rows.device)


def check_topk_backward(grad_output: Tensor, y: Tensor) -> None:
    check_rows(grad_output=grad_output)
    if check_strided("y", y).dtype == torch.int64:
        check_bits(y, grad_output, grad_output.shape[1])
    else:
        check_rows(grad_output=grad_output, y=y)


def check_unpack(values: Tensor, bits: Tensor, width: int, of_gelu: bool) -> None:
    check_rows(values=values)
    check_int("width", width, 0)
    check_bits(bits, values, width)


def check_pack(y: Tensor, x: Tensor, room: int) -> None:
    check_rows(y=y, x=x)
    check_int("room", room, 0)


def check_gelu_packed_backward(grad: Tensor, bits: Tensor, values: Tensor) -> None:
    check_rows(grad_output=grad)
    check_rows(values=values)
    shape = grad.shape[0], values.shape[1]
    check_tensor("values", values, shape, grad.dtype, grad.device)
    check_bits(bits, grad, grad.shape[1])


def check_norm_backward(grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, scales: Tensor) -> None:
    check_rows(grad_output=grad, y=y, x=x)
    check_tensor("weight", weight, x.shape[1:], x.dtype, x.device)
    check_tensor("scales", scales, x.shape[:1], wide_dtype(x.dtype), x.device)


def check_norm_packed_backward(
    grad: Tensor, bits: Tensor, x: Tensor, weight: Tensor, scales: Tensor
) -> None:
    check_norm_backward(grad, grad, x, weight, scales)
    check_bits(bits, grad, grad.shape[1])


def check_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """q `(B, T, H, d)`, k and v `(B, S, H, d)` with S at least T and d at least 1, sinks `(H,)`."""
    check_strided("q", q)
    check_is_tensor("k", k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] > k.shape[1] or q.shape[3] == 0:
        raise ValueError(
            f"q must be (B, T, H, d) and k (B, S, H, d) with S at least T and d at least 1, got "
            f"{tuple(q.shape)} and {tuple(k.shape)}"
        )
    shape = (q.shape[0], k.shape[1], *q.shape[2:])
    check_tensor("k", k, shape, q.dtype, q.device)
    check_tensor("v", v, shape, q.dtype, q.device)
    if sinks is not None:
        check_tensor("sinks", sinks, q.shape[2:3], q.dtype, q.device)


def split_heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v `(B, T, H, d)`; raises ValueError unless qkv is `(B, T, 3, H, d)`."""
    check_strided("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(f"qkv must be (B, T, 3, H, d), d at least 1, got {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    return q, k, v


def check_attention_backward(
    qkv: Tensor, sinks: Tensor | None, y: Tensor, lse: Tensor, grad_y: Tensor
) -> None:
    q, k, v = split_heads(qkv)
    check_attention(q, k, v, sinks)
    for name, tensor in (("y", y), ("grad_y", grad_y)):
        check_tensor(name, tensor, q.shape, q.dtype, q.device)
    B, T, H, _ = q.shape
    check_tensor("lse", lse, (B, H, T), wide_dtype(q.dtype), q.device)


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
