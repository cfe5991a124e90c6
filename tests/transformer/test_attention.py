"""Causal attention with sinks: values, exact gradients, odd sizes, dtypes."""

import efficient_attention
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_kernels import testing
from sparse_transformer import ModelConfig, attention


def draw(seed, B, T, H, d, dtype, sinks):
    generator = torch.Generator().manual_seed(seed)
    # Scores of some size, so that the softmax is not flat.
    qkv = (2 * torch.randn(B, T, 3, H, d, generator=generator, dtype=torch.float64)).to(dtype)
    sink = torch.randn(H, generator=generator, dtype=torch.float64).to(dtype) if sinks else None
    grad = torch.randn(B, T, H, d, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, sink, grad


def plainly(qkv, sinks, grad):
    """Result and gradients in float64."""
    qkv = qkv.double().requires_grad_()
    sinks = None if sinks is None else sinks.double().requires_grad_()
    y = plain.attention(*qkv.permute(2, 0, 3, 1, 4), sinks).transpose(1, 2)
    leaves = [qkv] if sinks is None else [qkv, sinks]
    return y.detach(), torch.autograd.grad(y, leaves, grad.double())


sizes = given(
    seed=st.integers(0, 2**31),
    B=st.integers(1, 3),
    T=st.sampled_from([1, 2, 63, 64, 65, 130, 200]),
    H=st.integers(1, 5),
    d=st.sampled_from([1, 3, 8, 16]),
    sinks=st.booleans(),
)


@sizes
def test_values_and_gradients_agree_with_the_formula(seed, B, T, H, d, sinks):
    qkv, sink, grad = draw(seed, B, T, H, d, torch.float64, sinks)
    wanted, gradients = plainly(qkv, sink, grad)
    leaves = [tensor.requires_grad_() for tensor in (qkv, sink) if tensor is not None]
    y = attention.causal_attention(qkv, sink)
    assert y.is_contiguous()
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    for got, want in zip(torch.autograd.grad(y, leaves, grad), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        attention.attend(*qkv.permute(2, 0, 3, 1, 4), sink).transpose(1, 2),
        wanted,
        rtol=1e-11,
        atol=1e-11,
    )


# ---- what GPUs use, with the formula in the place of PyTorch's kernel


def fused(qkv, sinks=None):
    return attention.FusedAttention.apply(attention._aligned(qkv), sinks)


def results(function, qkv, sinks, grad):
    """The result and the gradients."""
    leaves = [t.detach().requires_grad_() for t in (qkv, sinks) if t is not None]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@sizes
def test_sinks_beside_a_fused_kernel_are_exact(seed, B, T, H, d, sinks):
    qkv, sink, grad = draw(seed, B, T, H, 2 * d, torch.float64, sinks)
    wanted, gradients = plainly(qkv, sink, grad)
    with efficient_attention.on_the_cpu():
        made = results(fused, qkv, sink, grad)
    assert made[0].is_contiguous()
    for got, want in zip(made, (wanted, *gradients), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_fused_kernel_in_other_precisions(dtype, sinks):
    """At most twice the errors of dense products, with sinks in float32 as in a model."""
    qkv, sink, grad = draw(6, 2, 150, 4, 16, dtype, sinks)
    sink = None if sink is None else sink.float()
    wanted, gradients = plainly(qkv, sink, grad)

    def dense(qkv, sinks=None):
        return attention.attend(*qkv.permute(2, 0, 3, 1, 4), sinks).transpose(1, 2)

    with efficient_attention.on_the_cpu():
        made = results(fused, qkv, sink, grad)
    kept = [qkv.dtype, qkv.dtype, torch.float32]
    for got, peer, want, kind in zip(
        made, results(dense, qkv, sink, grad), (wanted, *gradients), kept, strict=False
    ):
        assert got.dtype == kind
        assert testing.max_error(got, want) <= testing.allowed_error(peer.to(dtype), want)


@pytest.mark.parametrize("kind", ["turned", "cut", "moved", "spread", "repeated"])
def test_the_fused_kernel_takes_any_strides(kind):
    """Of what the kernel cannot read there is a copy."""
    qkv, sink, grad = draw(7, 2, 40, 3, 8, torch.float32, True)
    if kind == "repeated":
        qkv = qkv[:1].expand(2, -1, -1, -1, -1)
    plain_copy = qkv.clone(memory_format=torch.contiguous_format)
    given = {
        "turned": lambda: qkv.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        "cut": lambda: torch.cat([qkv, qkv[..., :3]], 4)[..., :8],
        "moved": lambda: torch.cat([grad.flatten()[:1], qkv.flatten()])[1:].view(qkv.shape),
        "spread": lambda: qkv.repeat_interleave(2, 4)[..., ::2],
        "repeated": lambda: qkv,
    }[kind]()
    with efficient_attention.on_the_cpu():
        wanted = results(fused, plain_copy, sink, grad)
        turned = grad.transpose(1, 2).contiguous().transpose(1, 2)
        for got, want in zip(results(fused, given, sink, turned), wanted, strict=True):
            assert torch.equal(got, want)


def test_a_fused_product_of_heads_is_not_copied():
    qkv = torch.zeros(2, 5, 3, 4, 16)
    assert attention._aligned(qkv) is qkv
    cut = torch.zeros(2, 5, 4, 4, 16)[:, :, :3]
    assert attention._aligned(cut) is cut


def test_what_the_kernel_lacks_is_computed_plainly():
    for shape, dtype in (((1, 5, 3, 2, 12), torch.float32), ((1, 0, 3, 2, 8), torch.float32)):
        assert not attention._can_be_fused(torch.zeros(shape, dtype=dtype))
    assert not attention._can_be_fused(torch.zeros(1, 5, 3, 2, 8, dtype=torch.float64))
    assert attention._can_be_fused(torch.zeros(1, 5, 3, 2, 8, dtype=torch.float16))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_the_fused_kernel_compiles_whole_and_ignores_autocast(sinks, dtype):
    qkv, sink, grad = draw(8, 2, 40, 3, 8, dtype, sinks)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with efficient_attention.on_the_cpu():
        wanted = results(fused, qkv, sink, grad)
        with torch.autocast("cpu", torch.bfloat16):
            inside = results(fused, qkv, sink, grad)
        for made in (inside, results(compiled, qkv, sink, grad)):
            for got, want in zip(made, wanted, strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_data_the_shapes_and_strides_are_the_same(dtype):
    """By PyTorch's own description of its kernel, which gets the arguments that a GPU gets."""
    qkv = torch.empty(2, 40, 3, 4, 16, dtype=dtype, device="meta", requires_grad=True)
    sinks = torch.empty(4, device="meta", requires_grad=True)
    y = fused(qkv, sinks)
    grads = torch.autograd.grad(y, (qkv, sinks), torch.empty_like(y))
    for made, shape, kind in zip(
        (y, *grads), ((2, 40, 4, 16), qkv.shape, (4,)), (dtype, dtype, torch.float32), strict=True
    ):
        assert (made.shape, made.dtype) == (shape, kind)
        assert made.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [False, True])
def test_on_a_gpu(dtype, sinks):
    qkv, sink, grad = draw(5, 2, 700, 4, 16, dtype, sinks)
    wanted, gradients = plainly(qkv, sink, grad)
    given = [None if tensor is None else tensor.cuda() for tensor in (qkv, sink, grad)]
    made, again = (results(attention.causal_attention, *given) for _ in range(2))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for got, same, want in zip(made, again, (wanted, *gradients), strict=True):
        assert torch.equal(got, same)
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double().cpu() / scale, want / scale, rtol=0, atol=tolerance)
    moved = torch.cat([given[0].flatten()[:1], given[0].flatten()])[1:].view(qkv.shape)
    for got, want in zip(results(attention.causal_attention, moved, *given[1:]), made, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("sinks", [False, True])
def test_single_and_half_precision(dtype, tolerance, sinks):
    qkv, sink, grad = draw(0, 2, 150, 4, 16, dtype, sinks)
    wanted, gradients = plainly(qkv, sink, grad)
    leaves = [tensor.requires_grad_() for tensor in (qkv, sink) if tensor is not None]
    y = attention.causal_attention(qkv, sink)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(y, leaves, grad), gradients, strict=True):
        assert got.dtype == dtype
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=tolerance)


