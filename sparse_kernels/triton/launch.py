"""What the launchers share: the product of two tiles, its precision, and errors with names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

_MAX_PROGRAMS = 2**31 - 1
# The interpreter multiplies the bit patterns of bfloat16, which it holds as integers.
INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """sums + a @ b in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def rounded(sums, DTYPE: tl.constexpr):
    """float32 sums in DTYPE, rounded to the nearest, to even in the middle."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter would cut the last bits off.
        bits = sums.to(tl.int32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(sums == sums, nearest, bits | 0x400000)
        result = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = sums.to(DTYPE)
    return result


def precision(dtype: torch.dtype) -> str:
    """How the tensor cores may multiply float32: "ieee", or "tf32" where PyTorch allows it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def grid(programs: int) -> tuple[int]:
    """A grid of that many programs; ValueError if no launch can have so many."""
    if programs > _MAX_PROGRAMS:
        raise ValueError(f"x has too many rows: {programs} programs, the limit is {_MAX_PROGRAMS}")
    return (programs,)


def launch_kernel(
    kernel: Any, programs: int, x: Tensor, *arguments: object, **constants: object
) -> None:
    """Launches so many programs of a kernel; `x` is its first argument.

    Raises RuntimeError where a CUDA graph is captured and the kernel was never launched before:
    the driver may refuse to load it then.
    """
    sizes = grid(programs)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        compiled = kernel.warmup(x, *arguments, grid=sizes, **constants)
        if compiled.module is None:
            raise RuntimeError(
                "its kernel is used for the first time while a CUDA graph is captured, when it "
                "cannot be loaded: run the step once before the capture"
            )
    kernel[sizes](x, *arguments, **constants)


@contextmanager
def naming_errors(product: str, x: Tensor, problem: object) -> Iterator[None]:
    """Errors of the compiler, the launch and the allocator say which product of what failed."""

    def named(error: Exception) -> str:
        return f"triton {product} of {tuple(x.shape)} in {x.dtype}, {problem!r}: {error}"

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(named(error)) from error
    except (
        CompilationError,
        InterpreterError,
        OutOfResources,
        PTXASError,
        RuntimeError,  # what triton's launcher and PyTorch raise for an error of the driver
    ) as error:
        raise RuntimeError(named(error)) from error
