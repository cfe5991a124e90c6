"""The CUDA backend on a GPU: `pytest -m gpu`; test_cuda_emulated.py runs it without one."""

import subprocess
import sys

import pytest
import torch
from emulated import bias_for
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    STRIDES,
    assert_accurate,
    dense_product,
    kept,
    layouts,
    seeds,
    sparse_product,
    to_dense,
    tokens,
)
from test_abs_topk import KINDS, draw, expected
from test_cuda_emulated import BLOCKS, every_dtype, every_product, make

import sparse_kernels as sk
from sparse_kernels import backends, cuda, ops, reference, testing
from sparse_kernels.layout import Problem
from sparse_kernels.topk import abs_topk

_reason = cuda.why_not(Problem("cuda", torch.float32, "forward", 1, 1, 1))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_reason is not None, reason=f"the cuda backend cannot run: {_reason}"),
]


def strided_copy(tensor):
    """On the GPU with the same strides and an offset, which Tensor.to does not promise."""
    if tensor.numel() == 0:
        return tensor.cuda()
    resolved = tensor.resolve_neg()
    size = 1 + sum((n - 1) * s for n, s in zip(resolved.shape, resolved.stride(), strict=True))
    flat = torch.empty(size + 1, dtype=tensor.dtype, device="cuda")[1:]
    flat.copy_(resolved.as_strided((size,), (1,), resolved.storage_offset()))
    return flat.as_strided(resolved.shape, resolved.stride())


@every_dtype
@every_product
@given(
    layouts(max_features=300, blocks=BLOCKS),
    tokens(700),
    st.booleans(),
    st.sampled_from(STRIDES),
    st.sampled_from(STRIDES),
    st.sampled_from([8, 24, 2**20]),
    seeds(),
)
def test_products_match_dense(
    dtype, product, layout, rows, with_bias, x_kind, grad_kind, slices, seed
):
    generator = torch.Generator().manual_seed(seed)
    x, grad_output, values = make(layout, rows, dtype, generator, x_kind, grad_kind)
    bias = bias_for(product, layout, dtype, generator) if with_bias else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda, "_SLICE_FEATURES", slices)
        monkeypatch.setattr(cuda, "_GRAD_WEIGHT_SLICE_FEATURES", slices)
        arguments = [strided_copy(x), strided_copy(grad_output), values.cuda(), layout.to("cuda")]
        moved = None if bias is None else bias.cuda()
        actual = sparse_product(product, *arguments, moved, "cuda")
        again = sparse_product(product, *arguments, moved, "cuda")
    assert torch.equal(actual, again)

    def dense(convert):
        result = dense_product(
            product,
            convert(x),
            convert(grad_output),
            convert(to_dense(values, layout)),
            None if bias is None else convert(bias),
        )
        return kept(result, layout) if product == "grad_weight" else result

    truth = dense(torch.Tensor.double)
    terms = dense(lambda t: t.double().abs())
    assert_accurate(actual.cpu(), dense(lambda t: t), truth, terms)


@every_dtype
@every_product
@pytest.mark.parametrize(
    "sizes",
    [
        (4096, 4096, 32),
        (16384, 1024, 64),
        (1024, 16384, 16),
        (4096, 2048, 256, (64, 64)),
        (2048, 4096, 896, (128, 128)),
    ],
)
def test_products_at_the_size_of_a_model(dtype, product, sizes):
    case = testing.make_problem(0, 2000, *sizes, dtype=dtype, device="cuda")
    bias = {"forward": case.bias, "grad_input": case.input_bias}.get(product)
    actual = sparse_product(
        product, case.x, case.grad_output, case.values, case.layout, bias, "cuda"
    )
    truth = case.reference64(product)
    assert testing.max_error(actual, truth) <= testing.allowed_error(
        case.torch_dense(product), truth
    )