def test_autocast_does_not_reach_inside():
    qkv, sink, grad = draw(1, 2, 70, 3, 16, torch.float32, True)
    qkv.requires_grad_()
    plainly_made = attention.causal_attention(qkv, sink)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention.causal_attention(qkv, sink)
        (inside,) = torch.autograd.grad(y, qkv, grad)
    (outside,) = torch.autograd.grad(plainly_made, qkv, grad)
    assert torch.equal(y, plainly_made)
    assert torch.equal(inside, outside)


def test_scores_far_apart_neither_overflow_nor_vanish():
    # A later key would win by far: it must neither be seen nor spoil the softmax's scale.
    qkv = torch.zeros(1, 70, 3, 1, 1)
    qkv[0, :, 0] = 100.0
    qkv[0, :, 1, 0, 0] = torch.arange(70.0)
    qkv[0, :, 2, 0, 0] = torch.arange(70.0)
    for sinks in (None, torch.tensor([-200.0])):
        y = attention.causal_attention(qkv, sinks)
        torch.testing.assert_close(y[0, 1:, 0, 0], torch.arange(1.0, 70.0))
    # A sink that takes everything.
    assert attention.causal_attention(qkv, torch.tensor([1e5])).abs().max() == 0


def test_the_cache_gives_what_the_whole_sequence_gives():
    qkv, sink, _ = draw(3, 2, 40, 4, 8, torch.float32, True)
    cache = attention.KVCache(ModelConfig(d_model=32, d_head=8, n_layer=1, context=40), 2)
    wanted = attention.causal_attention(qkv, sink)
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 30), (30, 40)):
        q, k, v = qkv[:, start:end].unbind(2)
        y = attention.cached_attention(q, *cache.append(0, k, v), sink)
        cache.length = end
        torch.testing.assert_close(y, wanted[:, start:end], rtol=1e-5, atol=1e-5)
