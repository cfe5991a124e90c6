"""AbsTopK in one pass with what comes before it: GELU or RMSNorm, and the gradients of both."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels import cpu, ops
from sparse_kernels.transformer_ops import gelu_abs_topk, rms_norm_abs_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_isa = pytest.mark.parametrize("isa", cpu.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
widths = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 1000]))


def draw(rows, cols, dtype, seed, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (size * torch.randn(rows, cols, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    ]


def slope(x):
    x = x.double().requires_grad_()
    return torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)[0]


def bound(made, exact, peer):
    """Twice PyTorch's own error, and a unit in the last place of float32 or of the dtype."""
    wide = torch.promote_types(made.dtype, torch.float32)
    # In float64 PyTorch's result is what is compared with: both round.
    units = 8 if made.dtype == torch.float64 else 2
    least = units * torch.finfo(wide).eps * (1 + exact.abs())
    if made.dtype != wide:
        least += torch.finfo(made.dtype).eps * exact.abs()
    return 2 * (peer.double() - exact).abs().max() + least


@every_isa
@every_dtype
@given(rows=st.integers(1, 9), cols=widths, seed=st.integers(0, 2**31), data=st.data())
def test_it_is_abs_topk_of_gelu(isa, dtype, rows, cols, seed, data):
    x, grad = draw(rows, cols, dtype, seed, data.draw(st.sampled_from([0.1, 2.0, 8.0])))
    k = data.draw(st.integers(1, cols))
    with cpu.use_isa(isa):
        activated = cpu.gelu_abs_topk(x, cols)  # keeps all
        y = cpu.gelu_abs_topk(x, k)
        assert torch.equal(y, cpu.abs_topk(activated, k))
        grad_x = cpu.gelu_abs_topk_backward(grad, *cpu.pack(y, x, k))
    exact = torch.nn.functional.gelu(x.double())
    peer = torch.nn.functional.gelu(x)
    assert ((activated.double() - exact).abs() <= bound(activated, exact, peer)).all()
    wanted = torch.where(y != 0, grad.double() * slope(x), 0)
    leaf = x.clone().requires_grad_()
    (peer,) = torch.autograd.grad(torch.nn.functional.gelu(leaf), leaf, grad)
    peer = torch.where(y != 0, peer, 0)
    assert torch.equal(grad_x == 0, (y == 0) | (grad_x == 0))
    assert ((grad_x.double() - wanted).abs() <= bound(grad_x, wanted, peer)).all()


@every_isa
@every_dtype
def test_special_values(isa, dtype):
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 30.0, -30.0, 1e-30]]).to(dtype)
    with cpu.use_isa(isa):
        y = cpu.gelu_abs_topk(x, 8)
    # PyTorch's gelu(inf) is NaN in some dtypes; the limit is infinity.
    wanted = torch.tensor([[torch.nan, torch.inf, torch.nan, 0, 0, 30, 0, 5e-31]]).to(dtype)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-30, equal_nan=True)


@every_isa
@every_dtype
def test_strides_threads_and_dimensions_do_not_matter(isa, dtype):
    x, grad = draw(50, 77, dtype, 0)
    with cpu.use_isa(isa):
        wanted = cpu.gelu_abs_topk(x, 20)
        gradient = cpu.gelu_abs_topk_backward(grad, *cpu.pack(wanted, x, 20))
        for threads in (1, 3):
            torch.set_num_threads(threads)
            turned = [tensor.t().contiguous().t() for tensor in (grad, wanted, x)]
            assert torch.equal(cpu.gelu_abs_topk(turned[2], 20), wanted)
            assert torch.equal(
                cpu.gelu_abs_topk_backward(turned[0], *cpu.pack(*turned[1:], 20)), gradient
            )
        leaf = x.view(5, 10, 77).requires_grad_()
        y = gelu_abs_topk(leaf, 20)
        assert torch.equal(y.view(50, 77), wanted)
        (got,) = torch.autograd.grad(y, leaf, grad.view(5, 10, 77))
        assert torch.equal(got.view(50, 77), gradient)
    assert gelu_abs_topk(torch.zeros(0, 5), 2).shape == (0, 5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend):
    x, _ = draw(3, 11, torch.float64, 1)
    # Far enough apart in size that a small step changes no choice.
    assert torch.autograd.gradcheck(
        lambda x: gelu_abs_topk(x, 4, backend),
        x.requires_grad_(),
        eps=1e-7,
        atol=1e-5,
    )


@every_dtype
@pytest.mark.slow
def test_opcheck_and_compile(dtype):
    x, grad = draw(4, 33, dtype, 2)
    for name in ("reference", "cpu"):
        torch.library.opcheck(torch.ops.sparse_kernels.gelu_abs_topk.default, (x, 7, name))
        y = ops.gelu_abs_topk(x, 7, name)
        torch.library.opcheck(
            torch.ops.sparse_kernels.gelu_abs_topk_backward.default,
            (grad, *cpu.pack(y, x, 7), name),
        )
    compiled = torch.compile(lambda x: gelu_abs_topk(x, 7), fullgraph=True)
    assert torch.equal(compiled(x), gelu_abs_topk(x, 7))


@pytest.mark.parametrize(
    ("error", "message", "x", "k"),
    [
        (TypeError, "x must be a torch.Tensor", [1.0], 1),
        (TypeError, "got torch.int64", torch.zeros(3, dtype=torch.int64), 1),
        (ValueError, "at least one dimension", torch.zeros(()), 1),
        (ValueError, "k must be at most 3", torch.zeros(2, 3), 4),
    ],
)
def test_refusals(error, message, x, k):
    with pytest.raises(error, match=message):
        gelu_abs_topk(x, k)


