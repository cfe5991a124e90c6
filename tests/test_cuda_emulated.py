"""The CUDA kernels, compiled for the CPU from the same source: right, deterministic, in bounds.

tests/cuda_emulation runs the threads of a block as fibers, in an order that the tests choose, with
shared memory that begins as NaN; a kernel that lacks a barrier is wrong or differs in one of the
orders, and one that steps outside its memory fails under AddressSanitizer. test_cuda.py runs the
same kernels on a GPU.
"""

import ctypes
import math
import re
from pathlib import Path

import cuda_emulation
import pytest
import torch
from emulated import ORDERS, SANITIZED, bias_for, check_product, emulated, run_sanitized, use_order
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    PRODUCTS,
    STRIDES,
    kept,
    layouts,
    random,
    seeds,
    sparse_product,
    strided,
    to_dense,
    tokens,
)
from test_abs_topk import draw, expected, same_bits

import sparse_kernels as sk
from sparse_kernels import backends, cuda
from sparse_kernels.layout import Problem
from sparse_kernels.topk import abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
BLOCKS = [(1, 1), (1, 2), (2, 1), (4, 1), (16, 1), (2, 3), (3, 5), (8, 8)]

pytestmark = pytest.mark.slow
every_product = pytest.mark.parametrize("product", PRODUCTS)


@pytest.fixture(scope="module")
def extension():
    """In a process of `run_sanitized`, the sanitized build."""
    return cuda_emulation.emulated(sanitize=SANITIZED)


@pytest.fixture(autouse=True)
def _use_it(extension):
    with emulated(extension):
        yield


def use_slices(monkeypatch, features):
    """Cuts the inputs into slices of that many, as those are that exceed shared memory."""
    monkeypatch.setattr(cuda, "_SLICE_FEATURES", features)
    monkeypatch.setattr(cuda, "_GRAD_WEIGHT_SLICE_FEATURES", features)


def make(layout, rows, dtype, generator, x_kind="contiguous", grad_kind="contiguous", exact=False):
    x = strided(rows, layout.in_features, x_kind, dtype, generator, exact)
    grad_output = strided(rows, layout.out_features, grad_kind, dtype, generator, exact)
    return x, grad_output, random(layout.values_shape, dtype, generator, exact)


@every_dtype
@every_product
@given(
    layouts(max_features=80, blocks=BLOCKS),
    tokens(150),
    st.booleans(),
    st.sampled_from(STRIDES),
    st.sampled_from(STRIDES),
    st.sampled_from([1, 8, 24, 2**20]),
    st.sampled_from(ORDERS),
    seeds(),
    st.booleans(),
)
def test_products_match_dense(
    dtype, product, layout, rows, with_bias, x_kind, grad_kind, slices, order, seed, exact
):
    generator = torch.Generator().manual_seed(seed)
    tensors = make(layout, rows, dtype, generator, x_kind, grad_kind, exact)
    bias = bias_for(product, layout, dtype, generator, exact) if with_bias else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_slices(monkeypatch, slices)
        use_order(monkeypatch, order)
        check_product(product, *tensors, layout, bias, exact)


# What the drawn sizes never reach. The emulated device has the shared memory of compute capability
# 9.0, so that the widest inputs are cut into slices without being asked to.
LARGE = {
    "one-vector-of-tokens": (3, 3, 11000, 40, (1, 1)),
    "slices-for-real": (9, 3, 20000, 40, (1, 1)),
    "indices-past-int16": (5, 4, 40000, 9, (1, 1)),
    "indices-of-32-bits": (5, 4, 70001, 9, (1, 1)),
    "outputs-of-32-bits": (5, 70001, 4, 2, (1, 1)),
    "many-outputs": (70, 700, 40, 3, (1, 1)),
    "blocks-of-32-bits": (3, 4, 131074, 6, (2, 2)),
    "largest-block": (5, 256, 256, 128, (128, 128)),
    "one-by-one": (70, 1, 1, 1, (1, 1)),
    "many-parts": (3000, 2, 3, 2, (1, 1)),
}


