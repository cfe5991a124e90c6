"""The Triton backend against dense PyTorch; without a GPU its kernels are interpreted.

The launchers are reached through the registered ops, which here take float16 on the CPU, too; the
public functions are held against dense PyTorch further down.
"""

import itertools
import mmap
from types import SimpleNamespace

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
from test_abs_topk import KINDS, draw, expected, same_bits

import sparse_kernels as sk
from sparse_kernels import checks, ops, reference, testing
from sparse_kernels import triton as backend

pytest.importorskip("triton", reason="triton is not installed")

from triton.language.core import is_builtin
from triton.runtime.errors import OutOfResources

from sparse_kernels.triton import configs, sddmm, topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(16, 16), (16, 32), (32, 16), (32, 32), (64, 64)]


@pytest.fixture(autouse=True)
def _half_precision_without_a_gpu(monkeypatch):
    monkeypatch.setitem(checks.DTYPES, "cpu", checks.DTYPES["cuda"])


@pytest.fixture(autouse=DEVICE == "cpu")
def _replaced_once(monkeypatch):
    """The interpreter replaces what a module has at each call of a function; once is enough."""
    from triton.runtime import interpreter  # needs numpy

    replace = interpreter._patch_builtin

    def replace_once(module, *arguments):
        if any(map(is_builtin, vars(module).values())):
            replace(module, *arguments)

    monkeypatch.setattr(interpreter, "_patch_builtin", replace_once)


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_product = pytest.mark.parametrize("product", PRODUCTS)
both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])


def run(product, x, grad_output, values, layout, bias=None):
    """One product by the op, on the device that the kernels run on, back on the CPU."""
    x, grad_output, values = (t.to(DEVICE) for t in (x, grad_output, values))
    layout = layout.to(DEVICE)
    if product == "grad_weight":
        return ops.grad_weight(grad_output, x, layout, "triton").cpu()
    bias = None if bias is None else bias.to(DEVICE)
    if product == "forward":
        return ops.forward(x, values, layout, bias, "triton").cpu()
    return ops.grad_input(grad_output, values, layout, bias, "triton").cpu()


def dense(product, x, grad_output, values, layout, bias=None):
    result = dense_product(product, x, grad_output, to_dense(values, layout), bias)
    return kept(result, layout) if product == "grad_weight" else result


def make(layout, rows, dtype, seed, exact=False, x_kind="contiguous", grad_kind="contiguous"):
    """Random (x, grad_output, values) of a layout."""
    generator = torch.Generator().manual_seed(seed)
    return (
        strided(rows, layout.in_features, x_kind, dtype, generator, exact),
        strided(rows, layout.out_features, grad_kind, dtype, generator, exact),
        random(layout.values_shape, dtype, generator, exact),
    )


def bias_for(product, layout, dtype, seed, exact=False):
    size = {"forward": layout.out_features, "grad_input": layout.in_features}.get(product)
    if size is None:
        return None
    return random((size,), dtype, torch.Generator().manual_seed(seed + 1), exact)


def check(product, tensors, layout, bias=None, exact=False):
    """`exact`: all inputs are whole numbers, so the result must be the right one bit for bit."""
    actual = run(product, *tensors, layout, bias)
    assert actual.is_contiguous()
    wide = [t.double() for t in tensors]
    wide_bias = None if bias is None else bias.double()
    truth = dense(product, *wide, layout, wide_bias)
    if exact:
        assert actual.dtype == tensors[0].dtype
        assert torch.equal(actual, truth.to(actual.dtype))
        return
    terms = dense(
        product, *[t.abs() for t in wide], layout, None if bias is None else wide_bias.abs()
    )
    assert_accurate(actual, dense(product, *tensors, layout, bias), truth, terms)


