"""Gradients of any order, only those needed; opcheck, torch.compile and autocast."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, TARGETS, layouts, random, seeds, to_dense
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as sk

every_target = pytest.mark.parametrize("target", TARGETS, ids=str)
# The derivatives are built of the products, which test_products.py runs on every instruction set:
# here each backend once, on its highest.
every_backend = pytest.mark.parametrize(
    "target", list({target.backend: target for target in TARGETS}.values()), ids=str
)
both_ways = pytest.mark.parametrize("transpose", [False, True], ids=["forward", "transpose"])

SMALL = [
    (6, 5, 2, (1, 1)),
    (8, 6, 3, (4, 1)),
    (4, 6, 4, (1, 2)),
    (6, 6, 3, (2, 3)),
    (3, 4, 4, (1, 1)),
]


def doubles(layout, rows, transpose=False, with_bias=True, seed=0):
    """Leaves (x, values, bias) in float64 for gradcheck."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    sizes = (layout.in_features, layout.out_features)
    inputs, outputs = reversed(sizes) if transpose else sizes
    return leaf(rows, inputs), leaf(*layout.values_shape), leaf(outputs) if with_bias else None


@every_backend
@both_ways
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_gradcheck(target, transpose, case, rows):
    layout = sk.FanInLayout.random(*case, generator=torch.Generator().manual_seed(0))
    leaves = doubles(layout, rows, transpose)

    def call(x, values, bias):
        return sk.sparse_linear(x, values, layout, bias, target.backend, transpose=transpose)

    with target.use():
        assert torch.autograd.gradcheck(call, leaves)


@every_backend
@both_ways
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradgradcheck(target, transpose, case):
    layout = sk.FanInLayout.random(*case, generator=torch.Generator().manual_seed(0))
    leaves = doubles(layout, 6, transpose)

    def call(x, values, bias):
        y = sk.sparse_linear(x, values, layout, bias, target.backend, transpose=transpose)
        return y.square()  # so that the second derivative also goes through y

    with target.use():
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_third_derivative_matches_dense():
    layout = sk.FanInLayout.random(6, 5, 2, generator=torch.Generator().manual_seed(0))
    x, values, _ = doubles(layout, 4)

    def third(function):
        grads = (function(x, values).sin().sum(),)
        for _ in range(3):
            total = sum(grad.cos().sum() for grad in grads)
            grads = torch.autograd.grad(total, (x, values), create_graph=True)
        return grads

    actual = third(lambda x, values: sk.sparse_linear(x, values, layout))
    expected = third(lambda x, values: x @ to_dense(values, layout).t())
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_target
@given(layouts(max_features=60), st.integers(0, 100), st.booleans(), st.booleans(), seeds())
def test_gradients_match_dense(target, layout, rows, transpose, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = (layout.in_features, layout.out_features)
    inputs, outputs = reversed(sizes) if transpose else sizes
    x, values, bias, cotangent = (
        random(shape, torch.float32, generator, exact=True)
        for shape in ((rows, inputs), layout.values_shape, (outputs,), (rows, outputs))
    )
    bias = bias if with_bias else None

    def gradients(function, dtype):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (x, values, bias)]
        y = function(*leaves)
        present = [t for t in leaves if t is not None]
        return [y.detach(), *torch.autograd.grad(y, present, cotangent.to(dtype))]

    def sparse(x, values, bias):
        return sk.sparse_linear(x, values, layout, bias, target.backend, transpose=transpose)

    def dense(x, values, bias):
        weight = to_dense(values, layout)
        return torch.nn.functional.linear(x, weight.t() if transpose else weight, bias)

    with target.use():
        actual = gradients(sparse, torch.float32)
    for mine, truth in zip(actual, gradients(dense, torch.float64), strict=True):
        assert torch.equal(mine.double(), truth)  # whole numbers: nothing is rounded


@every_backend
@both_ways
@pytest.mark.parametrize("needs", range(8))
def test_only_needed_gradients(target, transpose, needs):
    """Every combination of requires_grad: those asked for are right, the others are not there."""
    layout = sk.FanInLayout.random(6, 8, 4, (3, 2), generator=torch.Generator().manual_seed(0))
    leaves = doubles(layout, 9, transpose)
    everything = torch.autograd.grad(
        sk.sparse_linear(
            leaves[0], leaves[1], layout, leaves[2], target.backend, transpose=transpose
        ).sum(),
        leaves,
    )
    wanted = [bool(needs & (1 << i)) for i in range(3)]
    some = [t.detach().requires_grad_(want) for t, want in zip(leaves, wanted, strict=True)]
    with target.use():
        y = sk.sparse_linear(some[0], some[1], layout, some[2], target.backend, transpose=transpose)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.sum().backward()
    for t, want, expected in zip(some, wanted, everything, strict=True):
        assert (t.grad is not None) == want
        if want:
            torch.testing.assert_close(t.grad, expected)