@every_dtype
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 300),
    cols=st.integers(1, 3000),
    share=st.floats(0, 1),
    held=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_abs_topk_keeps_what_a_stable_sort_keeps(dtype, kind, rows, cols, share, held, seed):
    x = draw(kind, min(rows, 30000 // cols), cols, dtype, seed)
    k = max(1, min(cols, round(share * cols)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda, "_HELD_BYTES", 2**20 if held else 0)
        y = abs_topk(x.cuda(), k, "cuda")
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(y.cpu().view(integer), expected(x, k).view(integer))


@every_dtype
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 3000),
    share=st.floats(0, 1),
    held=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fused_abs_topk_and_gradients(dtype, rows, cols, share, held, seed):
    rows, k = min(rows, 30000 // cols), max(1, min(cols, round(share * cols)))
    x, grad, weights = (
        draw("normal", rows, cols, dtype, seed + number).cuda() for number in range(3)
    )
    weight, eps = 1 + weights[0], 2.0**-16
    unit = 16 * torch.finfo(dtype).eps
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cuda, "_HELD_BYTES", 2**20 if held else 0)
        for name, arguments in (("gelu_abs_topk", ()), ("norm_abs_topk", (weight,))):
            last = (eps,) if arguments else ()
            run, exact = getattr(cuda, name), getattr(reference, name)

            def first(results):
                return results[0] if isinstance(results, tuple) else results

            whole, made = first(run(x, *arguments, cols, *last)), run(x, *arguments, k, *last)
            wanted = first(exact(x, *arguments, cols, *last))
            assert torch.equal(first(made), cuda.abs_topk(whole, k))
            assert torch.allclose(whole.double(), wanted.double(), rtol=unit, atol=unit)
            inputs = grad, first(made), x, *arguments, *(made[1:] if arguments else ())
            backward = getattr(cuda, f"{name}_backward")(*inputs)
            truth = getattr(reference, f"{name}_backward")(*inputs)
            for one, other in zip(
                *(r if arguments else (r,) for r in (backward, truth)), strict=True
            ):
                scale = 1 + float(other.double().abs().max())
                assert torch.allclose(one.double(), other.double(), rtol=unit, atol=unit * scale)


def test_a_graph_captures_a_whole_step():
    layout = sk.FanInLayout.random(256, 128, 8, device="cuda")
    x = torch.randn(70, 128, device="cuda", requires_grad=True)
    values = torch.randn(layout.values_shape, device="cuda", requires_grad=True)

    def step():
        y = abs_topk(sk.sparse_linear(x, values, layout, backend="cuda"), 30, "cuda")
        return torch.autograd.grad(y.square().sum(), (x, values))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # derives the schedules, which waits for the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_kernels_run_on_the_current_stream():
    layout = sk.FanInLayout.random(512, 512, 64, device="cuda")
    values = torch.randn(layout.values_shape, device="cuda")
    x = torch.randn(4096, 512, device="cuda")
    truth = sk.sparse_linear(x, values, layout, backend="cuda")  # derives the schedule as well
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = torch.empty_like(x).copy_(x)
        y = sk.sparse_linear(late, values, layout, backend="cuda")
    stream.synchronize()
    assert torch.equal(y, truth)


def test_lists_built_on_one_stream_serve_another():
    layout = sk.FanInLayout.random(512, 512, 64, device="cuda")
    values = torch.randn(layout.values_shape, device="cuda")
    grad_output = torch.randn(4096, 512, device="cuda")
    truth = grad_output @ sk.to_dense(values, layout)
    torch.cuda.synchronize()
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            if not results:
                torch.cuda._sleep(100_000_000)  # the lists are built after it
            results.append(
                sk.sparse_linear(grad_output, values, layout, backend="cuda", transpose=True)
            )
    torch.cuda.synchronize()
    assert torch.equal(*results)
    assert torch.allclose(results[0], truth, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_graph_refuses_the_first_use_of_a_kernel(backend):
    """In a process that has loaded no kernel yet; AbsTopK has no layout that would refuse it."""
    program = f"""
import torch, sparse_kernels as sk
x, graph = torch.randn(8, 64, device="cuda"), torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        sk.abs_topk(x, 5, {backend!r})
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "used for the first time while a CUDA graph is captured" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_other_device():
    layout = sk.FanInLayout.random(64, 48, 8, device="cuda:1")
    x = torch.randn(9, 48, device="cuda:1")
    values = torch.randn(layout.values_shape, device="cuda:1")
    before = torch.cuda.current_device()
    y = sk.sparse_linear(x, values, layout, backend="cuda")
    assert y.device == x.device
    assert torch.cuda.current_device() == before


def test_a_cpu_tensor_reaches_no_kernel():
    layout = sk.FanInLayout.random(8, 6, 2, device="cuda")
    x, values = torch.randn(3, 6, device="cuda"), torch.randn(layout.values_shape, device="cuda")
    with pytest.raises(ValueError, match="x must be on cuda:0, got cpu"):
        ops.forward(x.cpu(), values, layout, None, "cuda")
    with pytest.raises(ValueError, match="values must be on cuda:0, got cpu"):
        ops.forward(x, values.cpu(), layout, None, "cuda")


def test_unstructured_weights_go_to_cuda():
    assert backends.choose(Problem("cuda", torch.bfloat16, "forward", 64, 64, 8)) == "cuda"


@every_product
def test_more_than_2_to_the_31_elements(product):
    rows, width = 2**31 // 1024 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    layout = sk.FanInLayout.random(1024, width, 1, device="cuda")
    values = torch.ones(layout.values_shape, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    y = sparse_product(product, x, x, values, layout, None, "cuda")
    if product == "grad_weight":
        assert torch.equal(y, torch.ones_like(y))
    else:
        assert not y[:-1].any()
        dense = sk.to_dense(values, layout)
        assert torch.equal(y[-1], dense.sum(1 if product == "forward" else 0))