@every_dtype
@every_product
@given(
    layouts(blocks=BLOCKS),
    tokens(),
    st.booleans(),
    st.sampled_from(STRIDES),
    st.sampled_from(STRIDES),
    seeds(),
    st.booleans(),
)
def test_products_match_dense(
    dtype, product, layout, rows, with_bias, x_kind, grad_kind, seed, exact
):
    tensors = make(layout, rows, dtype, seed, exact, x_kind, grad_kind)
    bias = bias_for(product, layout, dtype, seed, exact) if with_bias else None
    check(product, tensors, layout, bias, exact)


def tile_cases():
    """Problems that take every tile of the table: families with equal tiles run one program."""
    cases = {}
    sides = itertools.product((torch.float32, torch.bfloat16), (16, 32, 64, 128), (16, 128))
    for family, product, (dtype, block_out, block_in) in itertools.product(
        configs.FAMILIES, PRODUCTS, list(sides)
    ):
        kernel = "sddmm" if product == "grad_weight" else "spmm"
        side = block_in if product == "grad_input" else block_out
        tile = configs.frozen(kernel, family, configs.numbers(dtype), side)
        case = (product, dtype, block_out, block_in, tile.block_m, tile.block_k)
        cases.setdefault(case, (product, family, dtype, block_out, block_in))
    return cases.values()


@pytest.mark.parametrize(("product", "family", "dtype", "block_out", "block_in"), tile_cases())
def test_every_tile_of_the_table_is_right(monkeypatch, product, family, dtype, block_out, block_in):
    """More tokens, inputs and steps than one tile takes, and no multiple of it."""
    monkeypatch.setattr(configs, "family", lambda device: family)
    layout = sk.FanInLayout.random(
        2 * block_out,
        3 * 128,
        2 * 128 if block_in == 128 else 9 * 16,
        (block_out, block_in),
        generator=torch.Generator().manual_seed(0),
    )
    tensors = make(layout, 131, dtype, 0, exact=True)
    check(product, tensors, layout, bias_for(product, layout, dtype, 0, exact=True), exact=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
@every_dtype
@every_product
@given(layouts(blocks=BLOCKS), tokens(200), seeds())
def test_products_are_the_same_bits_again(dtype, product, layout, rows, seed):
    tensors = make(layout, rows, dtype, seed)
    bias = bias_for(product, layout, dtype, seed)
    first = run(product, *tensors, layout, bias)
    integer = {2: torch.int16, 4: torch.int32}[first.itemsize]
    second = run(product, *tensors, layout, bias)
    assert torch.equal(first.view(integer), second.view(integer))


@every_dtype
def test_many_tokens_are_cut_in_pieces(dtype):
    layout = sk.FanInLayout.random(16, 64, 32, (16, 16))
    for exact in (False, True):
        check("grad_weight", make(layout, 4999, dtype, 0, exact), layout, exact=exact)


def test_pieces_are_added_in_their_order():
    layout = sk.FanInLayout.random(16, 64, 32, (16, 16))
    x, grad_output, values = make(layout, 4999, torch.float32, 0)
    size = sddmm.tokens_per_piece(4999, layout)
    cuts = [slice(start, start + size) for start in range(0, 4999, size)]
    assert len(cuts) == 4
    sums = torch.zeros(layout.values_shape)
    for cut in cuts:  # each is too short to be cut again
        sums += run("grad_weight", x[cut], grad_output[cut], values, layout)
    assert torch.equal(run("grad_weight", x, grad_output, values, layout), sums)


def test_pieces_fill_a_gpu_and_no_more():
    one = sk.FanInLayout.random(16, 64, 32, (16, 16))
    assert sddmm.tokens_per_piece(10, one) == 128
    assert sddmm.tokens_per_piece(2047, one) >= 2047
    assert sddmm.tokens_per_piece(2**20, one) == 2**20 // 512
    many = sk.FanInLayout.random(16 * 600, 64, 32, (16, 16))
    assert sddmm.tokens_per_piece(2**20, many) == 2**20


@every_dtype
@every_product
@given(layouts(max_features=80, blocks=BLOCKS), tokens(150), seeds(), st.booleans())
def test_a_bad_element_reaches_only_what_reads_it(dtype, product, layout, rows, seed, infinite):
    x, grad_output, values = make(layout, rows, dtype, seed)
    if rows == 0:
        return
    source = grad_output if product == "grad_input" else x
    row, column = seed % rows, seed % source.shape[1]
    source[row, column] = torch.inf if infinite else torch.nan
    actual = run(product, x, grad_output, values, layout)
    mask = to_dense(torch.ones_like(values), layout)
    touched = torch.zeros_like(actual, dtype=torch.bool)
    if product == "forward":
        touched[row] = mask[:, column] != 0
    elif product == "grad_input":
        touched[row] = mask[column] != 0
    else:
        marked = torch.zeros_like(mask)
        marked[:, column] = mask[:, column]
        touched = kept(marked, layout) != 0
    assert torch.equal(~actual.isfinite(), touched)


@every_product
def test_offsets_pass_32_bits(product):
    """The third row lies 2^31 elements in; memory that is never touched takes no room."""
    if DEVICE != "cpu":
        pytest.skip("the memory would be real on a GPU")
    layout = sk.FanInLayout.random(16, 16, 16, (16, 16))
    small = make(layout, 3, torch.float16, 0, exact=True)
    far = []
    for tensor in small[:2]:
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 16)), dtype=torch.float16)
        wide = memory.as_strided((3, 16), (2**30, 1))
        far.append(wide.copy_(tensor))
    check(product, (*far, small[2]), layout, exact=True)


