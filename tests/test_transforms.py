"""Forward-mode derivatives, `torch.func` and batched gradients, against dense operations."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import sparse_kernels as sk

F64 = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def abs_topk_dense(x, k):
    """`abs_topk` out of operations that PyTorch differentiates itself."""
    kept = torch.zeros_like(x).scatter(-1, x.detach().abs().topk(k).indices, 1)
    return x * kept


def attention_dense(qkv, sinks=None):
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    z = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    z = z.masked_fill(torch.ones(z.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if sinks is not None:
        z = torch.cat([z, sinks[:, None, None].expand(*z.shape[:-1], 1)], -1)
        v = torch.cat([v, torch.zeros_like(v[..., :1, :])], -2)
    return (z.softmax(-1) @ v).transpose(1, 2)


def rms_norm_dense(x, weight):
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


@st.composite
def linears(draw):
    """A layer, x for it and the dense function of (x, values, bias) that it has to equal."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    block = draw(st.sampled_from([(1, 1), (4, 1), (2, 2)]))
    rows, cols = 4 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
    fan = {draw(st.sampled_from(["fan_in", "fan_out"])): 4}
    backend = draw(st.sampled_from(["reference", None]))
    layer = sk.SparseLinear(
        cols, rows, **fan, block=block, dtype=torch.float64, backend=backend
    ).requires_grad_(draw(st.booleans()))
    x = torch.randn(draw(st.integers(1, 5)), cols, dtype=torch.float64)

    def sparse(x, values, bias):
        return sk.sparse_linear(x, values, layer.layout, bias, backend, transpose=layer.transpose)

    def dense(x, values, bias):
        ones = torch.ones_like(values)
        where = sk.to_dense(ones, layer.layout).nonzero(as_tuple=True)
        order = sk.to_dense(torch.arange(1, ones.numel() + 1.0).view(ones.shape), layer.layout)
        flat = values.flatten()[order[where].long() - 1]
        weight = torch.zeros(order.shape, dtype=x.dtype).index_put(where, flat)
        return torch.nn.functional.linear(x, weight.t() if layer.transpose else weight, bias)

    return layer, x, sparse, dense


@given(linears())
def test_linear_has_the_derivatives_of_a_dense_one(case):
    layer, x, sparse, dense = case
    inputs = (x, layer.weight.detach(), layer.bias.detach())
    tangents = tuple(torch.randn_like(tensor) for tensor in inputs)
    F64(torch.func.jvp(sparse, inputs, tangents), torch.func.jvp(dense, inputs, tangents))
    for place in range(3):
        for jacobian in (torch.func.jacfwd, torch.func.jacrev):
            F64(jacobian(sparse, place)(*inputs), jacobian(dense, place)(*inputs))

    def loss(function, *arguments):
        return function(*arguments).square().sum()

    for place in (0, 1):
        got = torch.func.hessian(partial(loss, sparse), place)(*inputs)
        F64(got, torch.func.hessian(partial(loss, dense), place)(*inputs))


@given(linears())
def test_linear_maps_over_samples_and_over_weights(case):
    layer, x, sparse, dense = case
    values, bias = layer.weight.detach(), layer.bias.detach()

    def loss(function, values, bias, x):
        return function(x[None], values, bias).square().sum()

    for function in (torch.func.grad, torch.func.jacfwd):
        per_sample = [
            torch.vmap(function(partial(loss, f), (0, 1)), (None, None, 0))(values, bias, x)
            for f in (sparse, dense)
        ]
        F64(*per_sample)
    ensemble = torch.stack([values, 2 * values, -values])
    got = torch.vmap(sparse, (None, 0, None))(x, ensemble, bias)
    F64(got, torch.stack([dense(x, values, bias) for values in ensemble]))
    biases = torch.stack([bias, -bias], 1)
    got = torch.vmap(sparse, (None, None, 1), 1)(x, values, biases)
    F64(got, torch.stack([dense(x, values, bias) for bias in biases.t()], 1))


@given(linears())
def test_dual_numbers_under_no_grad(case):
    layer, x, sparse, dense = case
    values, bias = layer.weight.detach(), layer.bias.detach()
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        got = forward_ad.unpack_dual(sparse(dual, values, bias)).tangent
        F64(got, forward_ad.unpack_dual(dense(dual, values, bias)).tangent)


@given(linears())
def test_batched_gradients(case):
    layer, x, sparse, dense = case
    inputs = (x, layer.weight.detach(), layer.bias.detach())
    jacobian = torch.autograd.functional.jacobian
    F64(jacobian(sparse, inputs, vectorize=True), jacobian(dense, inputs))
    F64(
        jacobian(sparse, inputs, vectorize=True, strategy="forward-mode"),
        jacobian(dense, inputs),
    )


