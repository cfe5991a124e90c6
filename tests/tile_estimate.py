"""`python -m benchmarks.gpu --estimate`: what the goals would take on an H200. Nothing is measured.

The Triton kernels of the goals are compiled for sm_90 by tile_report.py, which needs no GPU, and
the machine instructions of their loops are counted. A time is the largest of four terms:

    issue      instructions of all warps over what the schedulers can issue
    L2         bytes that the tiles load over the rate of the second-level cache
    compute    multiply-adds over the rate of cuBLAS
    memory     compulsory bytes over the rate of a large copy

For unstructured weights, whose x is read once, in the place of L2

    shared     passes of shared memory for the rows that are gathered, one in a clock

which tests/test_cuda_emulated.py counts, while tests/test_cuda_build.py limits the instructions: a
time of these is at least as long. Square blocks have a second line, for backend `cuda` and its
kernels of compute capability 9.0. The rates are assumptions; `ceilings` of the command
measures them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.cases import GOALS, PRODUCTS, Case, TopkCase, goal_of
from benchmarks.roofline import GpuPeaks, Work, count_work

MULTIPROCESSORS, SCHEDULERS, CLOCK_HZ = 132, 4, 1.7e9
# Rows of 16 bytes that are gathered for each weight and 8 tokens (lists are filled up), and passes
# for 8 rows: by product and the inputs that lie in shared memory.
GATHERED = {
    ("forward", 4096): (1.0, 1.91),
    ("forward", 2048): (1.0, 1.61),
    ("grad_input", 4096): (2.16, 1.03),
    ("grad_input", 8192): (1.31, 1.08),
    ("grad_weight", 4096): (1.0, 2.2),
    ("grad_weight", 2048): (1.0, 2.2),
}
# The most instructions of a warp: for 128 weights, by the tokens of a tile; for 1024 multiply-adds
# of grad_weight; and for 1024 elements of x that become a tile.
WORD_INSTRUCTIONS = {8: 130, 16: 136, 32: 198}
GRAD_WEIGHT_INSTRUCTIONS, FILL_INSTRUCTIONS = 18.4, 34
# Of a warp for a step of 64 along K of csrc/cuda/hopper_pipeline.cuh, of a block of so many rows.
HOPPER_INSTRUCTIONS, HOPPER_WARPS, HOPPER_ROWS, HOPPER_DEPTH = 68, 8, 256, 64
# Of a warp for a block of 32 x 32 and 128 tokens (csrc/cuda/spmm_hopper_32.cu), of which matrix
# instructions, with the clocks of a scheduler for one: half of the rate of wgmma, by assumption.
BLOCK_32_INSTRUCTIONS, BLOCK_32_MULTIPLIES, MULTIPLY_CLOCKS = 260, 64, 8
GROUP_ROWS, GROUP_TOKENS = 22, 128
# The tokens of a tile by the inputs that lie in shared memory.
TILE_TOKENS = {2048: 32, 4096: 16, 8192: 8}
PEAKS, L2_BYTES_S = GpuPeaks({"bfloat16": 790.0}, copy_gbs=4300.0), 5.5e12


def terms_us(case: Case, product: str, tile: dict[str, Any] | None) -> dict[str, float]:
    """The terms of a product in microseconds; without a tile those that no kernel can avoid."""
    bound = PEAKS.bound_ms(count_work(case, product), case.dtype)
    terms = {name: ms * 1e-3 for name, ms in bound.items()}
    if tile is None:
        inputs = case.out_features if product == "grad_input" else case.in_features
        rows, passes = GATHERED[product, inputs]
        matrices = case.tokens / 8 * case.out_features * case.fan_in * rows / 8
        terms["shared"] = matrices * passes / (MULTIPROCESSORS * CLOCK_HZ)
        weights, filled = case.out_features * case.fan_in * rows, case.tokens * inputs / 1024
        if product == "grad_weight":
            issued = case.tokens * weights / 1024 * GRAD_WEIGHT_INSTRUCTIONS
        else:
            tokens = TILE_TOKENS[inputs]
            issued = case.tokens / tokens * weights / 128 * WORD_INSTRUCTIONS[tokens]
        issued += filled * FILL_INSTRUCTIONS
        terms["issue"] = issued / (MULTIPROCESSORS * SCHEDULERS * CLOCK_HZ)
    else:
        block_m, block_k, warps, _ = tile["tile"]
        side, rows = case.block[0], case.out_features // case.block[0]
        if product == "grad_weight":
            programs = rows * math.ceil(case.fan_in / block_m)
            steps = programs * math.ceil(case.tokens / block_k)
        else:
            # The lists of grad_input are as long on average as those of forward.
            features = case.in_features if product == "grad_input" else case.out_features
            depth = case.out_features * case.fan_in / features
            steps = math.ceil(case.tokens / block_m) * features // side * depth / block_k
        terms["issue"] = steps * warps * tile["loop"] / (MULTIPROCESSORS * SCHEDULERS * CLOCK_HZ)
        terms["L2"] = steps * 2 * block_k * (block_m + side) / L2_BYTES_S
    return {name: seconds * 1e6 for name, seconds in terms.items()}


def hopper_terms_us(case: Case, product: str) -> dict[str, float]:
    """The terms of a product by the kernels of compute capability 9.0, in microseconds.

    A cluster of two blocks reads the wide operand of each and one narrow operand. The rows of
    grad_weight fall into groups of blocks; where a group is not full, what is multiplied is.
    """
    side, rows, wide = case.block[0], case.out_features // case.block[0], 2 * HOPPER_ROWS
    bound = PEAKS.bound_ms(count_work(case, product), case.dtype)
    terms = {name: ms * 1e-3 for name, ms in bound.items()}
    if product == "grad_weight":
        groups = math.ceil(case.fan_in / wide)
        steps = rows * groups * math.ceil(case.tokens / HOPPER_DEPTH)
        loaded = steps * HOPPER_DEPTH * (case.fan_in / groups + side)
    else:
        weights = case.out_features * case.fan_in
        steps = math.ceil(case.tokens / wide) * weights / side / HOPPER_DEPTH
        loaded = steps * HOPPER_DEPTH * (wide + side)
    flops = 2 * steps * wide * side * HOPPER_DEPTH
    terms["compute"] = flops / (PEAKS.dense_tflops[case.dtype] * 1e12)
    issued = 2 * steps * HOPPER_WARPS * HOPPER_INSTRUCTIONS
    terms["issue"] = issued / (MULTIPROCESSORS * SCHEDULERS * CLOCK_HZ)
    terms["L2"] = 2 * loaded / L2_BYTES_S
    return {name: seconds * 1e6 for name, seconds in terms.items()}


def block_32_terms_us(case: Case, product: str) -> dict[str, float]:
    """The same of the kernel for blocks of 32: a cluster takes a group of block-rows at a time.

    For each column that any of the rows reads it loads x once. Three of a block's 11 rows share a
    scheduler. Shared memory moves 128 bytes in a clock.
    """
    side, tiles = case.block[0], math.ceil(case.tokens / GROUP_TOKENS)
    rows, cols = case.out_features // side, case.in_features // side
    blocks = rows * case.fan_in // side
    if product == "grad_input":
        rows, cols = cols, rows
    groups = math.ceil(rows / GROUP_ROWS)
    columns = cols * (1 - (1 - blocks / rows / cols) ** (rows / groups))
    bound = PEAKS.bound_ms(count_work(case, product), case.dtype)
    terms = {name: ms * 1e-3 for name, ms in bound.items()}
    box, block = 2 * side * GROUP_TOKENS, 2 * side * side  # bytes
    terms["L2"] = tiles * (groups * columns * box + blocks * block) / L2_BYTES_S
    rounds = math.ceil(tiles * groups / (MULTIPROCESSORS // 2))
    clocks = rounds / CLOCK_HZ
    own = blocks / groups / 2  # of a block of threads, in a job
    terms["issue"] = clocks * own * BLOCK_32_INSTRUCTIONS / SCHEDULERS
    terms["compute"] = clocks * own * BLOCK_32_MULTIPLIES * MULTIPLY_CLOCKS * 3 / (GROUP_ROWS / 2)
    moved = own * (box + block + block) + columns * box + 2 * rows / groups / 2 * box
    terms["shared"] = clocks * moved / 128
    return {name: seconds * 1e6 for name, seconds in terms.items()}


def lines(tiles: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """A line for each product of each goal."""
    yield "ESTIMATES from instruction counts and assumed rates: nothing here was measured."
    dense_flops = PEAKS.dense_tflops["bfloat16"] * 1e12
    yield (
        f"Assumed: {MULTIPROCESSORS} multiprocessors at {CLOCK_HZ / 1e9:g} GHz, cuBLAS "
        f"{dense_flops / 1e12:g} Tflop/s, L2 {L2_BYTES_S / 1e12:g} TB/s, memory "
        f"{PEAKS.copy_gbs / 1e3:g} TB/s."
    )
    for case in GOALS:
        if isinstance(case, TopkCase):
            values = case.tokens * case.width * 2  # bytes
            least_ms = PEAKS.bound_ms(Work(0, 0, values, values), case.dtype)["memory"]
            yield f"{case}: at least {least_ms * 1e3:.0f} us (memory)"
            continue
        dense_us = 2 * case.tokens * case.in_features * case.out_features / dense_flops * 1e6
        is_tiled = case.block != (1, 1)
        about, most = ("about", "") if is_tiled else ("at least", "at most ")
        names = [" (triton)"] if is_tiled else [""]
        for name in names + [" (cuda)"] * is_tiled:
            step_us = 0.0
            for product in PRODUCTS:
                words = {"forward": "own ", "grad_input": "transposed "}.get(product, "")
                kernel = "sddmm_kernel" if product == "grad_weight" else "spmm_kernel"
                key = (kernel, f"{words}{case.block[1]} to {case.block[0]}")
                if name == " (cuda)" and case.block[0] == 32 and product != "grad_weight":
                    terms = block_32_terms_us(case, product)
                elif name == " (cuda)":
                    terms = hopper_terms_us(case, product)
                else:
                    terms = terms_us(case, product, tiles[key] if is_tiled else None)
                limit = max(terms, key=lambda term: terms[term])
                step_us += terms[limit]
                goal = f" (goal {wanted:g}x)" if (wanted := goal_of(case, product)) else ""
                over = f"{most}{dense_us / terms[limit]:.1f}x cuBLAS{goal}"
                yield f"{case} {product}{name}: {about} {terms[limit]:.0f} us ({limit}), {over}"
            over = f"{most}{len(PRODUCTS) * dense_us / step_us:.1f}x cuBLAS"
            goal = f"(goal {goal_of(case, 'step'):g}x)"
            yield f"{case} step{name}: {about} {step_us:.0f} us, {over} {goal}"


if __name__ == "__main__":
    import tile_report

    made = map(tile_report.compile_one, tile_report.goal_cases())
    print(*lines({(tile["kernel"], tile["what"]): tile for tile in made}), sep="\n")
