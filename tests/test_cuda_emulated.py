"""The CUDA kernels, compiled for the CPU from the same source: right, deterministic, in bounds.

tests/cuda_emulation runs the threads of a block as fibers, in an order that the tests choose, with
shared memory that begins as NaN; a kernel that lacks a barrier is wrong or differs in one of the
orders, and one that steps outside its memory fails under AddressSanitizer. test_cuda.py runs the
same kernels on a GPU.
"""

import contextlib
import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    PRODUCTS,
    STRIDES,
    assert_accurate,
    dense_product,
    kept,
    layouts,
    random,
    seeds,
    sparse_product,
    strided,
    to_dense,
    tokens,
)
from test_abs_topk import INTEGERS, KINDS, draw, expected, same_bits
from test_fused_topk import bound

import sparse_kernels as sk
from sparse_kernels import backends, checks, cuda, ops, reference, transformer_ops
from sparse_kernels.layout import Problem
from sparse_kernels.topk import abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(1, 1), (1, 2), (2, 1), (4, 1), (16, 1), (2, 3), (3, 5), (8, 8)]
ORDERS = ["forward", "reversed", "shuffled"]
INTEGERS.setdefault(torch.float16, torch.int16)

pytestmark = pytest.mark.slow
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_product = pytest.mark.parametrize("product", PRODUCTS)


@pytest.fixture(scope="module")
def extension():
    """In the sanitized process of the last tests, the sanitized build."""
    return cuda_emulation.emulated(sanitize="SK_SANITIZED_EMULATION" in os.environ)


@pytest.fixture(autouse=True)
def _use_it(extension):
    """The public functions run the emulated kernels, and take float16 as they do on a GPU."""
    with cuda._emulated(extension), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(checks.DTYPES, "cpu", checks.DTYPES["cuda"])
        yield


def use_order(monkeypatch, order):
    monkeypatch.setenv("SK_EMULATION_ORDER", order)


def use_slices(monkeypatch, features):
    """Cuts the inputs into slices of that many, as those are that exceed shared memory."""
    monkeypatch.setattr(cuda, "_SLICE_FEATURES", features)
    monkeypatch.setattr(cuda, "_GRAD_WEIGHT_SLICE_FEATURES", features)


def make(layout, rows, dtype, generator, x_kind="contiguous", grad_kind="contiguous", exact=False):
    x = strided(rows, layout.in_features, x_kind, dtype, generator, exact)
    grad_output = strided(rows, layout.out_features, grad_kind, dtype, generator, exact)
    return x, grad_output, random(layout.values_shape, dtype, generator, exact)


def bias_for(product, layout, dtype, generator, exact=False):
    size = {"forward": layout.out_features, "grad_input": layout.in_features}.get(product)
    return None if size is None else random((size,), dtype, generator, exact)


