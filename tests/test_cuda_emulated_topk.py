"""abs_topk and its fusions on CUDA, emulated on the CPU: see test_cuda_emulated.py."""

import contextlib

import cuda_emulation
import pytest
import torch
from emulated import ORDERS, SANITIZED, emulated, use_order
from hypothesis import given
from hypothesis import strategies as st
from test_abs_topk import INTEGERS, KINDS, draw, expected, same_bits
from test_fused_topk import bound

from sparse_kernels import cuda, ops, reference, transformer_ops
from sparse_kernels.topk import abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
INTEGERS.setdefault(torch.float16, torch.int16)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def extension():
    """In a process of `run_sanitized`, the sanitized build."""
    return cuda_emulation.emulated(sanitize=SANITIZED)


@pytest.fixture(autouse=True)
def _use_it(extension):
    with emulated(extension):
        yield


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