# ---- after RMSNorm


def draw_norm(rows, cols, dtype, seed, size=2.0):
    x, grad = draw(rows, cols, dtype, seed, size)
    weight = draw(1, cols, dtype, seed + 1)[0][0] + 1
    return x, weight, grad


def normed(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@every_isa
@every_dtype
@given(rows=st.integers(1, 9), cols=widths, seed=st.integers(0, 2**31), data=st.data())
def test_it_is_abs_topk_of_the_norm(isa, dtype, rows, cols, seed, data):
    x, weight, grad = draw_norm(rows, cols, dtype, seed, data.draw(st.sampled_from([1e-3, 1, 50])))
    eps = data.draw(st.sampled_from([0.0, 2.0**-23, 0.1]))
    k = data.draw(st.integers(1, cols))
    with cpu.use_isa(isa):
        whole, _ = cpu.norm_abs_topk(x, weight, cols, eps)
        y, scales = cpu.norm_abs_topk(x, weight, k, eps)
        assert torch.equal(y, cpu.abs_topk(whole, k))
        grads = cpu.norm_abs_topk_backward(grad, cpu.pack(y, y, k)[0], x, weight, scales)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    exact = normed(*wide, eps)
    unit = torch.finfo(dtype).eps
    assert ((whole.double() - exact).abs() <= 8 * unit * exact.abs() + 1e-30).all()
    wanted = torch.autograd.grad(exact, wide, torch.where(y != 0, grad.double(), 0))
    for got, want in zip(grads, wanted, strict=True):
        assert got.dtype == dtype
        # A difference of terms of the size of the largest, rounded to the dtype.
        scale = want.abs().max() + float(scales.max()) * grad.abs().max() * weight.abs().max()
        factor = 2 if dtype == torch.bfloat16 else 16
        assert ((got.double() - want).abs() <= factor * unit * scale * rows**0.5).all()


@every_isa
@every_dtype
def test_norm_strides_threads_and_dimensions_do_not_matter(isa, dtype):
    x, weight, grad = draw_norm(300, 77, dtype, 0)
    with cpu.use_isa(isa):
        wanted, scales = cpu.norm_abs_topk(x, weight, 20, 1e-6)
        bits, _ = cpu.pack(wanted, wanted, 20)
        gradients = cpu.norm_abs_topk_backward(grad, bits, x, weight, scales)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            turned = [tensor.t().contiguous().t() for tensor in (grad, bits, x)]
            assert torch.equal(cpu.norm_abs_topk(turned[2], weight, 20, 1e-6)[0], wanted)
            got = cpu.norm_abs_topk_backward(*turned, weight, scales)
            assert all(map(torch.equal, got, gradients))
        leaves = [x.view(3, 100, 77).requires_grad_(), weight.requires_grad_()]
        y = rms_norm_abs_topk(*leaves, 20, 1e-6)
        assert torch.equal(y.view(300, 77), wanted)
        got = torch.autograd.grad(y, leaves, grad.view(3, 100, 77))
        assert torch.equal(got[0].view(300, 77), gradients[0])
        assert torch.equal(got[1], gradients[1])


def test_norm_of_nothing():
    x, weight = torch.zeros(0, 5, requires_grad=True), torch.ones(5, requires_grad=True)
    rms_norm_abs_topk(x, weight, 2, 1e-6).sum().backward()
    assert x.grad.shape == (0, 5)
    assert torch.equal(weight.grad, torch.zeros(5))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norm_gradcheck(backend):
    x, weight, _ = draw_norm(3, 11, torch.float64, 1)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm_abs_topk(x, w, 4, 1e-3, backend),
        leaves,
        eps=1e-7,
        atol=1e-5,
    )


@every_dtype
def test_norm_opcheck_and_compile(dtype):
    x, weight, grad = draw_norm(4, 33, dtype, 2)
    for name in ("reference", "cpu"):
        arguments = (x, weight, 7, 1e-6, name)
        torch.library.opcheck(torch.ops.sparse_kernels.norm_abs_topk.default, arguments)
        y, scales = ops.norm_abs_topk(*arguments)
        rows = grad, cpu.pack(y, y, 7)[0], x
        for tensors in (rows, [tensor.t().contiguous().t() for tensor in rows]):
            torch.library.opcheck(
                torch.ops.sparse_kernels.norm_abs_topk_backward.default,
                (*tensors, weight, scales, name),
            )
    compiled = torch.compile(lambda x: rms_norm_abs_topk(x, weight, 7, 1e-6), fullgraph=True)
    assert torch.equal(compiled(x), rms_norm_abs_topk(x, weight, 7, 1e-6))


ROWS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "weight must be a torch.Tensor", (ROWS, [1.0], 1, 0.0)),
        (ValueError, r"weight must have shape \(3,\)", (ROWS, torch.zeros(2), 1, 0.0)),
        (TypeError, "weight must be torch.float32", (ROWS, torch.zeros(3).double(), 1, 0.0)),
        (ValueError, "eps must be at least 0", (ROWS, torch.zeros(3), 1, -1.0)),
        (ValueError, "k must be at most 3", (ROWS, torch.zeros(3), 4, 0.0)),
    ],
)
def test_norm_refusals(error, message, arguments):
    with pytest.raises(error, match=message):
        rms_norm_abs_topk(*arguments)