def check_product(product, x, grad_output, values, layout, bias=None, exact=False):
    actual = sparse_product(product, x, grad_output, values, layout, bias, "cuda")
    assert actual.dtype == values.dtype
    assert actual.is_contiguous()

    def dense(convert):
        result = dense_product(
            product,
            convert(x) if x is not None else x,
            convert(grad_output),
            convert(to_dense(values, layout)),
            None if bias is None else convert(bias),
        )
        return kept(result, layout) if product == "grad_weight" else result

    truth = dense(torch.Tensor.double)
    if exact:
        assert torch.equal(actual, truth.to(values.dtype))
    else:
        assert_accurate(actual, dense(lambda t: t), truth, dense(lambda t: t.double().abs()))
    return actual


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
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 4),
    cols=st.integers(1, 300),
    share=st.floats(0, 1),
    how=st.sampled_from(["contiguous", "transposed", "stepped"]),
    held=st.booleans(),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 2**32 - 1),
)
def test_abs_topk_keeps_what_a_stable_sort_keeps(
    dtype, kind, rows, cols, share, how, held, order, seed
):
    x = {
        "contiguous": lambda: draw(kind, rows, cols, dtype, seed),
        "transposed": lambda: draw(kind, cols, rows, dtype, seed).t(),
        "stepped": lambda: draw(kind, 2 * rows, 3 * cols, dtype, seed)[::2, ::3],
    }[how]()
    k = max(1, min(cols, round(share * cols)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_order(monkeypatch, order)
        monkeypatch.setattr(cuda, "_HELD_BYTES", 2**20 if held else 0)
        y = abs_topk(x, k, "cuda")
    assert y.is_contiguous()
    assert same_bits(y, expected(x, k))


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


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_abs_topk_on_long_rows(dtype, kind):
    x = draw(kind, 2, 3001, dtype, 7)
    for k in (1, 313, 3000, 3001):
        assert same_bits(abs_topk(x, k, "cuda"), expected(x, k)), k


@every_dtype
@pytest.mark.parametrize("order", ORDERS)
def test_abs_topk_of_more_rows_than_blocks_in_every_order(dtype, order, monkeypatch):
    use_order(monkeypatch, order)
    for kind, rows, cols in [("ties", 200, 530), ("normal", 250, 300)]:
        x = draw(kind, rows, cols, dtype, 3)
        assert same_bits(abs_topk(x, 100, "cuda"), expected(x, 100))


@every_dtype
def test_abs_topk_of_rows_unlike_those_before(dtype):
    """A block's search begins at the threshold of its last row."""
    x = draw("normal", 250, 72, dtype, 4)
    scales = 2.0 ** torch.randint(-12, 13, (250, 1), generator=torch.Generator().manual_seed(0))
    x = (x * scales).to(dtype)
    x[60::7], x[61::7], x[62::7] = 0, torch.inf, torch.nan
    for k in (1, 20, 72):
        assert same_bits(abs_topk(x, k, "cuda"), expected(x, k)), k


@every_dtype
def test_abs_topk_gradient_is_the_masked_gradient(dtype):
    x = draw("special", 4, 300, dtype, 1).requires_grad_()
    y = abs_topk(x, 200, "cuda")
    grad = draw("normal", 300, 4, dtype, 2).t()
    y.backward(grad)
    assert torch.equal(x.grad, torch.where(y.detach() != 0, grad, 0))
    assert abs_topk(torch.empty(0, 5, dtype=dtype), 2, "cuda").shape == (0, 5)


def rows_of(how, rows, cols, dtype, seed, size=2.0):
    """x and a gradient, with these strides."""
    factors = {"contiguous": (1, 1), "stepped": (2, 3), "transposed": (1, 1)}[how]
    tensors = []
    for number in (0, 1):
        shape = (cols, rows) if how == "transposed" else (factors[0] * rows, factors[1] * cols)
        whole = draw("normal", *shape, torch.float64, seed + number).mul(size).to(dtype)
        tensors.append(whole.t() if how == "transposed" else whole[:: factors[0], :: factors[1]])
    return tensors


def assert_like(made, exact, peer):
    """At most twice PyTorch's own error, and a unit in the last place: see test_fused_topk."""
    assert made.is_contiguous()
    assert made.dtype == peer.dtype
    assert ((made.double() - exact).abs() <= bound(made, exact, peer)).all()


fused_rows = given(
    rows=st.integers(0, 5),
    cols=st.one_of(st.integers(1, 70), st.sampled_from([300, 512, 1024, 1030])),
    share=st.floats(0, 1),
    how=st.sampled_from(["contiguous", "transposed", "stepped"]),
    held=st.booleans(),
    order=st.sampled_from(ORDERS),
    size=st.sampled_from([0.1, 2.0, 8.0]),
    seed=st.integers(0, 2**31),
)


@contextlib.contextmanager
def emulating(order, held):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_order(monkeypatch, order)
        monkeypatch.setattr(cuda, "_HELD_BYTES", 2**20 if held else 0)
        yield


@every_dtype
@fused_rows
def test_gelu_abs_topk_and_its_gradient(dtype, rows, cols, share, how, held, order, size, seed):
    x, grad = rows_of(how, rows, cols, dtype, seed, size)
    k = max(1, min(cols, round(share * cols)))
    with emulating(order, held):
        whole, y = (ops.gelu_abs_topk(x, count, "cuda") for count in (cols, k))
        made = ops.gelu_abs_topk_backward(grad, y, x, "cuda")
    assert same_bits(y, expected(whole, k))
    if rows == 0:
        return
    gelu = torch.nn.functional.gelu
    assert_like(whole, gelu(x.double()), gelu(x))
    leaves = [tensor.detach().requires_grad_() for tensor in (x.double(), x)]
    grads = [
        torch.autograd.grad(gelu(leaf), leaf, grad.to(leaf.dtype))[0].where(y != 0, 0)
        for leaf in leaves
    ]
    assert_like(made, *grads)


@every_dtype
def test_gelu_abs_topk_of_special_values(dtype):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 30.0, -30.0, 1e-7]]).to(dtype)
    for count in (8, 9):
        padded = torch.nn.functional.pad(x, (0, count - 8))
        y = ops.gelu_abs_topk(padded, count, "cuda")
        wanted = torch.tensor([[torch.nan, torch.inf, torch.nan, 0, 0, 30, 0, 5e-8]]).to(dtype)
        torch.testing.assert_close(y[:, :8], wanted, rtol=1e-2, atol=1e-6, equal_nan=True)
    # Where nothing is kept, nothing passes, though the derivative at infinity is not a number.
    few = ops.gelu_abs_topk(x, 1, "cuda")
    grad = ops.gelu_abs_topk_backward(torch.ones_like(x), few, x, "cuda")
    assert torch.equal(grad[:, 1:], torch.zeros_like(grad[:, 1:]))