@both_ways
def test_unneeded_products_do_not_run(transpose):
    """Counts the ops: a frozen weight costs no grad_weight, a first layer no grad_input."""
    layout = sk.FanInLayout.random(6, 8, 4, generator=torch.Generator().manual_seed(0))

    def ops_of(x_needs, values_need):
        x, values, _ = doubles(layout, 9, transpose, with_bias=False)
        x, values = x.detach().requires_grad_(x_needs), values.detach().requires_grad_(values_need)
        y = sk.sparse_linear(x, values, layout, transpose=transpose).sum()
        y.backward(retain_graph=True)  # builds the schedules
        with torch.profiler.profile() as profile:
            y.backward()
        names = {event.key for event in profile.key_averages()}
        return {name.split("::")[1] for name in names if name.startswith("sparse_kernels::")}

    back = "forward" if transpose else "grad_input"
    assert ops_of(True, False) == {back}
    assert ops_of(False, True) == {"grad_weight"}
    assert ops_of(True, True) == {back, "grad_weight"}


def test_no_grad_and_inference_mode_record_nothing():
    layout = sk.FanInLayout.random(6, 8, 4)
    x, values, bias = doubles(layout, 5)
    expected = sk.sparse_linear(x, values, layout, bias).detach()
    with torch.no_grad():
        y = sk.sparse_linear(x, values, layout, bias)
        assert not y.requires_grad
        assert torch.equal(y, expected)
    with torch.inference_mode():
        y = sk.sparse_linear(x, values, layout, bias)
        assert y.is_inference()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("which", ["x", "values"])
