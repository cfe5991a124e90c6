"""The three products against dense PyTorch: every backend, instruction set, dtype and block.

Every test goes through the public `sparse_linear` and takes its tolerance from the error that dense
PyTorch makes in the same dtype, or asks for the exact result where the inputs allow it.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    PRODUCTS,
    STRIDES,
    TARGETS,
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

import sparse_kernels as sk

every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_product = pytest.mark.parametrize("product", PRODUCTS)
# What has tiles, working memory and counts of its own: the reference is plain PyTorch.
KERNELS = [target for target in TARGETS if target.backend != "reference"]
every_kernel = pytest.mark.parametrize("target", KERNELS, ids=str)


def check_product(target, product, x, grad_output, values, layout, bias=None, exact=False):
    """Runs one product and holds it against the dense one, in float64 and in the tested dtype.

    `exact`: all inputs are whole numbers, so the result must be the right one bit for bit.
    """
    device = target.device
    with target.use():
        actual = sparse_product(
            product,
            *[t.to(device) for t in (x, grad_output, values)],
            layout.to(device),
            None if bias is None else bias.to(device),
            target.backend,
        ).cpu()
    assert actual.dtype == x.dtype
    assert actual.is_contiguous()

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
    if exact:
        assert torch.equal(actual, truth.to(x.dtype))
    else:
        assert_accurate(actual, dense(lambda t: t), truth, dense(lambda t: t.double().abs()))
    return actual


def make(layout, rows, dtype, generator, x_kind="contiguous", grad_kind="contiguous", exact=False):
    """Random x (M, K), grad_output (M, N) and values of a layout."""
    x = strided(rows, layout.in_features, x_kind, dtype, generator, exact)
    grad_output = strided(rows, layout.out_features, grad_kind, dtype, generator, exact)
    return x, grad_output, random(layout.values_shape, dtype, generator, exact)


def bias_for(product, layout, dtype, generator, exact=False):
    size = {"forward": layout.out_features, "grad_input": layout.in_features}.get(product)
    if size is None:
        return None
    return random((size,), dtype, generator, exact)


@every_target
@every_dtype
@every_product
@given(
    layouts(),
    tokens(),
    st.booleans(),
    st.sampled_from(STRIDES),
    st.sampled_from(STRIDES),
    seeds(),
    st.booleans(),
)
def test_products_match_dense(
    target, dtype, product, layout, rows, with_bias, x_kind, grad_kind, seed, exact
):
    exact = exact or dtype == torch.float64  # nothing is more exact to measure float64 with
    generator = torch.Generator().manual_seed(seed)
    tensors = make(layout, rows, dtype, generator, x_kind, grad_kind, exact)
    bias = bias_for(product, layout, dtype, generator, exact) if with_bias else None
    check_product(target, product, *tensors, layout, bias, exact)


# Sizes that the drawn ones never reach: tiles cut into panels, indices past uint16, many parts of
# tokens, blocks wider than a panel, outputs large enough to be streamed past the caches.
BIG = {
    "wide-input": (37, 33, 70001, 7, (1, 1)),
    "wide-output": (37, 70001, 33, 7, (1, 1)),
    "wide-both": (21, 2000, 6001, 3, (1, 1)),
    "many-panels": (70, 40, 40001, 301, (1, 1)),
    "panels-blocks": (70, 96, 12000, 36, (16, 3)),
    "panels-rows": (33, 12000, 96, 32, (3, 16)),
    "every-block-of-many": (65, 64, 9000, 9000, (4, 1)),
    "block-past-uint16": (9, 3, 140002, 70001, (1, 70001)),
    "tall-block": (9, 140002, 3, 2, (70001, 1)),
    "one-block": (70, 128, 128, 128, (128, 128)),
    "large-blocks": (130, 384, 256, 128, (128, 128)),
    "many-tokens": (20011, 9, 7, 3, (1, 1)),
    "few-tokens-wide": (3, 5000, 5001, 5, (1, 1)),
    "one-token": (1, 2048, 8192, 8, (1, 1)),
    "streamed": (1100, 1040, 64, 4, (1, 1)),
    "one-by-one": (1000, 1, 1, 1, (1, 1)),
}


@every_dtype
@every_product
@pytest.mark.parametrize("case", BIG)
def test_products_are_exact_at_large_sizes(dtype, product, case):
    rows, *sizes = BIG[case]
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(*sizes, generator=generator)
    x, grad_output, values = make(layout, rows, dtype, generator, exact=True)
    bias = bias_for(product, layout, dtype, generator, exact=True)
    # Whole numbers below 2^24 throughout: float32 holds the exact result.
    weight = to_dense(values.float(), layout)
    wide = None if bias is None else bias.float()
    expected = dense_product(product, x.float(), grad_output.float(), weight, wide)
    if product == "grad_weight":
        expected = kept(expected, layout)
    assert expected.abs().max() < 2**24
    for target in KERNELS:
        with target.use():
            actual = sparse_product(product, x, grad_output, values, layout, bias, target.backend)
        assert torch.equal(actual, expected.to(dtype)), target


LONG = {
    "fan_in-128": (64, 256, 4096, 128, (1, 1)),
    "fan_in-1024": (40, 64, 1024, 1024, (1, 1)),
    "fan_in-256-rows-of-16": (64, 128, 1024, 256, (16, 1)),
    "fan_in-256-one-token": (1, 256, 1024, 256, (1, 1)),
    "tokens-4096": (4096, 32, 32, 8, (1, 1)),
}


@every_target
@every_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", LONG)
def test_long_sums_are_as_accurate_as_dense(target, dtype, product, case):
    rows, *sizes = LONG[case]
    generator = torch.Generator().manual_seed(0)
    layout = sk.FanInLayout.random(*sizes, generator=generator)
    check_product(target, product, *make(layout, rows, dtype, generator), layout)


@every_target
@every_dtype
@every_product
def test_products_of_nothing(target, dtype, product):
    layout = sk.FanInLayout.random(6, 8, 4, (3, 2))
    x, grad_output, values = make(layout, 0, dtype, torch.Generator().manual_seed(0))
    actual = check_product(target, product, x, grad_output, values, layout)
    if product == "grad_weight":
        assert torch.equal(actual, torch.zeros_like(values))


@every_kernel
@every_dtype
@every_product
@given(layouts(max_features=60), tokens(150), seeds(), st.sampled_from(["nan", "inf"]))
def test_a_bad_element_reaches_only_what_reads_it(target, dtype, product, layout, rows, seed, bad):
    """NaN or infinity in one place shows exactly where the kept connections carry it.

    Not so in the reference, which multiplies by the zeros of the dense matrix as well.
    """
    generator = torch.Generator().manual_seed(seed)
    x, grad_output, values = make(layout, rows, dtype, generator)
    mask = to_dense(torch.ones_like(values), layout)
    if rows:
        row = int(torch.randint(rows, (), generator=generator))
        source = grad_output if product == "grad_input" else x
        column = int(torch.randint(source.shape[1], (), generator=generator))
        source[row, column] = float(bad)
    with target.use():
        actual = sparse_product(product, x, grad_output, values, layout, None, target.backend)
    is_bad = (~source.isfinite()).to(mask.dtype) if rows else None
    if rows == 0:
        touched = torch.zeros_like(actual, dtype=torch.bool)
    elif product == "forward":
        touched = is_bad @ mask.t() > 0
    elif product == "grad_input":
        touched = is_bad @ mask > 0
    else:
        reached = is_bad.sum(0, keepdim=True).expand(layout.out_features, -1) > 0
        touched = kept(reached, layout)
    assert torch.equal(~actual.isfinite(), touched)


@every_kernel
@every_dtype
@every_product
def test_nothing_is_left_over_from_the_call_before(target, dtype, product):
    """Working memory is reused: what an earlier call left there must not be read."""
    generator = torch.Generator().manual_seed(1)
    for out_features, in_features, fan_in, block in [
        (45, 39, 6, (5, 3)),
        (64, 5000, 16, (1, 1)),
        (30, 70, 7, (2, 1)),
    ]:
        layout = sk.FanInLayout.random(
            out_features, in_features, fan_in, block, generator=generator
        )
        poison = [torch.full_like(t, float("nan")) for t in make(layout, 130, dtype, generator)]
        for rows in (0, 1, 3, 5, 17, 67, 129):
            with target.use():
                for each in PRODUCTS:
                    sparse_product(each, *poison, layout, None, target.backend)
            tensors = make(layout, rows, dtype, generator, exact=True)
            check_product(target, product, *tensors, layout, exact=True)


@every_target
@every_dtype
@given(
    layouts(max_features=40),
    st.lists(st.integers(0, 4), min_size=0, max_size=3),
    seeds(),
    st.booleans(),
)
def test_leading_dimensions_are_flattened(target, dtype, layout, lead, seed, swap):
    generator = torch.Generator().manual_seed(seed)
    x = random((*lead, layout.in_features), dtype, generator, True)
    if swap and len(lead) > 1:
        x = x.transpose(0, 1)
    values = random(layout.values_shape, dtype, generator, True)
    bias = random((layout.out_features,), dtype, generator, True)
    weight = to_dense(values, layout)
    with target.use():
        y = sk.sparse_linear(x, values, layout, bias, target.backend)
    assert y.shape == (*x.shape[:-1], layout.out_features)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.equal(y, truth.to(dtype))


@every_target
@every_product
def test_strided_values_and_bias(target, product):
    """`values` and `bias` may be views too: they are read by their strides or copied."""
    generator = torch.Generator().manual_seed(2)
    layout = sk.FanInLayout.random(12, 10, 4, (3, 2), generator=generator)
    x, grad_output, values = make(layout, 21, torch.float32, generator)
    padded = torch.randn(*layout.values_shape[:3], 5, generator=generator)
    views = [
        values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        padded[..., 1:3],
        torch._neg_view(values.clone()),
        values[:1].expand_as(values),
    ]
    bias = bias_for(product, layout, torch.float32, generator)
    for view in views:
        check_product(target, product, x, grad_output, view, layout)
    if bias is not None:
        wide = torch.randn(2 * len(bias), generator=generator)
        for view in (wide[::2], wide[:1].expand_as(bias), torch._neg_view(bias)):
            check_product(target, product, x, grad_output, values, layout, view)


@every_target
@every_product
def test_zero_tensors_of_autograd_are_zero(target, product):
    """PyTorch represents some zero gradients by tensors without memory."""
    layout = sk.FanInLayout.random(12, 10, 4, (3, 2))
    x, grad_output, values = make(layout, 9, torch.float32, torch.Generator().manual_seed(0))
    nothing = torch._efficientzerotensor
    with target.use():
        actual = sparse_product(
            product,
            nothing(x.shape),
            nothing(grad_output.shape),
            values,
            layout,
            None,
            target.backend,
        )
    assert torch.equal(actual + 0, torch.zeros(actual.shape))


@every_target
def test_gradients_of_a_plain_sum(target):
    """`y.sum().backward()` hands over a gradient with all strides zero."""
    generator = torch.Generator().manual_seed(3)
    layout = sk.FanInLayout.random(48, 33, 11, (16, 1), generator=generator)
    x, _, values = make(layout, 70, torch.float32, generator, exact=True)
    for t in (x, values):
        t.requires_grad_()
    weight = to_dense(values.detach(), layout)
    with target.use():
        sk.sparse_linear(x, values, layout, backend=target.backend).sum().backward()
    ones = torch.ones(70, 48)
    assert torch.equal(x.grad, ones @ weight)
    assert torch.equal(values.grad, kept(ones.t() @ x.detach(), layout))


def test_bfloat16_accumulates_in_float32():
    """256 + 1000 ones: in bfloat16 arithmetic the sum would stay at 256."""
    layout = sk.FanInLayout.random(1, 1001, 1001)
    values = torch.ones(layout.values_shape, dtype=torch.bfloat16)
    x = torch.ones(70, 1001, dtype=torch.bfloat16)
    x[:, 0] = 256
    for target in TARGETS:
        with target.use():
            for rows in (1, 70):
                y = sk.sparse_linear(x[:rows], values, layout, backend=target.backend)
                assert torch.equal(y, torch.full((rows, 1), 1256.0).to(torch.bfloat16)), target
    tall = torch.ones(3001, 1, dtype=torch.bfloat16)
    one = sk.FanInLayout.random(1, 1, 1)
    leaf = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    for target in TARGETS:
        with target.use():
            y = sk.sparse_linear(tall, leaf, one, backend=target.backend)
            (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert grad.item() == torch.tensor(3001.0).to(torch.bfloat16).item(), target


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bfloat16"])
def test_bfloat16_result_is_rounded_to_nearest_even(dtype):
    """One product of a float32 sum that lies between two bfloat16 values."""
    # 1 + 2^-8 lies half way between 1 and 1 + 2^-7 and goes to the even 1; 1 + 3 * 2^-8 goes up.
    layout = sk.FanInLayout(torch.tensor([[0, 1]]), 2)
    values = torch.ones(layout.values_shape, dtype=dtype)
    x = torch.tensor([[1.0, 2**-8], [1.0, 3 * 2**-8], [-1.0, -(2**-8)], [3.0e38, 3.0e38]])
    expected = torch.tensor([[1.0], [1 + 2**-6], [-1.0], [float("inf")]]).to(dtype)
    for target in TARGETS:
        for rows in (1, 9):  # the dot product path and the tiles
            with target.use():
                y = sk.sparse_linear(
                    x.to(dtype).repeat(rows, 1), values, layout, backend=target.backend
                )
            assert torch.equal(y, expected.repeat(rows, 1)), target


@pytest.mark.slow
def test_fresh_working_memory_is_not_read():
    """In a process where malloc hands out garbage, the first calls are right all the same."""
    program = """