@every_dtype
@fused_rows
def test_norm_abs_topk_and_its_gradients(dtype, rows, cols, share, how, held, order, size, seed):
    x, grad = rows_of(how, rows, cols, dtype, seed, size)
    weight = 1 + rows_of("contiguous", 1, cols, dtype, seed + 2)[0][0]
    k, eps = max(1, min(cols, round(share * cols))), 2.0**-16
    with emulating(order, held):
        whole, _ = ops.norm_abs_topk(x, weight, cols, eps, "cuda")
        y, scales = ops.norm_abs_topk(x, weight, k, eps, "cuda")
        made = ops.norm_abs_topk_backward(grad, y, x, weight, scales, "cuda")
    assert same_bits(y, expected(whole, k))
    assert torch.allclose(scales, (x.double().square().mean(1) + eps).rsqrt().float(), rtol=1e-6)
    if rows == 0:
        assert torch.equal(made[1], torch.zeros_like(weight))
        return
    exact = reference.norm_abs_topk(x, weight, cols, eps)[0].double()
    assert ((whole.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()
    wide = [tensor.double() for tensor in (grad, y, x, weight, scales)]
    wanted = reference.norm_abs_topk_backward(*wide)
    for got, want in zip(made, wanted, strict=True):
        assert got.is_contiguous()
        assert got.dtype == dtype
        largest = want.abs().max() + float(scales.max()) * grad.abs().max() * weight.abs().max()
        factor = 16 if dtype == torch.float32 else 2
        allowed = factor * torch.finfo(dtype).eps * largest * rows**0.5
        assert ((got.double() - want).abs() <= allowed).all()


@every_dtype
def test_fused_abs_topk_of_more_rows_than_blocks(dtype, monkeypatch):
    """The same bits in every order, with any strides, held or not; several parts of rows."""
    rows, cols = 1100, 72
    x, grad = rows_of("contiguous", rows, cols, dtype, 0)
    weight = 1 + x[0]
    found = []
    for order in ORDERS:
        for held in (True, False):
            for step in (1, 2):
                strided_rows = [t.repeat_interleave(step, 1)[:, ::step] for t in (x, grad)]
                with emulating(order, held):
                    y, scales = ops.norm_abs_topk(strided_rows[0], weight, 20, 0.1, "cuda")
                    grads = ops.norm_abs_topk_backward(
                        strided_rows[1], y, strided_rows[0], weight, scales, "cuda"
                    )
                    gelu = ops.gelu_abs_topk(strided_rows[0], 20, "cuda")
                    slopes = ops.gelu_abs_topk_backward(
                        strided_rows[1], gelu, strided_rows[0], "cuda"
                    )
                found.append((y, scales, *grads, gelu, slopes))
    for results in found[1:]:
        assert all(map(torch.equal, results, found[0]))
    wanted = reference.norm_abs_topk_backward(grad, found[0][0], x, weight, found[0][1])
    assert torch.allclose(found[0][3].double(), wanted[1].double(), rtol=1e-2, atol=1e-2)


def test_sums_of_the_weights_of_rows_beyond_shared_memory(monkeypatch):
    """They lie in working memory then."""
    monkeypatch.setenv("SK_EMULATION_SHARED", "1024")
    x, grad = rows_of("contiguous", 9, 333, torch.bfloat16, 0)
    weight = 1 + x[0]
    y, scales = ops.norm_abs_topk(x, weight, 100, 0.1, "cuda")
    small = ops.norm_abs_topk_backward(grad, y, x, weight, scales, "cuda")
    monkeypatch.delenv("SK_EMULATION_SHARED")
    large = ops.norm_abs_topk_backward(grad, y, x, weight, scales, "cuda")
    assert all(map(torch.equal, small, large))


def test_fused_ops_run_and_compile():
    x = torch.randn(5, 40, requires_grad=True)
    weight = torch.randn(40, requires_grad=True)

    def both(x, weight):
        y = transformer_ops.gelu_abs_topk(x, 20, "cuda")
        return transformer_ops.rms_norm_abs_topk(y, weight, 7, 0.1, "cuda").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for call in (both, compiled):
        made = torch.autograd.grad(call(x, weight), (x, weight))
        wanted = torch.autograd.grad(
            transformer_ops.rms_norm_abs_topk(
                transformer_ops.gelu_abs_topk(x, 20, "reference"), weight, 7, 0.1, "reference"
            )
            .square()
            .sum(),
            (x, weight),
        )
        for one, other in zip(made, wanted, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    for name, arguments in (("gelu_abs_topk", (x, 7)), ("norm_abs_topk", (x, weight, 7, 0.1))):
        op = getattr(torch.ops.sparse_kernels, name).default
        torch.library.opcheck(
            op, (*(a.detach() if torch.is_tensor(a) else a for a in arguments), "cuda")
        )


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


@pytest.mark.skipif("SK_SANITIZED_EMULATION" in os.environ, reason="once is enough")
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


# The harness itself: it must find the mistakes that it is there to find.
BROKEN = """
#include "launch.cuh"
#include "mma.cuh"

namespace sk { namespace cuda {

// Each thread writes its place and reads its neighbour's, without a barrier where `barrier` is not.
__global__ void neighbour(float* out, bool barrier, int reach) {
    SharedMemory shared;
    float* const places = shared.take<float>(static_cast<int>(blockDim.x));
    places[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = places[(threadIdx.x + 1) % blockDim.x + reach];
}

// Every thread reads what one wrote, then that one writes again.
__global__ void overtake(float* out, bool barrier) {
    SharedMemory shared;
    float* const place = shared.take<float>(1);
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == blockDim.x / 2) *place = static_cast<float>(i);
        __syncthreads();
        out[i * blockDim.x + threadIdx.x] = *place;
        if (barrier) __syncthreads();
    }
}

// Half of the threads come to a barrier, the others end.
__global__ void diverge() {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

__global__ void nothing() {}
__global__ void nothing_unasked() {}
__global__ void vector(const char* from) { load_vector(from); }

// 32 rows of 8 elements, as fragments of four matrices and of the same transposed; the first are
// stored, transposed.
__global__ void matrices(const uint4* from, uint32_t* out, uint4* stored) {
    SharedMemory shared;
    uint4* const rows = shared.take<uint4>(32);
    rows[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(shared_address(rows + threadIdx.x), plain);
    ldmatrix_x4_trans(shared_address(rows + threadIdx.x), transposed);
    for (int i = 0; i < 4; ++i) {
        out[threadIdx.x * 8 + i] = plain[i];
        out[threadIdx.x * 8 + 4 + i] = transposed[i];
    }
    stmatrix_x4_trans(shared_address(rows + threadIdx.x), plain);
    stored[threadIdx.x] = rows[threadIdx.x];
}

template <class T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
    const uint32_t left[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    mma_m16n8k16(sums, left, b[lane * 2], b[lane * 2 + 1], T{});
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

template <class Pair>
void compare(const Pair* pairs, Pair bound, int count, uint32_t* masks, Pair* sums) {
    for (int i = 0; i < count; ++i) {
        masks[i] = __hgtu2_mask(pairs[i], bound);
        sums[i] = __hadd2(__hgtu2(pairs[i], bound), pairs[i]);
    }
}

}}

#define SK_EXPORT extern "C" __attribute__((visibility("default")))
using namespace sk::cuda;

SK_EXPORT void run_neighbour(float* out, bool barrier, int reach) {
    launch("neighbour", neighbour, 1, kThreads, 4 * kThreads, Queue{}, out, barrier, reach);
}
SK_EXPORT void run_overtake(float* out, bool barrier) {
    launch("overtake", overtake, 1, kThreads, 16, Queue{}, out, barrier);
}
SK_EXPORT void run_matrices(const uint4* from, uint32_t* out, uint4* stored) {
    launch("matrices", matrices, 1, 32, 512, Queue{}, from, out, stored);
}
SK_EXPORT void run_product(bool half, const uint32_t* a, const uint32_t* b, float* d) {
    launch("product", half ? product<Half> : product<Bf16>, 1, 32, 0, Queue{}, a, b, d);
}
SK_EXPORT void run_compare(bool half, const void* pairs, const void* bound, int count,
                           uint32_t* masks, void* sums) {
    const auto run = [=](auto* first) {
        using Pair = std::remove_pointer_t<decltype(first)>;
        compare(static_cast<const Pair*>(pairs), *static_cast<const Pair*>(bound), count, masks,
                static_cast<Pair*>(sums));
    };
    half ? run(static_cast<__half2*>(nullptr)) : run(static_cast<__nv_bfloat162*>(nullptr));
}
template <class Run>
const char* message_of(Run run) {
    static std::string message;
    message = "it ran";
    try {
        run();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}
SK_EXPORT const char* run_diverge() {
    return message_of([] { launch("diverge", diverge, 1, kThreads, 0, Queue{}); });
}
SK_EXPORT const char* run_sizes(unsigned x, unsigned y, unsigned z, unsigned threads,
                                int shared_bytes) {
    return message_of(
        [=] { launch("nothing", nothing, dim3(x, y, z), threads, shared_bytes, Queue{}); });
}
SK_EXPORT const char* run_unasked(int shared_bytes) {
    return message_of([=] {
        check(launch_kernel(nothing_unasked, 1, 1, kThreads, shared_bytes, nullptr), "unasked");
    });
}
SK_EXPORT const char* run_vector(const char* from) {
    return message_of([=] { launch("vector", vector, 1, 32, 0, Queue{}, from); });
}
"""
SANITIZED = "SK_SANITIZED_EMULATION" in os.environ


def build_broken(folder, sanitize):
    source = folder / "broken.cu"
    source.write_text(BROKEN)
    flags = cuda_emulation.SANITIZE if sanitize else []
    return cuda_emulation.build("broken", [source], flags)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = build_broken(tmp_path_factory.mktemp("broken"), SANITIZED)
    library = ctypes.CDLL(str(path))
    library.run_neighbour.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_int]
    library.run_overtake.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    for name in ("run_diverge", "run_sizes", "run_unasked", "run_vector"):
        getattr(library, name).restype = ctypes.c_char_p
    library.run_vector.argtypes = [ctypes.c_void_p]
    library.run_matrices.argtypes = [ctypes.c_void_p] * 3
    library.run_product.argtypes = [ctypes.c_bool, *[ctypes.c_void_p] * 3]
    pointers = [ctypes.c_void_p] * 2
    library.run_compare.argtypes = [ctypes.c_bool, *pointers, ctypes.c_int, *pointers]
    return library


def test_the_emulation_finds_a_missing_barrier(broken, monkeypatch):
    count = cuda_emulation.THREADS
    out, twice = torch.empty(count), torch.empty(2, count)
    right = torch.arange(1, count + 1).remainder(count).float()
    both = torch.tensor([[0.0], [1.0]]).expand(2, count)
    for order in ORDERS:
        use_order(monkeypatch, order)
        broken.run_neighbour(out.data_ptr(), True, 0)
        assert torch.equal(out, right)
        broken.run_neighbour(out.data_ptr(), False, 0)
        assert not torch.equal(out, right)
        broken.run_overtake(twice.data_ptr(), True)
        assert torch.equal(twice, both)
        broken.run_overtake(twice.data_ptr(), False)
        assert not torch.equal(twice, both)


def test_the_emulation_finds_threads_that_miss_a_barrier(broken):
    assert b"wait at different barriers: 32 at the block's" in broken.run_diverge()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((1, 1, 1, 1024, 227 << 10), b"it ran"),
        ((0, 1, 1, 32, 0), b"nothing with 0 bytes .* failed: invalid configuration argument"),
        ((2**31, 1, 1, 32, 0), b"invalid configuration argument"),
        ((1, 65536, 1, 32, 0), b"invalid configuration argument"),
        ((1, 1, 65536, 32, 0), b"invalid configuration argument"),
        ((1, 1, 1, 1056, 0), b"invalid configuration argument"),
        ((1, 1, 1, 32, (227 << 10) + 1), b"nothing needs 232449 bytes of shared memory"),
    ],
)
def test_the_emulation_refuses_what_a_device_refuses(broken, sizes, reason):
    assert re.search(reason, broken.run_sizes(*sizes))


