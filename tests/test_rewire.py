"""A change of topology carries values and optimizer state of survivors; the rest is zero."""

import copy
import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import seeds, to_dense
from torch.nn.utils import prune

import sparse_kernels as sk

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}
every_optimizer = pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
DIRECTIONS = pytest.mark.parametrize("direction", ["fan_in", "fan_out"])
FANS = pytest.mark.parametrize("fan", [6, 3, 1, 9, 12], ids=lambda fan: f"to{fan}")


def trained(direction="fan_in", optimizer_name="adam", block=(1, 1), steps=3, fan=6):
    layer = sk.SparseLinear(18, 12, **{direction: fan}, block=block)
    optimizer = OPTIMIZERS[optimizer_name](layer.parameters())
    for _ in range(steps):
        step(layer, optimizer)
    return layer, optimizer


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.randn(20, 18, dtype=layer.weight.dtype)).square().sum().backward()
    optimizer.step()


def other_layout(layer, fan=None):
    old = layer.layout
    return sk.FanInLayout.random(old.out_features, old.in_features, fan or old.fan_in, old.block)


def masked(tensor, old, new):
    """What `tensor`, over the old layout, must be over the new one, by way of dense matrices."""
    dense = to_dense(tensor, old)
    block_out, block_in = new.block
    blocks = dense.view(new.block_rows, block_out, new.block_cols, block_in).transpose(1, 2)
    return blocks[torch.arange(new.block_rows)[:, None], new.indices.long()]


@FANS
@DIRECTIONS
@every_optimizer
def test_carries_values_and_state(direction, optimizer_name, fan):
    layer, optimizer = trained(direction, optimizer_name)
    weight, old = layer.weight, layer.layout
    values = weight.detach().clone()
    per_weight = {
        key: tensor.clone()
        for key, tensor in optimizer.state[weight].items()
        if torch.is_tensor(tensor) and tensor.shape == weight.shape
    }
    rest = {
        key: tensor.clone() if torch.is_tensor(tensor) else tensor
        for key, tensor in optimizer.state[weight].items()
        if key not in per_weight
    }
    bias_state = {
        k: torch.as_tensor(v).clone()
        for k, v in optimizer.state[layer.bias].items()
        if v is not None
    }
    new = other_layout(layer, fan)
    assert new != old
    sk.rewire_(layer, optimizer, new)

    assert layer.layout == new
    assert (layer.fan_in, layer.fan_out) == ((fan, None) if direction == "fan_in" else (None, fan))
    assert torch.equal(layer.indices, new.indices)
    assert layer.weight is weight
    assert weight.shape == new.values_shape
    assert torch.equal(weight.detach(), masked(values, old, new))
    state = optimizer.state[weight]
    assert set(state) == set(per_weight) | set(rest)
    for key, tensor in per_weight.items():
        assert torch.equal(state[key], masked(tensor, old, new)), key
    for key, value in rest.items():
        if value is None:
            assert state[key] is None
        else:
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key
    for key, value in bias_state.items():
        assert torch.equal(torch.as_tensor(optimizer.state[layer.bias][key]), value)

    # The layer computes with the new pattern at once, and training goes on.
    x = torch.randn(5, 18)
    dense = to_dense(weight.detach(), new)
    dense = dense if direction == "fan_in" else dense.t()
    bias = layer.bias.detach()
    exact = torch.nn.functional.linear(x.double(), dense.double(), bias.double())
    # Of the size of what is added up, which training may have made large.
    size = x.abs() @ dense.abs().t() + bias.abs()
    assert ((layer(x).detach() - exact).abs() <= 1e-6 * size).all()
    step(layer, optimizer)
    assert not torch.equal(layer.weight.detach(), masked(values, old, new))