@every_product
def test_strided_values_and_bias(product):
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16))
    x, grad_output, values = make(layout, 21, torch.float32, 0, exact=True)
    bias = bias_for(product, layout, torch.float32, 0, exact=True)
    for view in (
        values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        values[:1].expand_as(values),
        torch._neg_view(values.clone()),
    ):
        narrow = None if bias is None else bias[:1].expand_as(bias)
        check(product, (x, grad_output, view), layout, narrow, exact=True)


@every_product
@pytest.mark.parametrize("numbers", ["bfloat16", "tf32"])
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take hours")
def test_products_at_the_size_of_a_model(product, numbers):
    dtype = torch.float32 if numbers == "tf32" else torch.bfloat16
    sizes = (2000, 4096, 4096, 416, (32, 32))
    case = testing.make_problem(0, *sizes, dtype=dtype, bias=False, device=DEVICE)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if numbers == "tf32" else before
        actual = sparse_product(
            product, case.x, case.grad_output, case.values, case.layout, None, "triton"
        )
        stock = case.torch_dense(product)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    truth = case.reference64(product)
    assert testing.max_error(actual, truth) <= testing.allowed_error(stock, truth)


# ---- the schedule


@given(layouts(blocks=BLOCKS))
def test_longest_lists_start_first(layout):
    (order,) = backend.build_schedule(layout)
    lengths = torch.bincount(layout.indices.flatten().long(), minlength=layout.block_cols)
    assert sorted(order.tolist()) == list(range(layout.block_cols))
    assert (lengths[order.long()].diff() <= 0).all()
    assert order.dtype == torch.int32


def test_products_derive_only_the_lists_that_they_walk():
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16), device=DEVICE)
    values = torch.randn(layout.values_shape, device=DEVICE, requires_grad=True)
    y = sk.sparse_linear(torch.randn(3, 64, device=DEVICE), values, layout, backend="triton")
    y.sum().backward()
    assert not layout.cache
    x = torch.randn(3, 64, device=DEVICE, requires_grad=True)
    sk.sparse_linear(x, values, layout, backend="triton").sum().backward()
    assert set(layout.cache) == {"transposed", "triton.columns"}


# ---- the public functions


