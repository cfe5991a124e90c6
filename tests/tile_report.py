"""Compiles the Triton kernels ahead of time and prints what the compiler made of them, as JSON.

It needs no GPU, but a process that does not interpret: test_triton_compile.py runs it as a program,
`python tile_report.py sm_80 sm_90`: every choice of the tile table for these GPUs, then sizes that
are 1, and a tile that is known to be too large. Each kernel is specialised as its launcher
specialises it for aligned, row-major tensors.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparse_kernels.triton import configs, sddmm, spmm, topk

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
# Integers of which 16 is a divisor in sizes that people use, and those of which it may not be.
ALIGNED = {"stride_xm", "stride_gm", "stride_ym", "cols", "tokens_per_piece", "size"}
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "fma": r"\bfma\.rn\.f32",
    "async_copy_16": r"\bcp\.async\.cg[^;]*\b0x10\b",
}


def longest_loop(sass: str) -> int:
    """Instructions between the target of a branch and the branch behind it, the most there are."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass, re.MULTILINE)
    numbers = {int(address, 16): number for number, (address, _) in enumerate(found)}
    lengths = [0]
    for number, (_, text) in enumerate(found):
        if branch := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text.strip()):
            lengths.append(number + 1 - numbers[int(branch[1], 16)])
    return max(lengths)