@given(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 2)]), st.data(), seeds())
def test_survivors_keep_and_newcomers_are_zero(block, data, seed):
    """Against a plain loop over blocks."""
    torch.manual_seed(seed)
    rows, cols = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    fan_in, new_fan_in = (data.draw(st.integers(1, cols)) * block[1] for _ in range(2))
    layer = sk.SparseLinear(cols * block[1], rows * block[0], fan_in=fan_in, block=block)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(7, cols * block[1])).sum().backward()
    optimizer.step()
    old = layer.layout
    values = layer.weight.detach().clone()
    moments = optimizer.state[layer.weight]["exp_avg"].clone()
    new = sk.FanInLayout.random(rows * block[0], cols * block[1], new_fan_in, block)
    sk.rewire_(layer, optimizer, new)
    assert layer.weight.shape == new.values_shape
    for r in range(rows):
        for slot, column in enumerate(new.indices[r].tolist()):
            kept = old.indices[r].tolist()
            for now, then in (
                (layer.weight.detach(), values),
                (optimizer.state[layer.weight]["exp_avg"], moments),
            ):
                if column in kept:
                    assert torch.equal(now[r, slot], then[r, kept.index(column)])
                else:
                    assert torch.equal(now[r, slot], torch.zeros(block))


def test_the_same_layout_changes_nothing():
    layer, optimizer = trained()
    before = [layer.weight.detach().clone(), optimizer.state[layer.weight]["exp_avg"].clone()]
    same = sk.FanInLayout(layer.layout.indices, 18)
    sk.rewire_(layer, optimizer, same)
    assert torch.equal(layer.weight.detach(), before[0])
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], before[1])


@FANS
def test_there_and_back_keeps_the_common_part(fan):
    layer, optimizer = trained()
    old = layer.layout
    values = layer.weight.detach().clone()
    new = other_layout(layer, fan)
    sk.rewire_(layer, optimizer, new)
    sk.rewire_(layer, optimizer, old)
    common = to_dense(torch.ones(new.values_shape), new)
    assert torch.equal(to_dense(layer.weight.detach(), old), to_dense(values, old) * common)


@FANS
def test_before_the_first_step(fan):
    """No optimizer state yet, and no gradient: only the values are carried."""
    layer, optimizer = trained(steps=0)
    values, old = layer.weight.detach().clone(), layer.layout
    new = other_layout(layer, fan)
    sk.rewire_(layer, optimizer, new)
    assert torch.equal(layer.weight.detach(), masked(values, old, new))
    step(layer, optimizer)


@FANS
def test_an_old_gradient_is_not_taken_for_one_of_the_new_pattern(fan):
    layer, optimizer = trained()
    layer(torch.randn(5, 18)).sum().backward()
    gradient, old = layer.weight.grad.clone(), layer.layout
    new = other_layout(layer, fan)
    sk.rewire_(layer, optimizer, new)
    if layer.weight.grad is not None:
        assert torch.equal(layer.weight.grad, masked(gradient, old, new))
    optimizer.step()


@FANS
def test_an_old_graph_does_not_run_backward_over_the_new_pattern(fan):
    """y was computed with the old weights: its backward uses them or fails, nothing in between."""
    layer, optimizer = trained()
    x = torch.randn(5, 18, requires_grad=True)
    y = layer(x)
    expected = torch.ones(5, 12) @ to_dense(layer.weight.detach(), layer.layout)
    sk.rewire_(layer, optimizer, other_layout(layer, fan))
    try:
        (grad,) = torch.autograd.grad(y.sum(), x)
    except RuntimeError:
        return
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("fan", [3, 9])
def test_an_old_graph_does_not_leave_a_gradient_of_the_old_shape(fan):
    """x needs no gradient, so that backward reads no weight that could be seen to have changed."""
    layer, optimizer = trained()
    loss = layer(torch.randn(5, 18)).sum()
    optimizer.zero_grad()
    sk.rewire_(layer, optimizer, other_layout(layer, fan))
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()
    assert layer.weight.grad is None