def test_the_emulation_refuses_shared_memory_that_was_not_asked_for(broken):
    assert broken.run_unasked(48 << 10) == b"it ran"
    assert b"unasked failed: invalid argument" in broken.run_unasked((48 << 10) + 1)


def test_the_emulation_refuses_misaligned_vectors(broken):
    vectors = torch.zeros(64, dtype=torch.uint8)
    assert broken.run_vector(vectors.data_ptr()) == b"it ran"
    assert b"no multiple of 16" in broken.run_vector(vectors.data_ptr() + 8)


def fragments(matrices):
    """Of (..., 8, 8) matrices what each lane holds: (32, ..., 2), as PTX ISA documents it."""
    return matrices.unflatten(-1, (4, 2)).movedim((-3, -2), (0, 1)).flatten(0, 1).contiguous()


def test_the_emulation_moves_matrices_as_documented(broken):
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out, stored = torch.empty(32, 8, 2, dtype=torch.int16), torch.empty_like(rows)
    broken.run_matrices(rows.data_ptr(), out.data_ptr(), stored.data_ptr())
    assert torch.equal(stored, rows.mT)
    assert torch.equal(out[:, :4], fragments(rows))
    assert torch.equal(out[:, 4:], fragments(rows.mT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulation_multiplies_matrices_as_documented(broken, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, d = (
        torch.randint(-8, 9, shape, generator=generator).to(dtype)
        for shape in ((16, 16), (16, 8), (16, 8))
    )
    # The quarters of a in the order of its columns, those of b transposed.
    left = fragments(torch.stack([a[i : i + 8, j : j + 8] for j in (0, 8) for i in (0, 8)]))
    right = fragments(b.view(2, 8, 8).mT)
    sums = fragments(d.float().view(2, 8, 8))
    half = dtype == torch.float16
    broken.run_product(half, left.data_ptr(), right.data_ptr(), sums.data_ptr())
    assert torch.equal(sums, fragments((a.double() @ b.double() + d).float().view(2, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_emulation_compares_pairs_as_documented(broken, dtype):
    """All patterns with bounds of which one is NaN; a comparison with NaN is true."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for bounds in ((1.0, -3.0), (torch.inf, torch.nan), (0.0, 2.0**-14)):
        bound = torch.tensor(bounds, dtype=dtype)
        pairs = patterns.view(-1, 1).expand(-1, 2).contiguous()
        masks, sums = torch.empty_like(pairs), torch.empty_like(pairs)
        addresses = pairs.data_ptr(), bound.data_ptr()
        outputs = masks.data_ptr(), sums.data_ptr()
        broken.run_compare(dtype == torch.float16, *addresses, len(pairs), *outputs)
        above = ~(pairs <= bound)
        assert torch.equal(masks.view(torch.int16), -above.to(torch.int16))
        assert torch.equal(sums.nan_to_num(7), (pairs.float() + above).to(dtype).nan_to_num(7))


def run_sanitized(arguments, **more):
    preload = [
        subprocess.run(
            [cuda_emulation.compiler(), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(path).is_absolute() for path in preload):
        pytest.skip("the compiler has no AddressSanitizer library")
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SK_SANITIZED_EMULATION": "1",
        **more,
    }
    env.pop("CI", None)
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized process")
def test_kernels_stay_in_bounds():
    """The tests above that are quick, again under AddressSanitizer and UBSan."""
    chosen = "match_dense or stable_sort or masked_gradient"
    options = ["-q", "-x", "-n", "0", "-m", "slow", "-p", "no:cacheprovider", "-k", chosen]
    done = run_sanitized(["-m", "pytest", *options, __file__])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(SANITIZED, reason="this is the sanitized process")
def test_the_sanitizer_finds_a_step_outside_shared_memory(tmp_path):
    program = f"""
import ctypes
run = ctypes.CDLL({str(build_broken(tmp_path, True))!r}).run_neighbour
out = (ctypes.c_float * {cuda_emulation.THREADS})()
run(out, ctypes.c_bool(True), 0)
print("in bounds")
run(out, ctypes.c_bool(True), 1)
print("not found")
"""
    done = run_sanitized(["-u", "-c", program])  # what is buffered is lost when it aborts
    assert done.stdout.strip() == "in bounds", done.stderr
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