OPERATIONS = {
    "abs_topk": (lambda x: sk.abs_topk(x, 3), lambda x: abs_topk_dense(x, 3)),
    "gelu_abs_topk": (
        lambda x: sk.transformer_ops.gelu_abs_topk(x, 3),
        lambda x: abs_topk_dense(torch.nn.functional.gelu(x), 3),
    ),
    "rms_norm_abs_topk": (
        lambda x: sk.transformer_ops.rms_norm_abs_topk(x, x[0] * 0 + 2, 3, 1e-5),
        lambda x: abs_topk_dense(rms_norm_dense(x, x[0] * 0 + 2), 3),
    ),
    "causal_attention": (
        lambda x: sk.transformer_ops.causal_attention(x.view(1, -1, 3, 2, 1)),
        lambda x: attention_dense(x.view(1, -1, 3, 2, 1)),
    ),
    "causal_attention with sinks": (
        lambda x: sk.transformer_ops.causal_attention(x.view(1, -1, 3, 2, 1), x[0, :2]),
        lambda x: attention_dense(x.view(1, -1, 3, 2, 1), x[0, :2]),
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_other_operations_have_all_derivatives(name):
    torch.manual_seed(0)
    sparse, dense = OPERATIONS[name]
    x, v = torch.randn(2, 4, 6, dtype=torch.float64)
    F64(torch.func.jvp(sparse, (x,), (v,)), torch.func.jvp(dense, (x,), (v,)))
    F64(torch.func.jacrev(sparse)(x), torch.func.jacrev(dense)(x))
    F64(torch.func.jacfwd(sparse)(x), torch.func.jacfwd(dense)(x))
    samples = torch.randn(3, 4, 6, dtype=torch.float64)
    F64(torch.vmap(sparse)(samples), torch.vmap(dense)(samples))
    jacobian = torch.autograd.functional.jacobian
    F64(jacobian(sparse, x, vectorize=True), jacobian(dense, x))


@pytest.mark.parametrize("name", ["abs_topk", "gelu_abs_topk", "rms_norm_abs_topk"])
def test_second_derivatives_of_transforms(name):
    torch.manual_seed(1)
    sparse, dense = OPERATIONS[name]
    x = torch.randn(2, 6, dtype=torch.float64)
    for order in (torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        F64(order(lambda x: sparse(x).pow(3).sum())(x), order(lambda x: dense(x).pow(3).sum())(x))


def nested_jvp(function, x, v):
    return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (v,))[1], (x,), (v,))


def test_a_jvp_inside_a_jvp_has_the_outer_derivative():
    """PyTorch switches forward mode off while it calls a Function's rule."""
    torch.manual_seed(2)
    layer = sk.SparseLinear(6, 6, fan_in=3, dtype=torch.float64)
    weight = sk.to_dense(layer.weight.detach(), layer.layout)
    x, v = torch.randn(2, 4, 6, dtype=torch.float64)

    def dense_layer(x):
        return torch.nn.functional.linear(x, weight, layer.bias)

    for sparse, dense in (
        (lambda x: layer(layer(x).pow(3)), lambda x: dense_layer(dense_layer(x).pow(3))),
        (lambda x: sk.abs_topk(x.pow(3), 3), lambda x: abs_topk_dense(x.pow(3), 3)),
        (
            lambda x: sk.grad_weight(x, x, layer.layout),
            lambda x: sk.reference.gather(x.t() @ x, layer.layout),
        ),
    ):
        F64(nested_jvp(sparse, x, v), nested_jvp(dense, x, v))


def test_parameters_and_buffers_may_be_arguments_of_a_transform():
    torch.manual_seed(3)
    layer, other = (sk.SparseLinear(6, 4, fan_in=3, dtype=torch.float64) for _ in range(2))
    x = torch.randn(5, 6, dtype=torch.float64)
    state = [dict(other.named_parameters()), dict(other.named_buffers())]

    def loss(parameters, buffers, x):
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).square().sum()

    expected = torch.autograd.grad(other(x).square().sum(), list(other.parameters()))
    F64(tuple(torch.func.grad(loss)(*state, x).values()), expected)
    per_sample = torch.vmap(torch.func.grad(loss), (None, None, 0))(*state, x)
    F64(tuple(grad.sum(0) for grad in per_sample.values()), expected)
    assert layer.layout.indices.equal(layer.indices)


@pytest.mark.parametrize("fan", ["fan_in", "fan_out"])
def test_an_ensemble_maps_over_its_patterns(fan):
    torch.manual_seed(4)
    models = [sk.SparseLinear(6, 4, **{fan: 2}, dtype=torch.float64) for _ in range(3)]
    skeleton = sk.SparseLinear(6, 4, **{fan: 2}, dtype=torch.float64, device="meta")
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 6, dtype=torch.float64)

    def call(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    expected = torch.stack([model(x) for model in models])
    F64(torch.vmap(call, (0, 0, None))(parameters, buffers, x), expected)
    last = {"indices": buffers["indices"].movedim(0, -1)}
    F64(torch.vmap(call, (0, -1, None))(parameters, last, x), expected)


def test_what_a_transform_sees_of_a_layout_does_not_stay():
    layer, other = (sk.SparseLinear(6, 6, fan_in=3) for _ in range(2))
    x = torch.randn(4, 6)
    layer.indices.copy_(other.indices)

    def look(x):
        assert layer.layout.transposed is not None
        return x.sum()

    torch.func.grad(look)(x)
    x.requires_grad_()
    layer(x).sum().backward()
    weight = sk.to_dense(layer.weight.detach(), other.layout)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1))


# Torch looks at the gradient of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_transforms_have_the_derivative_or_are_refused():
    torch._dynamo.reset()
    layer, x = sk.SparseLinear(6, 4, fan_in=3), torch.randn(5, 6)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())
    got = torch.compile(lambda x: gradient(x), backend="eager")(x)
    torch.testing.assert_close(got, gradient(x))
    with pytest.raises(RuntimeError, match="cannot trace derivatives"):
        torch.compile(lambda x: gradient(x), backend="eager", fullgraph=True)(x)


def test_compiled_training_is_no_export(monkeypatch):
    """PyTorch 2.11 answers that it exports whenever it compiles."""
    layer, x = sk.SparseLinear(6, 4, fan_in=3), torch.randn(5, 6)
    layer(x).sum().backward()
    wanted = layer.weight.grad.clone()
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, wanted)