@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", LARGE)
def test_products_are_exact_at_large_sizes(dtype, product, case):
    rows, *sizes = LARGE[case]
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(*sizes, generator=generator)
    tensors = make(layout, rows, dtype, generator, exact=True)
    bias = bias_for(product, layout, dtype, generator, exact=True)
    check_product(product, *tensors, layout, bias, exact=True)


@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "sizes"), [(9, (8, 1024, 1024, (1, 1))), (4096, (4, 8, 2, (1, 1)))]
)
def test_long_sums_are_as_accurate_as_dense(dtype, product, rows, sizes):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(*sizes, generator=generator)
    check_product(product, *make(layout, rows, dtype, generator), layout)


@every_dtype
@every_product
@pytest.mark.parametrize("block", [(1, 1), (16, 1), (2, 3)])
def test_products_have_the_same_bits_in_every_order(dtype, product, block, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(272, 48, 24, block, generator=generator)
    tensors = make(layout, 70, dtype, generator)
    bias = bias_for(product, layout, dtype, generator)
    for slices in (2**20, 13):
        use_slices(monkeypatch, slices)
        results = []
        for order in [*ORDERS, "forward"]:
            use_order(monkeypatch, order)
            results.append(sparse_product(product, *tensors, layout, bias, "cuda"))
        assert all(torch.equal(result, results[0]) for result in results)


@every_dtype
@every_product
def test_products_of_a_row_do_not_depend_on_the_other_rows(dtype, product):
    """Whatever the tile: one token alone has the bits that it has among many."""
    if product == "grad_weight":
        pytest.skip("grad_weight sums over the rows")
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(40, 48, 24, generator=generator)
    x, grad_output, values = make(layout, 70, dtype, generator)
    together = sparse_product(product, x, grad_output, values, layout, None, "cuda")
    for row in (0, 33, 69):
        some = slice(row, row + 1)
        alone = sparse_product(product, x[some], grad_output[some], values, layout, None, "cuda")
        assert torch.equal(alone, together[some])


# Blocks of each kernel, and of unstructured weights every number of inputs that share a sum.
@pytest.mark.parametrize(
    ("dtype", "block", "fan_in"),
    [
        (torch.float32, (2, 2), 4),
        *[(dtype, (1, 1), n) for dtype in (torch.bfloat16, torch.float16) for n in (3, 7, 19)],
    ],
)
@every_product
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_bad_element_reaches_only_what_reads_it(product, bad, dtype, block, fan_in):
    generator = torch.Generator().manual_seed(5)
    layout = sk.FanInLayout.random(24, 20, fan_in, block, generator=generator)
    x, grad_output, values = make(layout, 37, dtype, generator)
    mask = to_dense(torch.ones_like(values), layout).float()
    for source in {"forward": [x], "grad_input": [grad_output]}.get(product, [x, grad_output]):
        before = source[11, 7].clone()
        source[11, 7] = float(bad)
        actual = sparse_product(product, x, grad_output, values, layout, None, "cuda")
        is_bad = (~source.isfinite()).float()
        source[11, 7] = before
        if product == "grad_weight":
            reached = is_bad.sum(0) > 0
            reached = reached.expand(24, -1) if source is x else reached.view(-1, 1).expand(-1, 20)
            touched = kept(reached, layout)
        else:
            touched = is_bad @ (mask.t() if product == "forward" else mask) > 0
        assert torch.equal(~actual.isfinite(), touched)


@every_dtype
@pytest.mark.parametrize("fan_in", [1, 2, 3, 4, 5, 8, 9, 16, 17, 40])
def test_grad_weight_of_every_fan_in(dtype, fan_in, monkeypatch):
    """More outputs than a block takes, tokens that end within a tile, slices of any size."""
    generator = torch.Generator().manual_seed(fan_in)
    layout = sk.FanInLayout.random(271, 128, fan_in, generator=generator)
    x, grad_output, values = make(layout, 37, dtype, generator, exact=True)
    for slices in (64, 13):
        use_slices(monkeypatch, slices)
        check_product("grad_weight", x, grad_output, values, layout, exact=True)


@every_dtype
@pytest.mark.parametrize("product", ["forward", "grad_input"])
@pytest.mark.parametrize("fan_in", [1, 3, 4, 8, 17])
def test_unstructured_products_of_every_fan_in(dtype, product, fan_in):
    """Tiles of every size, full and not, loaded by matrices and not; lists of any length."""
    generator = torch.Generator().manual_seed(fan_in)
    for rows, columns in ((192, 192), (271, 75)):
        layout = skewed(rows, columns, fan_in, (1, 1), generator)
        for count in (3, 8, 16, 70):
            tensors = make(layout, count, dtype, generator, exact=True)
            bias = bias_for(product, layout, dtype, generator, exact=True)
            check_product(product, *tensors, layout, bias, exact=True)


def passes_per_matrix(extension, run):
    """How often shared memory is read for a matrix that is gathered; 2.6 in random order."""
    library, (matrices, passes) = (
        ctypes.CDLL(extension.__file__),
        (ctypes.c_uint64(), ctypes.c_uint64()),
    )
    library.take_matrix_loads(ctypes.byref(matrices), ctypes.byref(passes))
    run()
    library.take_matrix_loads(ctypes.byref(matrices), ctypes.byref(passes))
    return passes.value / matrices.value


@pytest.mark.parametrize(
    ("product", "sizes", "rows", "limit"),
    [
        ("forward", (1024, 2048, 8), 32, 1.7),
        ("forward", (1024, 4096, 4), 16, 1.95),
        ("forward", (256, 8192, 32), 8, 1.4),
        ("grad_input", (4096, 4096, 4), 16, 1.05),
        ("grad_input", (8192, 2048, 8), 8, 1.15),
        ("grad_weight", (128, 2048, 8), 16, 2.12),  # 2.2, and one for the matrices of dY
        ("grad_weight", (192, 4096, 4), 16, 2.02),
    ],
)
def test_gathered_rows_lie_in_different_banks(extension, product, sizes, rows, limit):
    """The order of the slots; the same for an equal layout, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(*sizes, generator=generator)
    x, grad_output, values = make(layout, rows, torch.bfloat16, generator)

    def run(layout):
        return sparse_product(product, x, grad_output, values, layout, None, "cuda")

    result = run(layout)
    assert passes_per_matrix(extension, lambda: run(layout)) <= limit
    assert torch.equal(result, run(sk.FanInLayout(layout.indices.clone(), layout.in_features)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        (4096, 4096, 4),
        (8192, 2048, 8),
        (4096, 4096, 256, (64, 64)),
        (8192, 8192, 896, (128, 128)),
    ],
)
def test_blocks_of_the_goals_fill_an_h200(sizes, monkeypatch):
    """One block lies on a multiprocessor at a time; in their last round few of these are idle."""
    monkeypatch.setenv("SK_EMULATION_COUNT", "1")
    monkeypatch.setenv("SK_EMULATION_MULTIPROCESSORS", "132")
    layout = sk.FanInLayout.random(*sizes, generator=torch.Generator().manual_seed(0))
    x, grad_output = (torch.empty(16384, n, dtype=torch.bfloat16) for n in sizes[1::-1])
    values = torch.empty(layout.values_shape, dtype=torch.bfloat16)
    extension = cuda_emulation.counted()
    blocks, shared_bytes = ctypes.c_uint64(), ctypes.c_uint64()
    for product in PRODUCTS:
        with cuda._emulated(extension):
            sparse_product(product, x, grad_output, values, layout, None, "cuda")
        ctypes.CDLL(extension.__file__).take_largest_launch(
            ctypes.byref(blocks), ctypes.byref(shared_bytes)
        )
        assert shared_bytes.value > (228 << 10) // 2
        rounds = blocks.value / 132
        assert 0.95 <= rounds / math.ceil(rounds) <= 1, (product, blocks.value)


@pytest.mark.parametrize("fan_in", [3, 8, 40])
def test_how_rows_are_dealt_changes_no_sum(fan_in):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(150, 300, fan_in, generator=generator)
    x, grad_output, _ = make(layout, 50, torch.bfloat16, generator)
    result = sk.grad_weight(grad_output, x, layout, "cuda")
    (dealt,) = layout.cache["cuda.rows.dealt"]
    rows = dealt[:, None] >> 4 * torch.arange(16) & 15
    assert torch.equal(rows.sort(1).values, torch.arange(16).expand_as(rows))
    dealt.copy_((torch.arange(16) << 4 * torch.arange(16)).sum())  # as they come
    assert torch.equal(sk.grad_weight(grad_output, x, layout, "cuda"), result)


@pytest.mark.parametrize(("fan_in", "order"), [(3, ORDERS[0]), (7, ORDERS[1]), (19, ORDERS[2])])
def test_grad_weight_of_parts_of_several_tiles(fan_in, order, monkeypatch):
    use_order(monkeypatch, order)
    generator = torch.Generator().manual_seed(fan_in)
    layout = sk.FanInLayout.random(90, 48, fan_in, generator=generator)
    tensors = make(layout, 2199, torch.bfloat16, generator, exact=True)
    check_product("grad_weight", *tensors, layout, exact=True)


@given(st.integers(1, 200), st.sampled_from([1, 2, 3, 4, 8]), seeds())
def test_the_order_takes_the_longest_lists_first(rows, block_in, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (rows,), generator=generator)
    order = cuda._order(lengths, block_in).long()
    count = cuda._units(rows, block_in)
    assert torch.equal(order.sort().values, torch.arange(count))
    length = lengths.repeat_interleave(count // rows)[order]
    full = count - count % 32
    runs = order[:full].view(-1, 32)
    # Results of a run are neighbours in memory.
    assert torch.equal(runs.sort(1).values, runs.amin(1, True) // 32 * 32 + torch.arange(32))
    longest = length[:full].view(-1, 32).amax(1)
    for some in (longest, *([*length[:full].view(-1, 32), length[full:]] if block_in == 1 else [])):
        assert (some.diff() <= 0).all()
    for some, where in ((longest, runs[:, 0] // 32), (length[full:], order[full:])):
        if some is longest or block_in == 1:
            assert (where.diff()[some.diff() == 0] > 0).all()


def skewed(rows, columns, fan_in, block, generator):
    """A layout in which a few inputs have most of the readers, and most have none or few."""
    weights = torch.arange(1, columns + 1).double() ** -2
    shuffled = weights[torch.randperm(columns, generator=generator)]
    indices = shuffled.expand(rows, -1).multinomial(fan_in, generator=generator).sort(1).values
    return sk.FanInLayout(indices.int(), columns * block[1], rows * block[0], block)


@every_dtype
@pytest.mark.parametrize("block", [(1, 1), (16, 1), (2, 2), (3, 4)])
def test_the_order_changes_no_bits(dtype, block, monkeypatch):
    def grad_input():
        generator = torch.Generator().manual_seed(0)
        layout = skewed(150, 100, 5, block, generator)
        _, grad_output, values = make(layout, 37, dtype, generator)
        bias = bias_for("grad_input", layout, dtype, generator)
        check_product("grad_input", None, grad_output, values, layout, bias)
        return sparse_product("grad_input", None, grad_output, values, layout, bias, "cuda")

    def unsorted(lengths, block_in):
        return torch.arange(cuda._units(lengths.shape[0], block_in), dtype=torch.int32)

    for slices in (2**20, 40):
        with monkeypatch.context() as patch:
            use_slices(patch, slices)
            ordered = grad_input()
            patch.setattr(cuda, "_order", unsorted)
            assert torch.equal(grad_input(), ordered)


def test_the_whole_step_compiles():
    layout = sk.FanInLayout.random(24, 20, 4, (2, 2))
    values = torch.randn(layout.values_shape, requires_grad=True)
    x = torch.randn(7, 20, requires_grad=True)

    def step(x, values):
        return sk.sparse_linear(x, values, layout, backend="cuda").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        torch.autograd.grad(step(x, values), (x, values)),
        torch.autograd.grad(compiled(x, values), (x, values)),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_what_no_kernel_can_run_is_refused():
    layout = sk.FanInLayout.random(8, 6, 2)
    x, values = torch.randn(3, 6), torch.randn(layout.values_shape)
    with pytest.raises(RuntimeError, match=r"cannot run forward.*torch\.float64"):
        sk.sparse_linear(x.double(), values.double(), layout, backend="cuda")
    wide = sk.FanInLayout.random(8, 258, 258, (8, 129))
    with pytest.raises(RuntimeError, match=r"at most 128, and the block is \(8, 129\)"):
        sk.sparse_linear(torch.randn(3, 258), torch.randn(wide.values_shape), wide, backend="cuda")


def test_a_launch_that_fails_names_kernel_and_problem(extension):
    layout = sk.FanInLayout.random(8, 6, 2)
    x, values = torch.randn(3, 6), torch.randn(layout.values_shape)
    lists, _ = cuda._scheduled(layout, "rows")
    arguments = ["forward", "float32", lists, x.data_ptr(), 6, 1, values.data_ptr(), 0, 0]
    with pytest.raises(RuntimeError, match="choosing device 7 failed: invalid device ordinal"):
        extension.spmm(*arguments, torch.empty(3, 8).data_ptr(), 3, 2**20, False, 7, 0)


def test_why_not_says_what_it_lacks(extension):
    problem = Problem("cpu", torch.float32, "forward", 256, 256, 128, (1, 1))
    assert cuda.why_not(problem) is None
    for change, reason in [
        ({"device": "cuda"}, "it runs on cpu tensors, and the device is cuda"),
        ({"dtype": torch.float64}, "the dtype is torch.float64"),
        ({"block": (1, 256)}, r"at most 128, and the block is \(1, 256\)"),
        ({"out_features": 2**31}, "it counts at most 2147483647 features, .*has 2147483648"),
        ({"out_features": 2**30, "fan_in": 256}, "it counts at most 2147483647 blocks"),
    ]:
        assert re.search(reason, cuda.why_not(Problem(**{**vars(problem), **change})))


def test_small_blocks_go_to_cuda_and_large_ones_to_triton():
    for block, first in [
        ((1, 1), "cuda"),
        ((64, 1), "cuda"),
        ((8, 8), "cuda"),
        ((16, 16), "triton"),
    ]:
        problem = Problem("cuda", torch.float32, "forward", 256, 256, 128, block)
        assert backends.rule_for(problem).order[0] == first


# Kernels with a mistake, which the tests of their results must find.
MISTAKES = {
    "a missing barrier": ("sddmm_unstructured.cuh", "__syncthreads();  // nobody", "// nobody"),
    "a wrong fragment": ("sddmm_unstructured.cuh", "place ^ (lane / 16)", "place ^ (lane / 8 % 2)"),
    "a wrong swizzle": ("sddmm_unstructured.cuh", ": tile_base(input, 1)", ": 2u * input"),
    "a wrong slot": ("spmm_unstructured.cuh", "lane % 8 + lane / 16 * 8", "lane % 16"),
    "one buffer in place of two": ("topk.cuh", "of_lane_ += turn_;  // so", "// so"),
}


@pytest.mark.skipif(SANITIZED, reason="once is enough")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_kernel_is_found(mistake, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(128, 64, 5, generator=generator)
    x, grad_output, values = make(layout, 2200, torch.bfloat16, generator, exact=True)
    truth = kept(grad_output.double().t() @ x.double(), layout).bfloat16()
    results = (x[:40].double() @ to_dense(values, layout).double().t()).bfloat16()
    row = draw("normal", 2, 3001, torch.float32, 3)

    def right_in(order):
        use_order(monkeypatch, order)
        try:
            products = sk.grad_weight(grad_output, x, layout, "cuda")
            outputs = sk.sparse_linear(x[:40], values, layout, backend="cuda")
            kept_entries = abs_topk(row, 700, "cuda")
        except RuntimeError:  # threads wait at different barriers
            return False
        right = torch.equal(products, truth) and torch.equal(outputs, results)
        return right and same_bits(kept_entries, expected(row, 700))

    assert right_in("forward")
    with cuda._emulated(cuda_emulation.emulated_with(tmp_path, *MISTAKES[mistake])):
        assert not all(map(right_in, ORDERS))


TOPK = Path(__file__).with_name("test_cuda_emulated_topk.py")


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized process")
def test_kernels_stay_in_bounds():
    """The quick tests of both files, again under AddressSanitizer and UBSan."""
    chosen = "match_dense or stable_sort or masked_gradient"
    options = ["-q", "-x", "-n", "0", "-m", "slow", "-p", "no:cacheprovider", "-k", chosen]
    done = run_sanitized(["-m", "pytest", *options, __file__, str(TOPK)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
