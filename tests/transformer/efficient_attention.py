"""PyTorch's memory-efficient attention for GPUs, on the CPU: the formula behind the same operators.

It refuses what the CUDA kernel refuses, and what it would read wrongly without a word: see
aten/src/ATen/native/transformers/cuda/attention.cu and attention_backward.cu.
"""

from contextlib import contextmanager

import torch

ALIGNED_BYTES = 16
LSE_ROWS = 32  # the logarithms are padded to a multiple of these, with infinities


def check(*tensors):
    for tensor in tensors:
        assert tensor.stride(3) == 1, "the last dimension must be contiguous"
        size = tensor.element_size()
        assert tensor.data_ptr() % ALIGNED_BYTES == 0, "the address is not aligned"
        assert all(stride * size % ALIGNED_BYTES == 0 for stride in tensor.stride()[:3])


def wide(tensor):
    """(B, H, T, d) from (B, T, H, d); sums are in float32 at least."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.transpose(1, 2).to(dtype)


def scores(q, k):
    z = wide(q) @ wide(k).transpose(2, 3) * q.shape[3] ** -0.5
    return z.masked_fill(torch.ones(z.shape[2:], dtype=torch.bool).triu(1), -torch.inf)


# A kernel does not know of autocast, which PyTorch's operations in these do.
@torch.autocast("cpu", enabled=False)
def forward(
    query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout_p, mask, compute_lse=False, **more
):
    assert (bias, cu_q, cu_k, dropout_p, mask, more) == (None, None, None, 0.0, 1, {})
    check(query, key, value)
    z = scores(query, key)
    y = (z.softmax(3) @ wide(value)).transpose(1, 2).to(query.dtype).contiguous()
    T = query.shape[1]
    rows = -(-T // LSE_ROWS) * LSE_ROWS if compute_lse else 0
    lse = torch.full((*z.shape[:2], rows), torch.inf, dtype=z.dtype)
    if compute_lse:
        lse[..., :T] = z.logsumexp(3)
    return y, lse, *torch.zeros(2, dtype=torch.int64).unbind(), T, T


@torch.autocast("cpu", enabled=False)
def backward(
    grad, query, key, value, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout_p, seed, offset,
    mask, bias_requires_grad, *, num_splits_key=None, **more,
):  # fmt: skip
    T = query.shape[1]
    assert (bias, cu_q, cu_k, dropout_p, mask, more) == (None, None, None, 0.0, 1, {})
    assert (max_q, max_k, bias_requires_grad) == (T, T, False)
    assert num_splits_key == 1, "more splits are not deterministic"
    check(query, key, value)
    # The kernel takes for granted that a token's heads follow one another.
    assert out.is_contiguous(), "the kernel would read other tokens' results"
    assert lse.shape[2] % LSE_ROWS == 0
    assert torch.isinf(lse[..., T:]).all()
    grad = wide(grad)
    p = torch.exp(scores(query, key) - lse[..., :T, None])
    dz = p * (grad @ wide(value).transpose(2, 3) - (grad * wide(out)).sum(3, keepdim=True))
    dz = dz * query.shape[3] ** -0.5
    grads = dz @ wide(key), dz.transpose(2, 3) @ wide(query), p.transpose(2, 3) @ grad
    q, k, v = (g.transpose(1, 2).to(query.dtype).contiguous() for g in grads)
    return q, k, v, torch.empty(())


@contextmanager
def on_the_cpu():
    """PyTorch's operators have these implementations on the CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        library.impl("_efficient_attention_forward", forward)
        library.impl("_efficient_attention_backward", backward)
        yield
    finally:
        library._destroy()