@both_ways
@given(layouts(max_features=100, blocks=BLOCKS), tokens(70), st.booleans(), seeds())
def test_gradients_match_dense(transpose, layout, rows, with_bias, seed):
    x, grad_output, values = make(layout, rows, torch.float32, seed, exact=True)
    if transpose:
        x, grad_output = grad_output, x
    bias = random((grad_output.shape[1],), torch.float32, torch.Generator().manual_seed(seed), True)

    def leaves(convert):
        made = [x, values, bias] if with_bias else [x, values]
        return [convert(t).detach().clone().requires_grad_() for t in made]

    mine = leaves(lambda t: t.to(DEVICE))
    y = sk.sparse_linear(
        mine[0], mine[1], layout.to(DEVICE), *mine[2:], backend="triton", transpose=transpose
    )
    grads = torch.autograd.grad(y, mine, grad_output.to(DEVICE))
    theirs = leaves(torch.Tensor.double)
    weight = to_dense(theirs[1], layout)
    truth = torch.nn.functional.linear(theirs[0], weight.t() if transpose else weight, *theirs[2:])
    want = torch.autograd.grad(truth, theirs, grad_output.double())
    assert torch.equal(y.cpu().double(), truth)
    for mine_grad, their_grad in zip(grads, want, strict=True):
        assert torch.equal(mine_grad.cpu().double(), their_grad)


def test_second_derivatives_match_the_reference():
    layout = sk.FanInLayout.random(32, 48, 32, (16, 16), device=DEVICE)
    results = []
    for name in ("triton", "reference"):
        generator = torch.Generator().manual_seed(0)
        x = random((9, 48), torch.float32, generator, True).to(DEVICE).requires_grad_()
        values = random(layout.values_shape, torch.float32, generator, True)
        values = values.to(DEVICE).requires_grad_()
        y = sk.sparse_linear(x, values, layout, backend=name)
        first = torch.autograd.grad(y.square().sum() / 1024, (x, values), create_graph=True)
        results.append(torch.autograd.grad(sum(g.sum() for g in first), (x, values)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 9), (torch.bfloat16, 9), (torch.float16, 0)], ids=str
)
def test_opcheck(dtype, rows):
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16), device=DEVICE)
    x, grad_output, values = (t.to(DEVICE) for t in make(layout.to("cpu"), rows, dtype, 0))
    bias = torch.ones(32, dtype=dtype, device=DEVICE)
    pattern = layout.indices, layout.in_features, layout.block, "triton"
    z = torch.randn(rows, 33, device=DEVICE).to(dtype)
    calls = [
        ("forward", (x, values, bias, *pattern)),
        ("forward", (x, values, None, *pattern)),
        ("grad_input", (grad_output, values, None, *pattern)),
        ("grad_weight", (grad_output, x, *pattern)),
        ("abs_topk", (z, 7, "triton")),
        ("abs_topk_backward", (z, z, "triton")),
    ]
    for name, arguments in calls:
        torch.library.opcheck(getattr(torch.ops.sparse_kernels, name).default, arguments)


@both_ways
def test_compile_fullgraph_matches_eager(transpose):
    """The very first use of the layout is under the compiler."""
    layout = sk.FanInLayout.random(32, 64, 32, (16, 16), device=DEVICE)
    x = torch.randn(9, 32 if transpose else 64, device=DEVICE, requires_grad=True)
    values = torch.randn(layout.values_shape, device=DEVICE, requires_grad=True)

    def step(x, values):
        y = sk.sparse_linear(x, values, layout, backend="triton", transpose=transpose)
        return sk.abs_topk(y, 5, "triton").square()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        y = function(x, values)
        results.append((y, *torch.autograd.grad(y.sum(), (x, values))))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


# ---- AbsTopK


def topk_by_op(x, k):
    return ops.abs_topk(x.to(DEVICE), k, "triton").cpu()


@every_dtype
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 4),
    cols=st.integers(1, 200),
    share=st.floats(0, 1),
    seed=seeds(),
)
def test_abs_topk_keeps_what_a_stable_sort_keeps(dtype, kind, rows, cols, share, seed):
    x = draw(kind, rows, cols, dtype, seed)
    k = max(1, min(cols, round(share * cols)))
    assert same_bits(topk_by_op(x, k), expected(x, k))


