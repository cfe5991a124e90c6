"""The CUDA kernels of compute capability 9.0 for square blocks, emulated on the CPU.

What goes on beside the threads (copies of boxes, wgmma) ends at random times, drawn from a seed, so
that a kernel that lacks a wait is wrong for some seeds; test_hopper_emulation.py tests that.
"""

import ctypes
import os
import subprocess
import sys

import cuda_emulation
import pytest
import torch
from emulated import ORDERS, SANITIZED, bias_for, check_product, emulated, run_sanitized
from hypothesis import given
from hypothesis import strategies as st
from oracle import PRODUCTS, kept, random, seeds, to_dense
from oracle import sparse_product as run_product
from test_hopper_emulation import every_dtype, use

import sparse_kernels as sk
from sparse_kernels import cuda

pytestmark = pytest.mark.slow
every_product = pytest.mark.parametrize("product", PRODUCTS)
SIDES = [32, 64, 128]


@pytest.fixture(scope="module")
def extension():
    """In the sanitized process of the last test, the sanitized build."""
    return cuda_emulation.emulated(sanitize=SANITIZED)


@pytest.fixture(autouse=True)
def _use_it(extension):
    with emulated(extension):
        yield


def make(layout, rows, dtype, generator, exact=False):
    x = random((rows, layout.in_features), dtype, generator, exact)
    grad_output = random((rows, layout.out_features), dtype, generator, exact)
    return x, grad_output, random(layout.values_shape, dtype, generator, exact)


def is_on_hopper(product, x, grad_output, values, layout):
    """Whether the kernels of compute capability 9.0 run the product."""
    pointed, _ = cuda._scheduled(layout, "columns" if product == "grad_input" else "rows")
    dtype, rows = cuda._DTYPES[values.dtype], x.shape[0]
    matrices = {
        "forward": (cuda._matrix(x), values.data_ptr()),
        "grad_input": (cuda._matrix(grad_output), values.data_ptr()),
        "grad_weight": (cuda._matrix(grad_output), cuda._matrix(x)),
    }[product]
    name = "sddmm_on_hopper" if product == "grad_weight" else "spmm_on_hopper"
    return getattr(cuda._extension, name)(dtype, pointed, *matrices, rows, 0, 0)