@FANS
@DIRECTIONS
@pytest.mark.parametrize("optimizer_name", ["adamw-foreach", "adamw-fused"])
def test_training_goes_on_while_an_old_graph_lives(direction, optimizer_name, fan):
    """The usual loop: `loss` holds the last step's graph until the next forward is done."""
    layer, optimizer = trained(direction, optimizer_name)
    seen = []
    layer.weight.register_hook(lambda grad: seen.append(("hook", grad.shape)))
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(("post", p.grad.shape)))
    loss = layer(torch.randn(5, 18)).square().sum()
    loss.backward()
    old_shape = layer.weight.shape
    sk.rewire_(layer, optimizer, other_layout(layer, fan))
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    loss = layer(torch.randn(5, 18)).square().sum()
    loss.backward()
    assert layer.weight.grad.shape == layer.weight.shape == layer.layout.values_shape
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    new_shape = layer.weight.shape
    assert seen == [
        ("hook", old_shape),
        ("post", old_shape),
        ("hook", new_shape),
        ("post", new_shape),
    ]


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_fan_in_every_dtype(direction, dtype):
    layer = sk.SparseLinear(18, 12, **{direction: 6}, dtype=dtype)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    step(layer, optimizer)
    values, old = layer.weight.detach().clone(), layer.layout
    new = other_layout(layer, 9)
    sk.rewire_(layer, optimizer, new)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight.detach(), masked(values, old, new))
    step(layer, optimizer)
    assert torch.isfinite(layer.weight).all()


@DIRECTIONS
def test_state_of_another_fan_loads_into_a_fresh_layer_of_it(direction):
    layer, optimizer = trained(direction)
    sk.rewire_(layer, optimizer, other_layout(layer, 9))
    fresh = sk.SparseLinear(18, 12, **{direction: 9})
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(5, 18)
    assert torch.equal(fresh(x), layer(x))
    assert repr(fresh) == repr(layer)
    with pytest.raises(RuntimeError, match="shape"):
        sk.SparseLinear(18, 12, **{direction: 6}).load_state_dict(layer.state_dict())


def test_in_inference_mode_training_may_follow():
    layer, optimizer = trained()
    with torch.inference_mode():
        sk.rewire_(layer, optimizer, other_layout(layer, 9))
    step(layer, optimizer)
    assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("fan", [6, 9])
def test_a_frozen_weight_stays_frozen(fan):
    layer = sk.SparseLinear(18, 12, fan_in=6).requires_grad_(False)
    sk.rewire_(layer, None, other_layout(layer, fan))
    assert not layer.weight.requires_grad
    layer(torch.randn(5, 18, requires_grad=True)).sum().backward()
    assert layer.weight.grad is None


@FANS
def test_without_an_optimizer(fan):
    layer, _ = trained()
    values, old = layer.weight.detach().clone(), layer.layout
    new = other_layout(layer, fan)
    sk.rewire_(layer, None, new)
    assert torch.equal(layer.weight.detach(), masked(values, old, new))


@FANS
def test_state_dict_of_the_optimizer_still_loads(fan):
    layer, optimizer = trained()
    sk.rewire_(layer, optimizer, other_layout(layer, fan))
    step(layer, optimizer)
    state = optimizer.state_dict()
    again = torch.optim.Adam(layer.parameters(), lr=0.1)
    again.load_state_dict(state)
    step(layer, again)
    assert torch.isfinite(layer.weight).all()


@FANS
def test_other_parameters_of_the_optimizer_are_untouched(fan):
    layer, other = sk.SparseLinear(18, 12, fan_in=6), torch.nn.Linear(18, 12)
    optimizer = torch.optim.Adam([*layer.parameters(), *other.parameters()])
    x = torch.randn(5, 18)
    (layer(x) + other(x)).sum().backward()
    optimizer.step()
    before = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[other.weight].items()}
    sk.rewire_(layer, optimizer, other_layout(layer, fan))
    for key, value in optimizer.state[other.weight].items():
        assert torch.equal(torch.as_tensor(value), before[key])


def unchanged(layer, optimizer, call, words, kind=(TypeError, ValueError)):
    before = [
        layer.weight,
        layer.weight.detach().clone(),
        layer.layout,
        optimizer.state[layer.weight]["exp_avg"].clone(),
    ]
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    assert layer.weight is before[0]
    assert torch.equal(layer.weight.detach(), before[1])
    assert layer.layout == before[2]
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], before[3])