@every_dtype
def test_abs_topk_of_rows_in_several_chunks(monkeypatch, dtype):
    monkeypatch.setattr(topk, "_CHUNK", 64)
    x = torch.cat([draw(kind, 1, 130, dtype, 7) for kind in KINDS])
    some = x[[KINDS.index("ties"), KINDS.index("special")]]
    for rows, k in ((some, 1), (x, 75), (some, 129)):
        assert same_bits(topk_by_op(rows, k), expected(rows, k)), k


@every_dtype
def test_abs_topk_of_long_rows(dtype):
    for cols in (16384, 40001):
        x = draw("ties", 1, cols, dtype, 3)
        for k in (1, cols // 4):
            assert same_bits(topk_by_op(x, k), expected(x, k)), (cols, k)


@every_dtype
@pytest.mark.parametrize("kind", ["transposed", "row_gap", "col_step", "one_row", "one_column"])
def test_abs_topk_and_its_gradient_take_any_strides(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    x = strided(5, 70, kind, dtype, generator)
    y = topk_by_op(x, 20)
    assert y.is_contiguous()
    assert same_bits(y, expected(x, 20))
    grad = strided(5, 70, kind, dtype, generator)
    kept_y = strided(5, 70, "col_step", dtype, generator).mul_(torch.rand(5, 70) < 0.5)
    kept_y[0, :3] = torch.tensor([torch.nan, -0.0, 0.0]).to(dtype)
    mine = ops.abs_topk_backward(grad.to(DEVICE), kept_y.to(DEVICE), "triton").cpu()
    assert mine.is_contiguous()
    assert same_bits(mine, reference.abs_topk_backward(grad, kept_y))


# ---- tiles


def test_float32_is_exact_unless_tf32_is_allowed():
    from sparse_kernels.triton.launch import precision

    assert precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
        assert configs.numbers(torch.bfloat16) == "half"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.fp32_precision = before
    assert configs.numbers(torch.float32) == "ieee"


@pytest.mark.parametrize(
    ("block_k", "depth", "steps"),
    [(64, 416, 32), (64, 128, 64), (64, 32, 32), (64, 16, 64), (64, 48, 64), (16, 48, 16)],
)
def test_steps_divide_the_lists_where_they_can(block_k, depth, steps):
    tile = configs.Tile(128, block_k, 4, 5)
    assert configs.without_mask(tile, depth) == tile._replace(block_k=steps)


def test_a_search_takes_the_fastest_that_fits(monkeypatch):
    first = configs.frozen("spmm", "sm_80", "half", 32)
    candidates = configs.candidates(first)
    assert candidates[0] == first
    best = candidates[3]
    launched = []

    def launch(tile):
        if tile.block_m == 256:
            raise OutOfResources(1, 0, "shared memory")
        launched.append(tile)

    def bench(function):
        function()
        return 1.0 if launched[-1] == best else 2.0

    monkeypatch.setattr(configs.triton.testing, "do_bench", bench)
    assert configs._fastest(launch, first) == best
    assert launched == [tile for tile in candidates if tile.block_m != 256]


def test_a_search_runs_once_for_each_problem_and_only_on_request(monkeypatch, capsys):
    monkeypatch.setattr(configs, "family", lambda device: "sm_80")
    monkeypatch.setattr(configs, "_tuned", {})
    first, other = configs.candidates(configs.frozen("spmm", "sm_80", "half", 32))[:2]
    monkeypatch.setattr(configs, "_fastest", lambda launch, tile: searched.append(tile) or other)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16, is_cuda=True)
    searched, launched = [], []
    configs.run(launched.append, "spmm", x, 32, ("forward",))
    assert (searched, launched) == ([], [first])
    monkeypatch.setattr(configs, "_TUNE", True)
    for _ in range(2):
        configs.run(launched.append, "spmm", x, 32, ("forward",))
    assert (searched, launched) == ([first], [first, other, other])
    assert str(other) in capsys.readouterr().err
    configs.run(launched.append, "spmm", x, 32, ("grad_input",))
    assert searched == [first, first]