def compile_one(case: dict) -> dict:
    """`case` with registers, stack, shared memory in bytes, and counts of instructions added.

    Where tensor cores multiply 16 bits, `loop` counts the machine instructions of the longest loop.
    """
    kernel = getattr(MODULES[case["module"]], case["kernel"])
    constants = case["constants"]
    signature, values, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(position,)] = constants[name]
            continue
        pointer = name.endswith("_ptr")
        signature[name] = case["pointers"].get(name, case["pointer"]) if pointer else "i32"
        if pointer or name in ALIGNED:
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", case["capability"], 32),
        options={"num_warps": case["tile"][2], "num_stages": case["tile"][3]},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = ["--dump-sass"] if case["numbers"] == "half" else []
        command = [CUOBJDUMP, "--dump-resource-usage", *listing, file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    counts = {
        name: len(re.findall(pattern, compiled.asm["ptx"]))
        for name, pattern in INSTRUCTIONS.items()
    }
    return {
        **{key: case[key] for key in ("kernel", "capability", "numbers", "dtype", "tile", "what")},
        "registers": int(found[1]),
        "stack": int(found[2]) + int(found[3]),
        "shared": compiled.metadata.shared,
        "loop": longest_loop(usage),
        **counts,
    }


MODULES = {"spmm": spmm, "sddmm": sddmm, "topk": topk}
INTEGERS = {
    "sources_ptr": "*i32",
    "slots_ptr": "*i32",
    "order_ptr": "*i32",
    "offsets_ptr": "*i64",
    "indices_ptr": "*i32",
    "pieces_ptr": "*fp32",
}


def make(module, kernel, family, numbers, dtype, tile, what, constants, pointers=None) -> dict:
    return {
        "module": module,
        "kernel": kernel,
        "capability": int(family.removeprefix("sm_")),
        "numbers": numbers,
        "dtype": dtype,
        "tile": tuple(tile),
        "what": what,
        "constants": constants,
        "pointer": POINTERS[dtype],
        "pointers": {**INTEGERS, **(pointers or {})},
    }


def spmm_case(family, numbers, dtype, out, into, transposed, tile, ones=()) -> dict:
    # The layout's own lists are of any multiple of BLOCK_K here.
    tile = configs.without_mask(tile, into) if transposed else tile
    constants = {
        "stride_xk": 1,
        "OUT": out,
        "IN": into,
        "TRANSPOSED": transposed,
        "HAS_BIAS": True,
        "EVEN_K": not (transposed or ones) or into % tile.block_k == 0,
        "PRECISION": "tf32" if numbers == "tf32" else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        **dict.fromkeys(ones, 1),
    }
    if not transposed:
        constants |= {"slots_ptr": None, "offsets_ptr": None, "order_ptr": None}
    what = f"{'transposed' if transposed else 'own'} {into} to {out}"
    return make("spmm", "spmm_kernel", family, numbers, dtype, tile, what, constants)


def sddmm_case(family, numbers, dtype, out, into, tile, ones=()) -> dict:
    constants = {
        "stride_gn": 1,
        "stride_xk": 1,
        "OUT": out,
        "IN": into,
        "PRECISION": "tf32" if numbers == "tf32" else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        **dict.fromkeys(ones, 1),
    }
    what, parts = f"{into} to {out}", {"out_ptr": "*fp32"}
    return make("sddmm", "sddmm_kernel", family, numbers, dtype, tile, what, constants, parts)


def topk_cases(family, dtype):
    for cols in (256, 4096, 16384, 100000):
        size, warps = topk.chunk(cols)
        constants = {
            "stride_xn": 1,
            "BITS": 31 if dtype == "float32" else 15,
            "INFINITY": 0x7F800000 if dtype == "float32" else 0x7F80,
            "ONE_CHUNK": cols <= size,
            "CHUNK": size,
        }
        tile = (size, 0, warps, 3)
        yield make("topk", "topk_kernel", family, "none", dtype, tile, str(cols), constants)
    constants = {"stride_gn": 1, "stride_yn": 1, "BLOCK": 1024}
    tile = (1024, 0, 4, 3)
    yield make("topk", "topk_backward_kernel", family, "none", dtype, tile, "", constants)
    yield make("sddmm", "sum_kernel", family, "none", dtype, tile, "", {"BLOCK": 1024})


def table_cases(*families):
    for family in families:
        for numbers in ("half", "tf32", "ieee"):
            dtype = "bfloat16" if numbers == "half" else "float32"
            # The tile goes by `out`. The other side changes no shared memory and hardly a register:
            # it is that of the goals, or its ends alternate.
            others = (32, 64, 128) if numbers == "half" else (16, 128, 16)
            for out, into in zip((16, 32, 64, 128), (128, *others), strict=True):
                tile = configs.frozen("spmm", family, numbers, out)
                for transposed in (False, True):
                    yield spmm_case(family, numbers, dtype, out, into, transposed, tile)
                tile = configs.frozen("sddmm", family, numbers, out)
                yield sddmm_case(family, numbers, dtype, out, into, tile)
        tile = configs.frozen("spmm", family, "half", 32)
        yield spmm_case(family, "half", "float16", 32, 16, False, tile)
        tile = configs.frozen("spmm", family, "half", 64)
        yield spmm_case(family, "half", "bfloat16", 64, 32, True, tile)
        tile = configs.frozen("sddmm", family, "half", 32)
        yield sddmm_case(family, "half", "float16", 32, 16, tile)
        for dtype in ("bfloat16", "float32"):
            yield from topk_cases(family, dtype)


def goal_cases():
    """The tiles that the goals of benchmarks/gpu run."""
    for side in (32, 64, 128):
        tile = configs.frozen("spmm", "sm_90", "half", side)
        for transposed in (False, True):
            yield spmm_case("sm_90", "half", "bfloat16", side, side, transposed, tile)
        tile = configs.frozen("sddmm", "sm_90", "half", side)
        yield sddmm_case("sm_90", "half", "bfloat16", side, side, tile)


def ones_cases():
    """Sizes that are 1 become constants of the kernel, which is another kernel then."""
    for out, into in ((16, 16), (128, 128)):
        tile = configs.frozen("spmm", "sm_90", "half", out)
        ones = ("num_tokens", "num_rows", "blocks_per_row")
        for transposed in (False, True):
            yield spmm_case("sm_90", "half", "bfloat16", out, into, transposed, tile, ones)
        tile, ones = configs.frozen("sddmm", "sm_90", "half", out), ("num_groups", *ones)
        yield sddmm_case("sm_90", "half", "bfloat16", out, into, tile, ones)


def spilling_cases():
    tile = configs.Tile(256, 32, 4, 2)
    yield spmm_case("sm_80", "half", "bfloat16", 128, 128, False, tile)


if __name__ == "__main__":
    chosen = {
        "table": list(table_cases(*sys.argv[1:])),
        "ones": list(ones_cases()),
        "spilling": list(spilling_cases()),
    }
    # One process for all: to import Triton takes longer than to compile a kernel.
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("fork")) as pool:
        made = {name: pool.map(compile_one, cases) for name, cases in chosen.items()}
        json.dump({name: list(compiled) for name, compiled in made.items()}, sys.stdout)