import torch, sparse_kernels as sk
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for N, K, fan_in, block in [(7, 5, 3, (1, 1)), (35, 33, 9, (5, 3)), (60, 5000, 8, (4, 1))]:
        layout = sk.FanInLayout.random(N, K, fan_in, block, generator=generator)
        for M in (1, 5, 37, 70, 600):
            x = torch.randn(M, K, generator=generator).to(dtype)
            dy = torch.randn(M, N, generator=generator).to(dtype)
            v = torch.randn(layout.values_shape, generator=generator).to(dtype)
            W = sk.to_dense(v, layout).double()
            leaf = v.requires_grad_()
            y = sk.sparse_linear(x, leaf, layout)
            dv, = torch.autograd.grad(y, leaf, dy)
            dx = sk.sparse_linear(dy, v.detach(), layout, transpose=True)
            want = dy.double().t() @ x.double()
            want = sk.to_dense(torch.ones_like(v.detach()), layout).double() * want
            bound = 0.02 if dtype is torch.bfloat16 else 1e-5
            for got, truth in [(y, x.double() @ W.t()), (dx, dy.double() @ W),
                               (sk.to_dense(dv, layout), want)]:
                gap = (got.detach().double() - truth).abs().max() / truth.abs().max()
                assert gap < bound, (dtype, N, K, M, gap)
print("right")
"""
    # glibc fills what malloc returns with the complement of this byte: 0x7f7f7f7f is 3.4e38.
    env = {**os.environ, "MALLOC_PERTURB_": "128"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.slow
def test_the_environment_chooses_the_instruction_set():
    program = "import sparse_kernels as sk; print(sk.cpu.isa())"
    for isa in sk.cpu.isas():
        env = {**os.environ, "SPARSE_KERNELS_CPU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == isa, done.stderr