@st.composite
def square_layouts(draw, sides=(32, 64, 128)):
    """Any fan-in; some inputs have no reader, so that lists are empty.

    Of blocks of 32 there are up to three groups of block-rows.
    """
    side = draw(st.sampled_from(sides))
    most_rows, most_cols = {32: (46, 40), 64: (3, 11), 128: (3, 5)}[side]
    rows, cols = draw(st.integers(1, most_rows)), draw(st.integers(1, most_cols))
    fan_in = draw(st.integers(1, min(cols, 6 if side == 32 else 11)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    return sk.FanInLayout.random(
        rows * side, cols * side, fan_in * side, (side, side), generator=generator
    )


@every_dtype
@every_product
@given(
    square_layouts(),
    st.one_of(st.integers(1, 200), st.sampled_from([64, 129, 256, 513])),
    st.booleans(),
    st.sampled_from(ORDERS),
    seeds(),
    st.booleans(),
)
def test_products_match_dense(dtype, product, layout, rows, with_bias, order, seed, exact):
    generator = torch.Generator().manual_seed(seed)
    tensors = make(layout, rows, dtype, generator, exact)
    assert is_on_hopper(product, *tensors, layout)
    bias = bias_for(product, layout, dtype, generator, exact) if with_bias else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, seed, order)
        check_product(product, *tensors, layout, bias, exact)


@pytest.mark.parametrize("lists", ["rows", "columns"])
@given(square_layouts([32]))
def test_groups_have_each_row_once_and_each_of_their_columns(lists, layout):
    members, begins, read, places = cuda.build_groups(layout, lists)
    transposed = layout.transposed
    columns, lengths = layout.indices.flatten(), [layout.blocks_per_row] * layout.block_rows
    if lists == "columns":
        columns, lengths = transposed.rows, transposed.offsets.diff().tolist()
    by_row = columns.split(lengths)
    places_by_row = places.split(lengths)
    assert sorted(row for row in members.flatten().tolist() if row >= 0) == list(range(len(by_row)))
    for group, rows in enumerate(members.tolist()):
        own = read[begins[group] : begins[group + 1]]
        of_rows = [row for row in rows if row >= 0]
        found = torch.cat([by_row[row] for row in of_rows])
        assert own.tolist() == torch.stack(found.unique(return_counts=True), 1).tolist()
        for row in of_rows:
            assert torch.equal(own[places_by_row[row].long(), 0], by_row[row])
    # Groups have as many rows, or one less, and no two lists of a group differ by more.
    sizes = (members >= 0).sum(1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("product", PRODUCTS[:2])
def test_blocks_of_32_are_read_without_conflicts_of_banks(extension, product):
    library = ctypes.CDLL(extension.__file__)
    matrices, passes = ctypes.c_uint64(), ctypes.c_uint64()
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(192, 192, 96, (32, 32), generator=generator)
    tensors = make(layout, 128, torch.bfloat16, generator)
    library.take_matrix_loads(ctypes.byref(matrices), ctypes.byref(passes))
    run_product(product, *tensors, layout, None, "cuda")
    library.take_matrix_loads(ctypes.byref(matrices), ctypes.byref(passes))
    assert passes.value == matrices.value == layout.num_blocks * 20 * 4


@every_product
@pytest.mark.parametrize(
    ("side", "rows", "sizes"),
    [
        (32, 1, (2, 3, 3)),  # one token
        (32, 300, (50, 18, 18)),  # three groups of block-rows, more blocks than a cluster takes
        (32, 0, (1, 2, 1)),
        (64, 1, (2, 3, 3)),
        (64, 0, (1, 2, 1)),
        (128, 1025, (1, 9, 9)),  # more blocks than a cluster takes, tokens of two clusters and one
        (64, 2200, (1, 4, 1)),  # several parts
        (128, 40, (4, 1, 1)),
    ],
)
def test_products_of_every_size(product, side, rows, sizes, monkeypatch):
    use(monkeypatch, 3)
    generator = torch.Generator().manual_seed(0)
    out, into, fan_in = (size * side for size in sizes)
    layout = sk.FanInLayout.random(out, into, fan_in, (side, side), generator=generator)
    tensors = make(layout, rows, torch.bfloat16, generator, exact=True)
    assert is_on_hopper(product, *tensors, layout) == (rows > 0)
    bias = bias_for(product, layout, torch.bfloat16, generator, exact=True)
    check_product(product, *tensors, layout, bias, exact=True)


@every_product
def test_one_token_may_have_any_stride(product):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(128, 192, 128, (64, 64), generator=generator)
    x, grad_output, values = make(layout, 2, torch.bfloat16, generator, exact=True)
    one = [torch.nn.functional.pad(t, (0, 1))[:1, :-1] for t in (x, grad_output)]
    assert one[0].stride(0) % 8 == 1
    assert is_on_hopper(product, *one, values, layout)
    check_product(product, *one, values, layout, None, exact=True)


def test_an_input_that_nobody_reads_has_no_gradient():
    for side in SIDES:
        indices = torch.tensor([[1], [1], [3]], dtype=torch.int32)
        layout = sk.FanInLayout(indices, 4 * side, 3 * side, (side, side))
        generator = torch.Generator().manual_seed(0)
        tensors = make(layout, 70, torch.bfloat16, generator, exact=True)
        grad = check_product("grad_input", *tensors, layout, None, exact=True)
        assert (grad.view(70, 4, side)[:, [0, 2]] == 0).all()
        bias = bias_for("grad_input", layout, torch.bfloat16, generator, exact=True)
        check_product("grad_input", *tensors, layout, bias, exact=True)


@every_dtype
@every_product
@pytest.mark.parametrize("side", SIDES)
def test_products_have_the_same_bits_whatever_comes_first(dtype, product, side, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(2 * side, 3 * side, 2 * side, (side, side), generator=generator)
    tensors = make(layout, 600, dtype, generator)
    results = []
    for seed, order in enumerate(ORDERS):
        use(monkeypatch, seed, order)
        monkeypatch.setenv("SK_EMULATION_MULTIPROCESSORS", str(3 + 2 * seed))
        results.append(run_product(product, *tensors, layout, None, "cuda"))
    assert all(torch.equal(result, results[0]) for result in results)
    if product != "grad_weight":
        x, grad_output, values = tensors
        for some in (slice(0, 1), slice(511, 514)):
            few = run_product(product, x[some], grad_output[some], values, layout, None, "cuda")
            assert torch.equal(few, results[0][some])


@every_product
@pytest.mark.parametrize("side", SIDES)
def test_a_bad_element_reaches_only_what_reads_it(product, side):
    generator = torch.Generator().manual_seed(5)
    layout = sk.FanInLayout.random(3 * side, 5 * side, 2 * side, (side, side), generator=generator)
    x, grad_output, values = make(layout, 37, torch.bfloat16, generator)
    mask = to_dense(torch.ones_like(values), layout).float()
    for source in {"forward": [x], "grad_input": [grad_output]}.get(product, [x, grad_output]):
        before = source[11, 7].clone()
        source[11, 7] = torch.nan
        actual = run_product(product, x, grad_output, values, layout, None, "cuda")
        is_bad = source.isnan().float()
        source[11, 7] = before
        if product == "grad_weight":
            reached = is_bad.sum(0) > 0
            reached = reached.view(1, -1) if source is x else reached.view(-1, 1)
            touched = kept(reached.expand(3 * side, 5 * side), layout)
        else:
            touched = is_bad @ (mask.t() if product == "forward" else mask) > 0
        assert torch.equal(~actual.isfinite(), touched)


def fallbacks(x, grad_output, values):
    """What the tensor maps cannot describe, by a name."""
    wide = [torch.nn.functional.pad(tensor, (0, 1)) for tensor in (x, grad_output)]
    flat = [torch.nn.functional.pad(tensor.flatten(), (1, 0)) for tensor in (x, grad_output)]
    moved = [f[1:].view_as(tensor) for f, tensor in zip(flat, (x, grad_output), strict=True)]
    columns = [tensor.t().contiguous().t() for tensor in (x, grad_output)]
    return {
        "rows that are no multiple of 16 bytes apart": (wide[0][:, :-1], wide[1][:, :-1], values),
        "an address that is no multiple of 16": (*moved, values),
        "columns that are no neighbours": (*columns, values),
        "the same row again": (x[:1].expand_as(x), grad_output[:1].expand_as(grad_output), values),
        "float32": (x.float(), grad_output.float(), values.float()),
    }


@every_product
@pytest.mark.parametrize("side", [32, 64])
def test_what_tma_cannot_describe_runs_on_the_other_kernels(product, side, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(2 * side, 3 * side, 2 * side, (side, side), generator=generator)
    tensors = make(layout, 9, torch.bfloat16, generator, exact=True)
    bias = bias_for(product, layout, torch.bfloat16, generator, exact=True)
    assert is_on_hopper(product, *tensors, layout)
    for name, others in fallbacks(*tensors).items():
        assert not is_on_hopper(product, *others, layout), name
        fitting = None if bias is None else bias.to(others[2].dtype)
        check_product(product, *others, layout, fitting, exact=True)
    monkeypatch.setenv("SK_EMULATION_CAPABILITY", "80")
    assert not is_on_hopper(product, *tensors, layout)
    check_product(product, *tensors, layout, bias, exact=True)
    monkeypatch.setenv("SK_EMULATION_CAPABILITY", "100")
    assert not is_on_hopper(product, *tensors, layout)
    for block in ((32, 64), (128, 64), (16, 16)):
        other = sk.FanInLayout.random(128, 128, 128, block, generator=generator)
        monkeypatch.delenv("SK_EMULATION_CAPABILITY", raising=False)
        assert not is_on_hopper(product, *make(other, 9, torch.bfloat16, generator), other)


PROGRAM = """
import torch, test_cuda_hopper as here
import sparse_kernels as sk
from sparse_kernels import cuda
generator = torch.Generator().manual_seed(0)
layout = sk.FanInLayout.random(64, 128, 64, (64, 64), generator=generator)
with cuda._emulated(here.cuda_emulation.emulated()):
    for product in here.PRODUCTS:
        tensors = here.make(layout, 9, torch.bfloat16, generator, exact=True)
        here.check_product(product, *tensors, layout, None, exact=True)
        print(here.is_on_hopper(product, *tensors, layout))
"""


@pytest.mark.parametrize(("variable", "value"), [("DRIVER", "0"), ("CODE", "32")])
def test_a_driver_or_a_build_without_it_uses_the_other_kernels(extension, variable, value):
    """A process each: what the driver and the build have is asked for once."""
    env = {**os.environ, f"SK_EMULATION_{variable}": value}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"] * 3, done.stderr


def test_a_first_use_in_a_capture_is_refused(monkeypatch):
    env = {**os.environ, "SK_EMULATION_CAPTURE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "is used for the first time while a CUDA graph is captured" in done.stderr


def test_parts_of_the_goals(extension):
    """The goals fill an H200 without them, and need no second pass."""
    goals = (4096, 416, 32), (4096, 256, 64), (8192, 896, 128)
    for size, fan_in, side in goals:
        generator = torch.Generator().manual_seed(0)
        layout = sk.FanInLayout.random(size, size, fan_in, (side, side), generator=generator)
        pointed, _ = cuda._scheduled(layout, "rows")
        assert extension.sddmm_parts("bfloat16", pointed, 16384, True) == 0
    few = sk.FanInLayout.random(128, 128, 128, (128, 128))
    pointed, _ = cuda._scheduled(few, "rows")
    parts = [extension.sddmm_parts("bfloat16", pointed, n, True) for n in (0, 1, 600, 2048, 10**6)]
    assert parts == [0, 0, 0, 4, 16]


# Kernels with a mistake, which the tests of their results must find: the file, what is there, and
# what is in its place. All are compiled together, and one is chosen when they run.
MISTAKES = {
    "a missing wait for a box": ("pipeline", "mbarrier_wait(place.full, stages.parity);", ""),
    "a missing wait for a free stage": (
        "pipeline",
        "mbarrier_wait(place.empty, stages.parity ^ 1);",
        "",
    ),
    "a stage that is released too early": ("pipeline", "wgmma_wait<1>();", "wgmma_wait<2>();"),
    "a missing wait for the sums": ("pipeline", "wgmma_wait<0>();", "wgmma_wait<1>();"),
    "a missing fence of registers": ("pipeline", "wgmma_fence();", ""),
    "a parity that stays": ("pipeline", "parity ^= 1;", ""),
    "a block that ends early": ("pipeline", "cluster_barrier();  // nobody", ""),
    "a release for one block only": ("pipeline", "lane < kClusterBlocks", "lane < 1"),
    "halves of an operand exchanged": ("pipeline", "rank * 64", "(1 - rank) * 64"),
    "a wrong step along K": ("pipeline", "k * kStepB >> 4", "k * kStepA >> 4"),
    "a wrong leading offset": (
        "pipeline",
        "matrix_descriptor<kBytes>(place.narrow, kLeading)",
        "matrix_descriptor<kBytes>(place.narrow, kLeading / 2)",
    ),
    "a wrong tile": ("pipeline", "warpgroup * kTileBytes", "warpgroup * 2 * kTileBytes"),
    "a wrong count of bytes": (
        "spmm",
        "static_cast<unsigned>(Shared<kSide>::kStageBytes)",
        "Shared<kSide>::kStageBytes - kRowBytes",
    ),
    "a wrong fragment": (
        "spmm",
        "&d[tile][(i + j / 2) * 4 + j % 2 * 2]",
        "&d[tile][(i + j % 2) * 4 + j / 2 * 2]",
    ),
    "a wrong swizzle": ("spmm", "(i % 8 + lane / 16) ^ (token % 8)", "i % 8 + lane / 16"),
    "a missing fence of a store": ("spmm", "fence_proxy();", ""),
    "a missing wait for a store": ("spmm", "if (thread == 0) store_wait_read();", ""),
    "the list's order in place of the stored": (
        "spmm",
        "lists.ids[entry]",
        "static_cast<int>(entry)",
    ),
    "32: a missing wait for x": ("spmm_32", "wait_for(memory, column);  // for x", ""),
    "32: a missing wait for weights": (
        "spmm_32",
        "mbarrier_wait(weights.barrier(weights.slot), weights.parity);",
        "",
    ),
    "32: weights loaded to a slot that is read": (
        "spmm_32",
        "load(slot);",
        "load((slot + 1) % 3);",
    ),
    "32: a box that goes to one block": ("spmm_32", "kAllBlocks", "1 << rank"),
    "32: a wrong count of bytes": (
        "spmm_32",
        "mbarrier_arrive_expect(full, kBoxBytes);",
        "mbarrier_arrive_expect(full, kHalfBytes);",
    ),
    "32: too few arrivals for those that do not read": (
        "spmm_32",
        "kGroupRows - readers",
        "kGroupRows - readers - 1",
    ),
    "32: a block that sends before both have received": (
        "spmm_32",
        "if (count >= kShared) came(count - kShared);",
        "if (count >= kShared) mbarrier_arrive_at(memory + kEmptyAt + (count - kShared) % kBoxes "
        "* 8, 1 - rank);",
    ),
    "32: too many arrivals for a column that all read": (
        "spmm_32",
        "column % kShared == kShared - 1",
        "column % kBoxes == kBoxes - 1",
    ),
    "32: a column that all read and one does not": ("spmm_32", "pass_until(end);", ""),
    "32: a release of another stage": ("spmm_32", "release(column);", "release(column - 1);"),
    "32: a wrong swizzle": ("spmm_32", "row / 2 % 4", "row % 4"),
    "32: a wrong fragment": ("spmm_32", "&b[j / 2][j % 2 * 2]", "&b[j % 2][j / 2 * 2]"),
    "32: results in the wrong order": (
        "spmm_32",
        "&sums[tokens / 16 + i][j + m / 2][m % 2 * 2]",
        "&sums[tokens / 16 + i][j + m % 2][m / 2 * 2]",
    ),
    "32: a missing fence of a store": ("spmm_32", "fence_proxy();", ""),
    "32: a missing wait for a store": (
        "spmm_32",
        "if (lane == 0) store_wait_read();  // of what lay there",
        "",
    ),
    "32: a block that ends early": ("spmm_32", "cluster_barrier();  // nobody", ""),
    "32: the list's order in place of the stored": ("spmm_32", "p.lists.ids[next]", "next"),
    "a wrong count of bytes in dW": (
        "sddmm",
        "job.pieces * kPieceBytes<kSide>",
        "kPieces<kSide> * kPieceBytes<kSide>",
    ),
    "a wrong fragment of dW": ("sddmm", "lane % 4 * 2 + j % 2", "lane % 4 + j % 2 * 4"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """The kernels of bfloat16 with all mistakes, of which `choose` takes one by its number."""
    folder = tmp_path_factory.mktemp("mistaken")
    names = {
        "pipeline": "hopper_pipeline.cuh",
        "spmm": "spmm_hopper.cu",
        "spmm_32": "spmm_hopper_32.cu",
        "sddmm": "sddmm_hopper.cu",
        "hopper": "hopper.cu",
    }
    texts = {}
    for short, name in names.items():
        text = (cuda_emulation.ROOT / "csrc/cuda" / name).read_text()
        # Two kernels in the place of each product's eight and four.
        text = text.replace("choose_kernel<Half>", "choose_kernel<Bf16>").replace(
            "<Half,", "<Bf16,"
        )
        for number, (file, right, wrong) in enumerate(MISTAKES.values(), 1):
            if file != short:
                continue
            assert text.count(right) == 1, f"{right!r} must be once in {name}"
            statement, comment, _ = right.partition("  //")
            if right.endswith(";") or comment:
                both = f"if (mistake() == {number}) {{ {wrong} }} else {{ {statement} }}"
                text = text.replace(statement, both)
            else:
                text = text.replace(right, f"(mistake() == {number} ? {wrong} : {right})")
        texts[name] = text
    texts["hopper_pipeline.cuh"] = texts["hopper_pipeline.cuh"].replace(
        "#pragma once",
        "#pragma once\ninline int& mistake() { static int number = 0; return number; }",
    )
    texts["hopper.cu"] += (
        'extern "C" __attribute__((visibility("default"))) void choose(int number) '
        "{ mistake() = number; }\n"
    )
    for name, text in texts.items():
        (folder / name).write_text(text)
    sources = [folder / s.name if s.name in texts else s for s in cuda_emulation.SOURCES]
    path = cuda_emulation.build(cuda_emulation.MODULE, [cuda_emulation.BINDINGS, *sources], [])
    return cuda_emulation.load(cuda_emulation.MODULE, path)


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_mistake_in_a_kernel_is_found(mistake, mistaken, monkeypatch):
    number = 0 if mistake is None else 1 + list(MISTAKES).index(mistake)
    ctypes.CDLL(mistaken.__file__).choose(number)
    generator = torch.Generator().manual_seed(0)
    problems = []
    for side, sizes, rows in [(32, (23, 40, 5), 130), (64, (3, 3, 2), 40), (128, (2, 3, 3), 130)]:
        out, into, fan_in = (size * side for size in sizes)
        layout = sk.FanInLayout.random(out, into, fan_in, (side, side), generator=generator)
        problems.append((layout, make(layout, rows, torch.bfloat16, generator, exact=True)))

    def is_right(seed):
        use(monkeypatch, seed, ORDERS[seed % 3])
        try:
            for layout, tensors in problems:
                for product in PRODUCTS:
                    bias = bias_for(product, layout, torch.bfloat16, generator, exact=True)
                    check_product(product, *tensors, layout, bias, exact=True)
        except (AssertionError, RuntimeError):
            return False
        return True

    with cuda._emulated(mistaken):
        found = not all(map(is_right, range(1 if mistake is None else 6)))
    assert found == (mistake is not None)


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized process")
def test_kernels_stay_in_bounds():
    """Some of the tests above again, under AddressSanitizer and UBSan."""
    options = ["-q", "-x", "-n", "0", "-m", "slow", "-p", "no:cacheprovider"]
    done = run_sanitized(["-m", "pytest", *options, "-k", "sizes0 or sizes3", __file__])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 passed" in done.stdout
