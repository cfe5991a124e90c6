"""The sum over tokens that a bias gets: rounded once, the same bits for any number of threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparse_kernels as sk
from sparse_kernels import cpu, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_isa = pytest.mark.parametrize("isa", cpu.isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every_isa
@every_dtype
@given(tokens=st.integers(0, 300), cols=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_sums(isa, dtype, tokens, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(tokens, cols, generator=generator, dtype=torch.float64).to(dtype)
    exact = grad.double().sum(0)
    with cpu.use_isa(isa):
        torch.set_num_threads(1)
        got = cpu.bias_grad(grad)
        torch.set_num_threads(3)
        assert torch.equal(cpu.bias_grad(grad), got)
        assert torch.equal(cpu.bias_grad(grad.t().contiguous().t()), got)
        apart = torch.cat([grad, grad], 1)[:, :cols]
        assert torch.equal(cpu.bias_grad(apart), got)
    wide = torch.promote_types(dtype, torch.float32)
    allowed = 8 * torch.finfo(wide).eps * grad.double().abs().sum(0)
    if dtype != wide:
        allowed += torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((got.double() - exact).abs() <= allowed).all()


@every_dtype
@pytest.mark.parametrize("kind", ["alike", "normal"])
@pytest.mark.parametrize("tokens", [2048, 20001, 131072])
def test_errors_of_many_tokens_do_not_add_up(tokens, kind, dtype):
    torch.manual_seed(0)
    grad = torch.full((tokens, 40), 0.1) if kind == "alike" else torch.randn(tokens, 40)
    grad = grad.to(dtype)
    exact = grad.double().sum(0)
    error, peer = (
        float((made.double() - exact).abs().max())
        for made in (cpu.bias_grad(grad), reference.bias_grad(grad))
    )
    wide = torch.promote_types(dtype, torch.float32)
    # Twice PyTorch's error; and where numbers are alike, whose roundings all go one way, those of
    # the 16 and 10 additions that every number goes through.
    least = 16 * torch.finfo(wide).eps * float(exact.abs().max())
    assert error <= 2 * peer + (least if kind == "alike" else 1e-12)


@every_dtype
def test_opcheck(dtype):
    for backend in ("cpu", "reference"):
        torch.library.opcheck(
            torch.ops.sparse_kernels.bias_grad.default, (torch.randn(5, 7).to(dtype), backend)
        )


def test_the_gradient_of_a_bias_can_be_differentiated():
    layout = sk.FanInLayout.random(4, 5, 2)
    x, values = torch.randn(3, 5).double(), torch.randn(layout.values_shape).double()
    leaves = [x.requires_grad_(), values, torch.randn(4).double().requires_grad_()]

    def run(x, bias):
        y = sk.sparse_linear(x, values, layout, bias)
        return torch.autograd.grad((y**3).sum(), bias, create_graph=True)[0]

    assert torch.autograd.gradcheck(run, (leaves[0], leaves[2]))
    assert torch.equal(ops.bias_grad(torch.ones(0, 3), "cpu"), torch.zeros(3))
