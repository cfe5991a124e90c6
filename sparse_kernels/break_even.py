"""From which density a dense layer is faster, as measured, and the advice that follows from it.

Nothing here decides what runs: a layer of any density runs sparse until its user makes it dense.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels import backends, cpu
from sparse_kernels.layout import FanInLayout


class Key(NamedTuple):
    """What a break-even density was measured for; `family` is that of `family()`."""

    device: str
    family: str
    dtype: str
    block: tuple[int, int]


class Measured(NamedTuple):
    """A break-even density and the result file that it is in.

    The density is infinite where the sparse step was still faster at density 1. Where the dense one
    was faster from the start it is the lowest density measured.
    """

    density: float
    source: str


_ZEN5 = "benchmarks/results/break-even-cpu-zen5.json"
# Filled by hand from the `results` of `python -m benchmarks.break_even`; a test compares the two.
TABLE = {
    Key("cpu", "avx512_bf16", "float32", (1, 1)): Measured(0.624, _ZEN5),
    Key("cpu", "avx512_bf16", "float32", (4, 1)): Measured(math.inf, _ZEN5),
    Key("cpu", "avx512_bf16", "float32", (16, 1)): Measured(math.inf, _ZEN5),
    Key("cpu", "avx512_bf16", "float32", (16, 16)): Measured(math.inf, _ZEN5),
    Key("cpu", "avx512_bf16", "float32", (32, 32)): Measured(math.inf, _ZEN5),
    Key("cpu", "avx512_bf16", "bfloat16", (1, 1)): Measured(0.313, _ZEN5),
    Key("cpu", "avx512_bf16", "bfloat16", (4, 1)): Measured(0.561, _ZEN5),
    Key("cpu", "avx512_bf16", "bfloat16", (16, 1)): Measured(0.68, _ZEN5),
    Key("cpu", "avx512_bf16", "bfloat16", (16, 16)): Measured(0.618, _ZEN5),
    Key("cpu", "avx512_bf16", "bfloat16", (32, 32)): Measured(0.673, _ZEN5),
}


def family(device: torch.device) -> str:
    """The processors that share a measurement: their instruction set or compute capability.

    On a CPU that of the kernels in use, with "+amx" where the processor has matrix units, which
    dense products in bfloat16 use. On a GPU the major number of its compute capability.
    """
    if device.type == "cpu":
        return cpu.isa() + ("+amx" if _has_amx() else "")
    if device.type == "cuda":
        return f"compute capability {torch.cuda.get_device_capability(device)[0]}"
    return ""


@functools.cache
def _has_amx() -> bool:
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def _find(x: Tensor, layout: FanInLayout) -> tuple[Key, Measured] | None:
    """The measurement with the nearest block, on such a device, in this dtype; None without one."""
    backends.check_arguments(x, layout)
    where = (x.device.type, family(x.device), str(x.dtype).removeprefix("torch."))
    keys = [key for key in TABLE if key[:3] == where]
    if not keys:
        return None

    def distance(key: Key) -> tuple[float, int]:
        sides = zip(key.block, layout.block, strict=True)
        doublings = sum(abs(math.log2(there / here)) for there, here in sides)
        return doublings, math.prod(key.block)

    key = min(keys, key=distance)
    return key, TABLE[key]


def break_even_density(x: Tensor, layout: FanInLayout) -> float | None:
    """The density from which a dense training step was measured to be faster than a sparse one.

    A step is forward, gradient of the input and gradient of the weight, of a 1024 by 1024 layer
    with 2048 tokens; dense is PyTorch's own product in the same dtype, as `to_dense` gives it, not
    the fastest there is. Other sizes, other numbers of tokens or threads, inference alone, and
    other processors of the same instruction set break even elsewhere. Of the measured blocks the
    nearest counts: the fewest doublings and halvings of its sides make it that of `layout`; of two
    equally near the smaller one.

    Args:
        x: a tensor of the device and dtype in question.
        layout: the pattern in question; only its block matters.

    Returns:
        A density; infinity where the sparse step was still faster at density 1; None where nothing
        was measured on such a device (instruction set or compute capability) in this dtype.

    Raises:
        TypeError: `x` is not a Tensor or `layout` not a FanInLayout.
    """
    found = _find(x, layout)
    return None if found is None else found[1].density


def advise_dense(x: Tensor, layout: FanInLayout) -> str | None:
    """A sentence if a dense layer is expected to be faster than this layout; else None.

    Expected from `break_even_density`, whose limits apply; None also where nothing was measured.
    Nothing becomes dense by itself.

    Args:
        x: a tensor of the device and dtype in question.
        layout: the pattern in question.

    Raises:
        TypeError: `x` is not a Tensor or `layout` not a FanInLayout.
    """
    found = _find(x, layout)
    if found is None or layout.density <= found[1].density:
        return None
    key, measured = found
    blocks = _name(key.block)
    if key.block != layout.block:
        blocks += f" blocks, the nearest to {_name(layout.block)} that were measured,"
    else:
        blocks += " blocks"
    return (
        f"a dense layer is expected to be faster: {blocks} in {key.dtype} on {key.device} "
        f"({key.family}) break even at density {measured.density:.3g} ({measured.source}), and "
        f"this layout has {layout.density:.3g}; layer.to_dense() or densify_(model, filter_fn=...) "
        "gives you one"
    )


def _name(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]}"