def test_a_saved_tensor_changed_in_place_is_noticed(which):
    layout = sk.FanInLayout.random(6, 8, 4)
    x, values, _ = doubles(layout, 5)
    inputs = {"x": x.clone(), "values": values.clone()}
    y = sk.sparse_linear(inputs["x"], inputs["values"], layout)
    with torch.no_grad():
        inputs[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_needs_retain_graph():
    layout = sk.FanInLayout.random(6, 8, 4)
    x, values, _ = doubles(layout, 5)
    y = sk.sparse_linear(x, values, layout).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_saved_tensor_hooks_and_checkpointing_see_every_tensor():
    """Activation checkpointing and offloading: what backward needs goes through the hooks."""
    from torch.utils.checkpoint import checkpoint

    layer = sk.SparseLinear(8, 6, fan_in=4, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(layer.weight.grad, expected[1])
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        layer(x).sum()
    assert x.shape in seen
    assert layer.weight.shape in seen


def test_unused_output_gives_no_gradient_and_no_error():
    layout = sk.FanInLayout.random(6, 8, 4)
    x, values, _ = doubles(layout, 5)
    y = sk.sparse_linear(x, values, layout)
    assert torch.autograd.grad(x.sum(), (x, values), allow_unused=True)[1] is None
    (nothing,) = torch.autograd.grad(y[:0].sum(), x)
    assert torch.equal(nothing, torch.zeros_like(x))


class RecordOps(TorchDispatchMode):
    """Keeps the arguments of each op of the package that runs inside."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "sparse_kernels":
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_opcheck(target, dtype):
    """Schema, fakes, aliasing and tracing of every op, with the arguments of real calls.

    Each dtype and each backend with tokens and without.
    """
    rows = 9 if (target.backend == "reference") == (dtype == torch.bfloat16) else 0
    layout = sk.FanInLayout.random(12, 18, 6, (2, 3))
    recorder = RecordOps()
    with target.use(), recorder:
        for transpose in (False, True):
            leaves = [t.to(dtype) for t in doubles(layout, rows, transpose)]
            leaves = [t.detach().requires_grad_() for t in leaves]
            y = sk.sparse_linear(
                leaves[0], leaves[1], layout, leaves[2], target.backend, transpose=transpose
            )
            y.sum().backward()
        z = torch.randn(rows, 16, requires_grad=True, dtype=dtype)
        if target.backend != "reference":
            sk.abs_topk(z, 5).sum().backward()
    seen = set()
    with target.use():
        for op, args, kwargs in recorder.calls:
            seen.add(op.name().split("::")[1])
            plain = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            torch.library.opcheck(op, plain, kwargs)
    assert seen >= {"forward", "grad_input", "grad_weight"}


def test_every_op_of_the_library_is_opchecked():
    """A new op must be added to the calls of test_opcheck, or to those of its own test file."""
    defined = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sparse_kernels::")
    }
    assert defined == {
        "forward",
        "grad_input",
        "grad_weight",
        "bias_grad",
        "pack",
        "unpack",
        "abs_topk",
        "abs_topk_packed",
        "abs_topk_backward",
        "gelu_abs_topk",
        "gelu_abs_topk_packed",
        "gelu_abs_topk_backward",
        "gelu_abs_topk_packed_backward",
        "norm_abs_topk",
        "norm_abs_topk_packed",
        "norm_abs_topk_backward",
        "norm_abs_topk_packed_backward",
        "attention",
        "attention_backward",
    }


# ---- torch.compile


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def same_step(function, other, inputs):
    """Both functions give the same bits, result and gradients."""
    results = []
    for call in (function, other):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = call(*leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        results.append([y.detach(), *grads])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@both_ways
@pytest.mark.parametrize("block", [(1, 1), (2, 3)], ids=str)
def test_compile_fullgraph_matches_eager(transpose, block):
    """The very first use of the layout is under the compiler: its caches are filled by it."""
    layout = sk.FanInLayout.random(12, 18, 6, block)
    sizes = (12, 18) if transpose else (18, 12)
    inputs = (
        torch.randn(5, 7, sizes[0]),
        torch.randn(layout.values_shape),
        torch.randn(sizes[1]),
    )

    def call(x, values, bias):
        return sk.sparse_linear(x * 2, values, layout, bias, transpose=transpose).relu()

    same_step(compiled(call), call, inputs)
    same_step(compiled(call), call, inputs)  # and after the caches are there
    # Eager again: nothing that the tracer made may have been kept in the caches.
    assert "transposed" in layout.cache
    for tensor in layout.transposed:
        assert type(tensor) is torch.Tensor


def test_compile_layer_first_call_rewire_and_other_sizes():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        sk.SparseLinear(16, 32, fan_in=4), torch.nn.GELU(), sk.SparseLinear(32, 8, fan_out=2)
    )
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain)]

    def step(rows):
        x = torch.randn(rows, 16)
        losses = []
        for m, optimizer in zip((fast, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert torch.equal(*losses)
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert torch.equal(mine.grad, theirs.grad)

    step(5)
    step(5)
    step(9)  # another size: recompiled with a dynamic number of tokens
    step(33)
    for _ in range(2):  # a rewired layer must not run with the pattern that was traced
        new = sk.FanInLayout.random(32, 16, 4)
        sk.rewire_(model[0], optimizers[0], new)
        sk.rewire_(plain[0], optimizers[1], new)
        new = another_layout(plain[2])
        sk.rewire_(model[2], optimizers[0], new)
        sk.rewire_(plain[2], optimizers[1], new)
        step(5)
        step(9)


def another_layout(layer):
    """Another random pattern of the size that this layer has."""
    old = layer.layout
    return sk.FanInLayout.random(old.out_features, old.in_features, old.fan_in, old.block)


@pytest.mark.slow
def test_compile_with_inductor():
    layer = sk.SparseLinear(16, 12, fan_in=4, block=(4, 2))
    torch._dynamo.reset()
    fast = torch.compile(lambda x: layer(x.sin()).cos(), fullgraph=True)
    for rows in (6, 7, 1):
        x = torch.randn(rows, 16, requires_grad=True)
        y = fast(x)
        y.sum().backward()
        actual = y.detach(), x.grad.clone(), layer.weight.grad.clone()
        x.grad = layer.weight.grad = None
        y = layer(x.sin()).cos()
        y.sum().backward()
        for mine, theirs in zip(actual, (y.detach(), x.grad, layer.weight.grad), strict=True):
            torch.testing.assert_close(mine, theirs)
        layer.weight.grad = None


# ---- autocast


@both_ways
def test_autocast_computes_in_bfloat16_and_keeps_the_parameters_dtype(transpose):
    layout = sk.FanInLayout.random(12, 18, 6, (2, 3))
    sizes = (12, 18) if transpose else (18, 12)
    leaves = [
        torch.randn(shape, requires_grad=True)
        for shape in ((5, sizes[0]), layout.values_shape, (sizes[1],))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        y = sk.sparse_linear(leaves[0], leaves[1], layout, leaves[2], transpose=transpose)
    assert y.dtype == torch.bfloat16
    halves = [t.detach().bfloat16().requires_grad_() for t in leaves]
    expected = sk.sparse_linear(halves[0], halves[1], layout, halves[2], transpose=transpose)
    assert torch.equal(y, expected)
    cotangent = torch.randn(y.shape).bfloat16()
    y.backward(cotangent)
    expected.backward(cotangent)
    for mine, theirs in zip(leaves, halves, strict=True):
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, theirs.grad.float())


def test_autocast_in_a_mixed_model_and_disabled_inside():
    layer = sk.SparseLinear(8, 6, fan_in=4)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = torch.nn.Linear(8, 8)(x)
        assert half.dtype == torch.bfloat16
        y = layer(half)  # bfloat16 activations into float32 parameters
        assert y.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


def test_autocast_under_compile():
    layer = sk.SparseLinear(8, 6, fan_in=4)
    x = torch.randn(5, 8)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    expected = call(x)
    actual = compiled(call)(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("block", "derived"),
    [
        ((1, 1), {"cpu.columns", "transposed"}),
        ((16, 1), set()),
        ((16, 16), {"cpu.columns", "transposed"}),
    ],
)
def test_products_derive_only_the_lists_that_they_walk(block, derived):
    layout = sk.FanInLayout.random(64, 48, fan_in=16, block=block)
    x = torch.randn(8, 48, requires_grad=True)
    values = torch.randn(layout.values_shape, requires_grad=True)
    sk.sparse_linear(x, values, layout, backend="cpu").sum().backward()
    assert set(layout.cache) == {"cpu.forward", "cpu.grad_input", "cpu.rows", *derived}
