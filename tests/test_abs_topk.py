"""abs_topk is exact: the same bits as a stable sort, on every instruction set."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_kernels import cpu, ops
from sparse_kernels.topk import abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
KINDS = [
    "normal", "heavy", "ties", "zeros", "equal", "mostly_zero", "ascending", "descending",
    "special", "denormal", "bits", "neighbours",
]  # fmt: skip
TARGETS = ["reference", *(f"cpu-{isa}" for isa in cpu.isas())]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

every_target = pytest.mark.parametrize("target", TARGETS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def draw(kind, rows, cols, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    signs = torch.where(normal < 0, -1.0, 1.0).double()
    if kind == "heavy":  # magnitudes over dozens of orders
        return (signs * torch.exp(12 * normal)).to(dtype)
    if kind == "ties":
        return (2 * normal).round().to(dtype)
    if kind == "zeros":
        return (0.0 * signs).to(dtype)
    if kind == "equal":
        return (1.5 * signs).to(dtype)
    if kind == "mostly_zero":
        return torch.where(normal.abs() > 1.5, normal, 0.0 * signs).to(dtype)
    if kind in ("ascending", "descending"):
        return (signs * normal.abs().sort(dim=1, descending=kind == "descending").values).to(dtype)
    if kind == "special":
        values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0])
        return values[torch.randint(8, (rows, cols), generator=generator)].to(dtype)
    if kind == "denormal":
        return (normal * torch.finfo(dtype).smallest_normal / 4).to(dtype)
    if kind == "neighbours":  # they differ in their last bits only
        steps = torch.randint(2**15, (rows, cols), generator=generator).double()
        step = torch.finfo(dtype).eps if dtype != torch.bfloat16 else 2.0**-15
        return (signs * (1 + steps * step)).to(dtype)
    if kind == "bits":  # every pattern there is, every NaN among them
        integer = INTEGERS[dtype.itemsize]
        return torch.randint(
            -(2**62), 2**62, (rows, cols * 2), generator=generator, dtype=torch.int64
        ).view(integer)[:, :cols].contiguous().view(dtype)  # fmt: skip
    return normal.to(dtype)


def run(target, x, k):
    name, _, isa = target.partition("-")
    if not isa:
        return abs_topk(x, k, name)
    with cpu.use_isa(isa):
        return abs_topk(x, k, name)


def expected(x, k):
    """The largest magnitudes of each row by a stable sort."""
    kept = torch.zeros(x.shape, dtype=torch.bool).scatter(1, stable_order(x)[:, :k], True)
    # As integers: an indexed assignment changes the bits of a NaN in bfloat16.
    bits = x.contiguous().view(INTEGERS[x.dtype.itemsize])
    return torch.where(kept, bits, 0).view(x.dtype)


def stable_order(x):
    return x.abs().double().sort(dim=1, descending=True, stable=True).indices


def same_bits(a, b):
    """Equal, and zeros have equal signs and NaNs equal patterns."""
    integer = INTEGERS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.contiguous().view(integer))


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_the_stable_sort_is_the_definition(dtype, kind):
    """By magnitude, NaN first, then by index."""
    x = draw(kind, 2, 201, dtype, 0)
    for order, magnitudes in zip(stable_order(x), x.abs().double().tolist(), strict=True):
        keys = [(0, 0.0) if math.isnan(m) else (1, -m) for m in magnitudes]
        assert order.tolist() == sorted(range(len(keys)), key=keys.__getitem__)


@every_target
@every_dtype
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 5),
    cols=st.integers(1, 200),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@example(kind="normal", rows=2, cols=8192, share=0.25, seed=0)
@example(kind="heavy", rows=2, cols=4099, share=0.25, seed=1)
@example(kind="mostly_zero", rows=2, cols=4099, share=0.25, seed=2)
@example(kind="special", rows=2, cols=2048, share=0.01, seed=3)
@example(kind="bits", rows=2, cols=3001, share=0.99, seed=4)
def test_abs_topk_keeps_what_a_stable_sort_keeps(target, dtype, kind, rows, cols, share, seed):
    x = draw(kind, rows, cols, dtype, seed)
    k = max(1, min(cols, round(share * cols)))
    assert same_bits(run(target, x, k), expected(x, k))


@every_target
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_abs_topk_on_long_rows(target, dtype, kind):
    """Several steps of counts lie in a row."""
    x = draw(kind, 2, 5000, dtype, 7)
    for k in (1, 2, 313, 1250, 4999, 5000):
        assert same_bits(run(target, x, k), expected(x, k)), k


@every_target
@every_dtype
@pytest.mark.parametrize("shared", [1, 2, 15, 16, 17, 40])
def test_abs_topk_of_rows_that_are_not_alike(target, dtype, shared):
    """A search begins where the last row ended; few that share their leading bits are sorted."""
    row = draw("normal", 1, 640, dtype, 3)
    row[:, :shared] = (1 + torch.arange(shared).flip(0) * 2**-20).to(dtype)
    scales = torch.tensor([1e-30, 1.0, 1e30, 1.0, 1e-3, 0.0, 1e-30], dtype=dtype)
    x = row * scales[:, None]
    larger = int((row.abs() > 1.0001).sum())
    for k in {larger + 1, larger + (shared + 1) // 2, larger + shared, 1, 639}:
        assert same_bits(run(target, x, k), expected(x, k)), k


@every_target
@every_dtype
@given(
    rows=st.integers(1, 4),
    cols=st.integers(1, 70),
    how=st.sampled_from(["transposed", "stepped", "broadcast", "offset", "column"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_abs_topk_takes_any_strides(target, dtype, rows, cols, how, seed):
    x = {
        "transposed": lambda: draw("ties", cols, rows, dtype, seed).t(),
        "stepped": lambda: draw("ties", 2 * rows, 3 * cols, dtype, seed)[::2, ::3],
        "broadcast": lambda: draw("ties", 1, cols, dtype, seed).expand(rows, cols),
        "offset": lambda: draw("ties", rows, cols + 1, dtype, seed)[:, 1:],
        "column": lambda: draw("ties", rows, 1, dtype, seed).expand(rows, cols),
    }[how]()
    k = 1 + seed % cols
    y = run(target, x, k)
    assert y.is_contiguous()
    assert same_bits(y, expected(x, k))


@every_target
def test_abs_topk_flattens_leading_dimensions(target):
    x = torch.randn(2, 3, 4, 17)
    assert torch.equal(run(target, x, 5).view(-1, 17), expected(x.view(-1, 17), 5))
    assert torch.equal(run(target, x[0, 0, 0], 5), expected(x[0, 0, :1], 5)[0])
    assert run(target, x[:, :0], 5).shape == (2, 0, 4, 17)


@every_target
@every_dtype
def test_abs_topk_agrees_with_torch_topk(target, dtype):
    """Without ties there is one answer: the one of torch.topk and a scatter."""
    x = torch.randperm(250).to(dtype).sub(0.0).view(1, -1) * torch.where(
        torch.rand(250) < 0.5, -1, 1
    )
    index = x.abs().topk(60).indices
    assert torch.equal(
        run(target, x, 60), torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))
    )


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_abs_topk_is_the_same_on_any_number_of_threads(dtype, kind):
    x = draw(kind, 7, 3000, dtype, 5)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(abs_topk(x, 700))
    assert all(same_bits(result, results[0]) for result in results)


@every_target
@every_dtype
def test_abs_topk_gradient_is_the_masked_gradient(target, dtype):
    x = draw("normal", 4, 300, dtype, 1).requires_grad_()
    y = run(target, x, 75)
    grad = draw("normal", 300, 4, dtype, 2).t()
    y.backward(grad)
    assert torch.equal(x.grad, torch.where(y.detach() != 0, grad, 0))
    assert (x.grad != 0).sum() == 4 * 75


@every_target
def test_abs_topk_gradient_of_kept_zeros_is_zero_and_of_kept_nans_passes(target):
    x = torch.tensor([[0.0, 3.0, -0.0, 0.0], [torch.nan, 1.0, 0.0, 2.0]], requires_grad=True)
    y = run(target, x, 2)
    y.backward(torch.full_like(x, 7.0))
    assert torch.equal(x.grad, torch.tensor([[0.0, 7.0, 0.0, 0.0], [7.0, 0.0, 0.0, 7.0]]))


@every_target
def test_abs_topk_gradcheck(target):
    x = (torch.randperm(3 * 4 * 9).double().view(3, 4, 9) + 1).div(10).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: run(target, z, 4), x)
    assert torch.autograd.gradgradcheck(lambda z: run(target, z, 4), x)


@every_target
@every_dtype
def test_abs_topk_opcheck(target, dtype):
    name, _, isa = target.partition("-")
    x = torch.randn(5, 33).to(dtype)
    with cpu.use_isa(isa or cpu.isa()):
        y = ops.abs_topk(x, 7, name)
        torch.library.opcheck(torch.ops.sparse_kernels.abs_topk.default, (x, 7, name))
        torch.library.opcheck(torch.ops.sparse_kernels.abs_topk_backward.default, (x, y, name))


@every_dtype
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_abs_topk_compiles_whole(dtype, dynamic):
    def step(x):
        return (abs_topk(2 * x, 9) * 3).sum(-1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 6):
        x = draw("normal", rows * 2, 40, dtype, rows).view(2, rows, 40).requires_grad_()
        grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (step, compiled)]
        assert torch.equal(step(x), compiled(x))
        assert torch.equal(*grads)


def test_abs_topk_leaves_the_dtype_alone_under_autocast():
    x = torch.randn(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(abs_topk(x, 4), expected(x, 4))


@pytest.mark.parametrize("k", [0, -1, 9])
def test_abs_topk_refuses_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k must be at (least 1|most 8).*got {k}"):
        abs_topk(torch.randn(2, 8), k)


@pytest.mark.parametrize("k", [True, 2.0, "2", None, torch.tensor(2)])
def test_abs_topk_refuses_k_that_is_no_int(k):
    with pytest.raises(TypeError, match="k must be an int"):
        abs_topk(torch.randn(2, 8), k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.complex64, torch.bool])
def test_abs_topk_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match=f"x must be one of float32, .*got {dtype}"):
        abs_topk(torch.zeros(2, 8, dtype=dtype), 2)


def test_abs_topk_refuses_what_is_no_row():
    with pytest.raises(ValueError, match=r"x must have at least one dimension, got shape \(\)"):
        abs_topk(torch.tensor(1.0), 1)
    with pytest.raises(ValueError, match="k must be at most 0"):
        abs_topk(torch.randn(3, 0), 1)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        abs_topk([1.0, 2.0], 1)


def test_abs_topk_refuses_backends_that_cannot_run_it():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="backend must be one of"):
        abs_topk(x, 2, "fast")
    with pytest.raises(TypeError, match="backend must be a str"):
        abs_topk(x, 2, 3)
    with pytest.raises(RuntimeError, match="it runs on cuda tensors, and the device is cpu"):
        abs_topk(x, 2, "cuda")
    with pytest.raises(RuntimeError, match="meta"):
        abs_topk(x.to("meta"), 2)
