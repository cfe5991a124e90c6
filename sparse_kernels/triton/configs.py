"""Tile choices, frozen in one table; a search over others only on request.

The table was chosen by compiling: no register is spilled and shared memory fits (see
tests/test_triton_compile.py). SPARSE_KERNELS_TRITON_TUNE=1 in the environment times the candidates
at the first call of each problem and takes the fastest. It may then differ in the last bits from
the table's choice, and from one process to the next.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_kernels.triton.launch import precision


class Tile(NamedTuple):
    """How a program is cut.

    `spmm`: block_m tokens, block_k features of the list at a time.
    `sddmm`: block_m features of the list, block_k tokens at a time.
    """

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


# GPUs of compute capability 9 and 10 multiply with instructions of their own; all others from 8 on
# take sm_80, whose choices fit the 99 KB of shared memory that the smallest of them have.
FAMILIES = ("sm_80", "sm_90", "sm_100")
# (kernel, family, numbers) -> a tile for blocks of 16, 32, 64 and 128 outputs, its other side.
# "half" is bfloat16 and float16; float32 is "ieee" or "tf32". A step of `spmm` loads an index and
# then what it points to, so that two more stages put one more tile in flight: odd numbers only.
_SIDES = (16, 32, 64, 128)
TABLE: dict[tuple[str, str, str], tuple[Tile, Tile, Tile, Tile]] = {
    ("spmm", "sm_80", "half"): (
        Tile(128, 64, 4, 5), Tile(128, 64, 4, 5), Tile(128, 64, 4, 5), Tile(128, 64, 8, 5),
    ),
    ("spmm", "sm_80", "tf32"): (
        Tile(128, 32, 4, 5), Tile(128, 32, 4, 5), Tile(128, 32, 4, 5), Tile(128, 32, 8, 5),
    ),
    ("spmm", "sm_80", "ieee"): (
        Tile(128, 16, 4, 5), Tile(128, 16, 4, 5), Tile(128, 16, 8, 5), Tile(128, 16, 8, 5),
    ),
    ("spmm", "sm_90", "half"): (
        Tile(128, 64, 4, 5), Tile(256, 32, 8, 5), Tile(256, 64, 8, 5), Tile(256, 64, 8, 5),
    ),
    ("spmm", "sm_90", "tf32"): (
        Tile(128, 32, 4, 5), Tile(128, 32, 8, 5), Tile(128, 32, 4, 5), Tile(128, 32, 8, 5),
    ),
    ("sddmm", "sm_80", "half"): (
        Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3),
    ),
    ("sddmm", "sm_80", "tf32"): (
        Tile(128, 32, 4, 4), Tile(128, 32, 4, 4), Tile(128, 32, 8, 3), Tile(128, 32, 8, 3),
    ),
    ("sddmm", "sm_80", "ieee"): (
        Tile(128, 16, 4, 3), Tile(128, 16, 4, 3), Tile(128, 16, 8, 3), Tile(128, 16, 8, 3),
    ),
    ("sddmm", "sm_90", "half"): (
        Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), Tile(256, 64, 8, 4),
    ),
    ("sddmm", "sm_90", "tf32"): (
        Tile(128, 32, 4, 4), Tile(128, 32, 4, 4), Tile(128, 32, 4, 4), Tile(128, 32, 8, 4),
    ),
}  # fmt: skip


def family(device: torch.device) -> str:
    """The column of the table for a GPU; on the cpu, where kernels are interpreted, the first."""
    if device.type == "cpu":
        return "sm_80"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"it needs compute capability 8.0 or more, and the GPU has {major}.{minor}"
        )
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def frozen(kernel: str, family: str, numbers: str, side: int) -> Tile:
    """The table's choice; sm_100 takes that of sm_90, and what neither has, that of sm_80."""
    for name in FAMILIES[FAMILIES.index(family) :: -1]:
        if (kernel, name, numbers) in TABLE:
            return TABLE[kernel, name, numbers][_SIDES.index(side)]
    raise KeyError((kernel, family, numbers))


def without_mask(tile: Tile, depth: int) -> Tile:
    """The tile with steps that divide lists of `depth` features, if steps of 32 do.

    A step that reaches past the end of its list needs a mask for every load, in all steps.
    """
    divides = depth % tile.block_k == 0 or depth % 32 != 0
    return tile if divides else tile._replace(block_k=32)


def numbers(dtype: torch.dtype) -> str:
    """The table's name for the numbers that a kernel multiplies."""
    return precision(dtype) if dtype == torch.float32 else "half"


def candidates(first: Tile) -> list[Tile]:
    """The table's choice and its neighbours."""
    found = [first]
    for block_m in (64, 128, 256):
        for block_k in {first.block_k, max(16, first.block_k // 2)}:
            for warps in (4, 8):
                for stages in (2, 3, 5, 7):
                    found.append(Tile(block_m, block_k, warps, stages))
    return list(dict.fromkeys(found))


_TUNE = os.environ.get("SPARSE_KERNELS_TRITON_TUNE") == "1"
_tuned: dict[tuple[object, ...], Tile] = {}


def run(
    launch: Callable[[Tile], None], kernel: str, x: Tensor, side: int, problem: tuple[object, ...]
) -> None:
    """Launches with the table's tile, or with the fastest one if that was asked for.

    Args:
        launch: starts the kernel with a tile; every tile gives a right result.
        kernel: "spmm" or "sddmm".
        x: a tensor of the device and dtype.
        side: outputs of a block.
        problem: what else a search depends on.
    """
    tile = frozen(kernel, family(x.device), numbers(x.dtype), side)
    if _TUNE and x.is_cuda:
        key = (kernel, x.device, numbers(x.dtype), side, *problem)
        if key not in _tuned:
            _tuned[key] = _fastest(launch, tile)
            print(f"sparse_kernels: {key}: {_tuned[key]}, frozen {tile}", file=sys.stderr)
        tile = _tuned[key]
    launch(tile)


def _fastest(launch: Callable[[Tile], None], first: Tile) -> Tile:
    times = {}
    for tile in candidates(first):
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: launch(tile))
        except OutOfResources:
            continue
    return min(times, key=lambda tile: times[tile])
