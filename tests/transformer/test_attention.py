"""Causal attention with sinks: values, exact gradients, odd sizes, dtypes."""

import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@sizes
def test_sinks_beside_a_fused_kernel_are_exact(seed, B, T, H, d, sinks):
    # The algebra that GPUs use, on PyTorch's kernel for CPUs.
    qkv, sink, grad = draw(seed, B, T, H, d, torch.float64, True)
    wanted, gradients = plainly(qkv, sink, grad)
    leaves = [qkv.requires_grad_(), sink.requires_grad_()]
    y = attention.SinkAttention.apply(*qkv.permute(2, 0, 3, 1, 4), sink).transpose(1, 2)
    torch.testing.assert_close(y, wanted, rtol=1e-11, atol=1e-11)
    for got, want in zip(torch.autograd.grad(y, leaves, grad), gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sinks", [False, True])
def test_on_a_gpu(dtype, sinks):
    qkv, sink, grad = draw(5, 2, 200, 4, 16, dtype, sinks)
    wanted, gradients = plainly(qkv, sink, grad)
    leaves = [tensor.cuda().requires_grad_() for tensor in (qkv, sink) if tensor is not None]
    y = attention.causal_attention(*leaves)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    torch.testing.assert_close(y.double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(y, leaves, grad.cuda()), gradients, strict=True):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double().cpu() / scale, want / scale, rtol=0, atol=tolerance)


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