def test_refuses_and_leaves_everything_as_it_was():
    layer, optimizer = trained()
    random = sk.FanInLayout.random
    good = other_layout(layer)
    for call, words in [
        (lambda: sk.rewire_(layer, optimizer, random(12, 17, 6)), ["layout", "18", "17"]),
        (lambda: sk.rewire_(layer, optimizer, random(13, 18, 6)), ["layout", "12", "13"]),
        (lambda: sk.rewire_(layer, optimizer, random(12, 18, 6, (2, 1))), ["block", "(2, 1)"]),
        (lambda: sk.rewire_(layer, optimizer, random(18, 12, 6)), ["layout"]),
        (lambda: sk.rewire_(layer, optimizer, random(13, 18, 5)), ["layout", "12", "13"]),
        (lambda: sk.rewire_(layer, optimizer, random(12, 18, 4, (1, 2))), ["block", "(1, 2)"]),
        (lambda: sk.rewire_(layer, optimizer, good.indices), ["layout", "FanInLayout", "Tensor"]),
        (lambda: sk.rewire_(layer, optimizer, None), ["layout", "FanInLayout"]),
        (lambda: sk.rewire_(torch.nn.Linear(18, 12), optimizer, good), ["layer", "SparseLinear"]),
        (lambda: sk.rewire_(layer, "adam", good), ["optimizer", "str"]),
    ]:
        unchanged(layer, optimizer, call, words)


def test_an_optimizer_of_something_else_is_refused():
    """Its state could not be carried: silence would corrupt the next step."""
    layer, optimizer = trained()
    stranger = torch.optim.Adam(torch.nn.Linear(2, 2).parameters())
    unchanged(
        layer,
        optimizer,
        lambda: sk.rewire_(layer, stranger, other_layout(layer)),
        ["optimizer"],
    )


def test_compiled_with_another_fan():
    layer, optimizer = trained()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 18)
    for fan in (6, 9, 3):
        sk.rewire_(layer, optimizer, other_layout(layer, fan))
        y = compiled(x)
        assert torch.equal(y, layer(x))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- what it cannot carry


def refused(layer, optimizer, words):
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        sk.rewire_(layer, optimizer, other_layout(layer))
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_refuses_a_weight_that_another_layer_shares():
    layer, other = (sk.SparseLinear(18, 12, fan_in=6) for _ in range(2))
    other.weight = layer.weight
    refused(layer, None, "shares")
    copied = copy.deepcopy(torch.nn.ModuleList([layer, other]))
    assert copied[0].weight is copied[1].weight
    refused(copied[0], None, "shares")
    other.weight = torch.nn.Parameter(layer.weight.data)
    refused(layer, None, "shares")
    del other, copied
    gc.collect()
    sk.rewire_(layer, None, other_layout(layer))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_refuses_a_weight_that_is_computed(wrap):
    layer = sk.SparseLinear(18, 12, fan_in=6)
    wrap(layer)
    refused(layer, None, "parametrized or pruned")


def test_refuses_state_that_mixes_weights_or_has_another_shape():
    layer, _ = trained()
    lbfgs = torch.optim.LBFGS(layer.parameters())
    refused(layer, lbfgs, "LBFGS")
    layer, optimizer = trained()
    optimizer.state[layer.weight]["factor"] = torch.ones(12)
    refused(layer, optimizer, r"'factor' is \(12,\)")
    optimizer.state[layer.weight]["factor"] = [torch.ones(12)]
    refused(layer, optimizer, "'factor' is list")


@pytest.mark.parametrize("fan", [4, 8])
def test_carries_the_factors_of_adafactor(fan):
    """They are of the rows and columns inside a block, so each belongs to one block."""
    layer = sk.SparseLinear(16, 12, fan_in=4, block=(3, 2))
    optimizer = torch.optim.Adafactor(layer.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(20, 16)).square().sum().backward()
        optimizer.step()
    old = layer.layout
    before = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    new = sk.FanInLayout.random(12, 16, fan, (3, 2))
    sk.rewire_(layer, optimizer, new)
    assert set(before) >= {"row_var", "col_var"}
    for key in ("row_var", "col_var"):
        carried = optimizer.state[layer.weight][key]
        for r in range(new.block_rows):
            places = {column: f for f, column in enumerate(old.indices[r].tolist())}
            for f, column in enumerate(new.indices[r].tolist()):
                was = before[key][r, places[column]] if column in places else 0
                assert torch.equal(carried[r, f], torch.zeros_like(carried[r, f]) + was)
    layer(torch.randn(20, 16)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(layer.weight).all()
