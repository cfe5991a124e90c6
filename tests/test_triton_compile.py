"""Every tile of the Triton backend is compiled ahead of time for its GPUs, which need not be there.

The compiler says what a launch would use: registers that it had to spill to memory, shared memory,
and the instructions that multiply. tile_report.py does the compiling, in one process for all,
because a process that interprets cannot compile.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import GOALS, Case
from sparse_kernels import triton
from sparse_kernels.layout import FanInLayout

pytest.importorskip("triton", reason="triton is not installed")

from sparse_kernels.triton import configs, sddmm, spmm

REPORT = Path(__file__).parent / "tile_report.py"
KIB = 1024
# What a program may have. The sm_80 column also serves the GPUs of its generation that have least.
SHARED = {80: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}
TENSOR_CORE = {80: "mma", 90: "wgmma", 100: "tcgen05"}
PRODUCTS = ("spmm_kernel", "sddmm_kernel")
# Those that the CUDA kernels are built for, too: by default all.
ARCHS = re.findall(r"(\d+)\.(\d)", os.environ.get("SPARSE_KERNELS_CUDA_ARCHS", ""))
EVERY = set(configs.FAMILIES)
FAMILIES = {f"sm_{major}{minor}" for major, minor in ARCHS} & EVERY or EVERY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    cache = tmp_path_factory.mktemp("triton")
    hidden = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    # The package that the tests import is the one that is compiled, from wherever they run.
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, str(REPORT), *sorted(FAMILIES)],
        env={**env, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(reports):
    return reports["table"]


def name(made):
    return f"{made['kernel']} sm_{made['capability']} {made['numbers']} {made['what']}"


def bad(report, wrong):
    """The names of what is wrong, for a message that tells all of them."""
    return [(name(made), made["tile"]) for made in report if wrong(made)]


def test_every_tile_of_the_table_is_compiled(report):
    compiled = {
        (made["kernel"].removesuffix("_kernel"), made["numbers"], made["capability"], out)
        for made in report
        if made["kernel"] in PRODUCTS
        for out in [int(made["what"].split()[-1])]
        if made["tile"]
        == list(
            configs.frozen(
                made["kernel"].removesuffix("_kernel"),
                f"sm_{made['capability']}",
                made["numbers"],
                out,
            )
        )
    }
    table = {
        (kernel, numbers, int(family.removeprefix("sm_")), out)
        for kernel, _, numbers in configs.TABLE
        for family in FAMILIES
        for out in (16, 32, 64, 128)
    }
    assert compiled == table
    assert len(table) == 2 * 3 * 4 * len(FAMILIES)


def test_no_register_is_spilled(report):
    assert bad(report, lambda made: made["stack"] != 0) == []
    assert all(made["registers"] > 0 for made in report)


def test_shared_memory_fits(report):
    assert bad(report, lambda made: made["shared"] > SHARED[made["capability"]]) == []
    assert bad(report, lambda made: made["kernel"] in PRODUCTS and made["shared"] == 0) == []


def test_tensor_cores_multiply(report):
    """The instruction of the generation and no other, except in exact float32, which has none."""

    def wrong(made):
        if made["kernel"] not in PRODUCTS:
            return False
        used = {key for key in ("mma", "wgmma", "tcgen05") if made[key]}
        if made["numbers"] == "ieee":
            return bool(used) or not made["fma"]
        return used != {TENSOR_CORE[made["capability"]]}

    assert bad(report, wrong) == []


def test_tiles_are_copied_ahead_in_16_bytes(report):
    """Gathered tiles arrive by asynchronous wide copies: the compiler knows that runs are aligned.

    Not so the tokens of `sddmm` in TF32 on newer GPUs, which are transposed on their way.
    """

    def wrong(made):
        transposes = made["kernel"] == "sddmm_kernel" and made["numbers"] == "tf32"
        if made["kernel"] not in PRODUCTS or (transposes and made["capability"] > 80):
            return False
        return made["async_copy_16"] < made["tile"][3] - 2

    assert bad(report, wrong) == []


# Machine instructions of a step of the goals' kernels: what the worse of Triton 3.6 and 3.7 makes.
LOOPS = {
    "spmm_kernel own 32 to 32": 121, "spmm_kernel transposed 32 to 32": 148,
    "spmm_kernel own 64 to 64": 151, "spmm_kernel transposed 64 to 64": 226,
    "spmm_kernel own 128 to 128": 164, "spmm_kernel transposed 128 to 128": 239,
    "sddmm_kernel 32 to 32": 216, "sddmm_kernel 64 to 64": 244, "sddmm_kernel 128 to 128": 233,
}  # fmt: skip


@pytest.mark.skipif("sm_90" not in FAMILIES, reason="the loops are those of sm_90")
def test_loops_of_the_goals_stay_short(report):
    found = {
        f"{one['kernel']} {one['what']}": one["loop"]
        for one in report
        if (one["capability"], one["dtype"], one["numbers"]) == (90, "bfloat16", "half")
    }
    assert found.keys() >= LOOPS.keys()
    assert {name: found[name] for name, n in LOOPS.items() if not 0 < found[name] <= 1.05 * n} == {}


@pytest.mark.skipif("sm_90" not in FAMILIES, reason="the registers are those of sm_90")
@pytest.mark.parametrize("side", [32, 64, 128])
def test_programs_of_the_goals_fill_an_h200(report, side, monkeypatch):
    """In the last round of as many as lie on it at a time, few multiprocessors are idle."""
    (case,) = (case for case in GOALS if isinstance(case, Case) and case.block == (side, side))
    programs = []

    def record(kernel, count, *arguments, **constants):
        programs.append(count)

    monkeypatch.setattr(configs, "family", lambda device: "sm_90")
    for module in (spmm, sddmm):
        monkeypatch.setattr(module, "launch_kernel", record)
    sizes = case.out_features, case.in_features, case.fan_in, case.block
    layout = FanInLayout.random(*sizes, generator=torch.Generator().manual_seed(0))
    x, grad_output, values = (
        torch.empty(shape, dtype=torch.bfloat16)
        for shape in ((case.tokens, sizes[1]), (case.tokens, sizes[0]), layout.values_shape)
    )
    run = {
        "spmm_kernel own": lambda: triton.forward(x, values, layout),
        "spmm_kernel transposed": lambda: triton.grad_input(grad_output, values, layout),
        "sddmm_kernel": lambda: triton.grad_weight(grad_output, x, layout),
    }
    for kernel, call in run.items():
        (made,) = (
            made
            for made in report
            if f"{made['kernel']} {made['what']}" == f"{kernel} {side} to {side}"
            and (made["capability"], made["dtype"]) == (90, "bfloat16")
        )
        programs.clear()
        call()
        threads = 32 * made["tile"][2]
        resident = min(2**16 // (threads * made["registers"]), 228 * KIB // (made["shared"] + KIB))
        rounds = programs[0] / (132 * resident)
        assert rounds / math.ceil(rounds) >= 0.95, (kernel, programs[0], resident)


def test_sizes_of_one_are_compiled_too(reports):
    made = reports["ones"]
    assert len(made) == 6
    assert bad(made, lambda one: one["stack"] != 0 or not one["wgmma"]) == []


def test_a_tile_that_is_too_large_is_noticed(reports):
    (made,) = reports["spilling"]
    assert made["stack"] > 0
