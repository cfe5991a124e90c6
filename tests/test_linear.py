"""SparseLinear: what it computes, how it starts, and every way to store, copy and load it."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_accurate, to_dense
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.nn.utils import prune

import sparse_kernels as sk

KINDS = {
    "fan_in": {"fan_in": 4},
    "fan_out": {"fan_out": 6},
    "fan_in-block": {"fan_in": 4, "block": (3, 2)},
    "fan_out-block": {"fan_out": 6, "block": (3, 2)},
    "no-bias": {"fan_in": 4, "bias": False},
    "bfloat16": {"fan_out": 6, "dtype": torch.bfloat16},
    "float64": {"fan_in": 4, "dtype": torch.float64},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
K, N = 16, 12


def layer_of(kind):
    layer = sk.SparseLinear(K, N, **KINDS[kind])
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


def dense_weight(layer):
    """(N, K), by the tests' own oracle."""
    dense = to_dense(layer.weight.detach(), layer.layout)
    return dense if layer.fan_out is None else dense.t()


def is_fan_out(kind):
    return "fan_out" in KINDS[kind]


def test_square_layers_differ_by_direction():
    """At K = N nothing in the shapes tells fan-in from fan-out: only the counts do."""
    for _ in range(3):
        reads = sk.SparseLinear(24, 24, fan_in=3).to_dense().weight != 0
        writes = sk.SparseLinear(24, 24, fan_out=3).to_dense().weight != 0
        assert torch.equal(reads.sum(1), torch.full((24,), 3))
        assert torch.equal(writes.sum(0), torch.full((24,), 3))
        assert not torch.equal(reads.sum(0), torch.full((24,), 3))
        assert not torch.equal(writes.sum(1), torch.full((24,), 3))


@every_kind
def test_computes_its_dense_weight(kind):
    layer = layer_of(kind)
    assert layer.in_features == K
    assert layer.out_features == N
    dtype = layer.weight.dtype
    assert dtype == KINDS[kind].get("dtype", torch.float32)
    weight = dense_weight(layer)
    assert weight.shape == (N, K)
    for shape in [(7, K), (K,), (2, 3, K), (0, K)]:
        x = torch.randn(shape).to(dtype)
        bias = None if layer.bias is None else layer.bias.detach()
        linear = torch.nn.functional.linear
        truth = linear(x.double(), weight.double(), None if bias is None else bias.double())
        wide = [None if t is None else t.double().abs() for t in (x, weight, bias)]
        for y in (layer(x).detach(), layer.to_dense()(x).detach()):
            if dtype == torch.float64:
                torch.testing.assert_close(y, truth, rtol=1e-14, atol=1e-14)
            else:
                assert_accurate(y, linear(x, weight, bias), truth, linear(*wide))
    nonzero = weight != 0
    if is_fan_out(kind):
        assert torch.equal(nonzero.sum(0), torch.full((K,), 6))
    else:
        assert torch.equal(nonzero.sum(1), torch.full((N,), 4))


def test_parameters_and_buffers_are_ordinary():
    layer = sk.SparseLinear(K, N, fan_in=4)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert {name for name, _ in layer.named_buffers()} == {"indices"}
    assert set(layer.state_dict()) == {"weight", "bias", "indices"}
    assert type(layer.weight) is torch.nn.Parameter
    assert type(layer.indices) is torch.Tensor
    assert layer.weight.shape == layer.layout.values_shape
    assert layer.weight.numel() == layer.layout.nnz
    assert not layer.indices.is_floating_point()
    assert torch.equal(layer.indices, layer.layout.indices)
    assert sk.SparseLinear(K, N, fan_in=4, bias=False).bias is None
    assert "bias" not in sk.SparseLinear(K, N, fan_in=4, bias=False).state_dict()


@pytest.mark.parametrize("kind", ["fan_in", "fan_in-block"])
@pytest.mark.parametrize("width", [1024, 8192])
def test_output_of_a_new_layer_scales_with_fan_in_not_with_width(kind, width):
    """nn.Linear's own scale (variance 1/3 for unit inputs), at every fan-in and width."""
    torch.manual_seed(0)
    options = {**KINDS[kind], "bias": False}
    if "block" in options:
        options["block"] = (4, 2)
    for fan_in in (4, 64):
        layer = sk.SparseLinear(width, 2048, **{**options, "fan_in": fan_in})
        with torch.no_grad():
            ours = layer(torch.randn(128, width)).var().item()
            theirs = torch.nn.Linear(fan_in, 2048, bias=False)(torch.randn(128, fan_in))
        assert ours == pytest.approx(theirs.var().item(), rel=0.15)
        assert layer.weight.abs().max() <= fan_in**-0.5
        bias = sk.SparseLinear(width, 2048, fan_in=fan_in).bias
        assert bias.abs().max() <= fan_in**-0.5
        assert bias.abs().max() > 0.9 * fan_in**-0.5


def test_output_of_a_new_fan_out_layer_scales_with_its_average_fan_in():
    torch.manual_seed(0)
    # Each of 4096 inputs writes to 8 of 512 outputs: an output reads 64 inputs on average.
    layer = sk.SparseLinear(4096, 512, fan_out=8, bias=False)
    with torch.no_grad():
        assert layer(torch.randn(256, 4096)).var().item() == pytest.approx(1 / 3, rel=0.15)


def test_initialisation_follows_the_seed():
    def made(seed):
        torch.manual_seed(seed)
        return sk.SparseLinear(K, N, fan_in=4)

    for name, tensor in made(3).state_dict().items():
        assert torch.equal(tensor, made(3).state_dict()[name])
    assert not torch.equal(made(3).indices, made(4).indices)
    assert not torch.equal(made(3).weight, made(4).weight)


def test_the_signature_is_that_of_the_constructor():
    """`torch.nn.utils.skip_init` looks for `device` in it, and editors show it."""
    parameters = inspect.signature(sk.SparseLinear).parameters
    assert list(parameters)[:4] == ["in_features", "out_features", "fan_in", "fan_out"]
    layer = torch.nn.utils.skip_init(sk.SparseLinear, K, N, fan_in=4)
    with pytest.raises(RuntimeError, match="no pattern yet"):
        layer(torch.ones(1, K))
    layer.reset_parameters()
    layer(torch.ones(1, K))


@every_kind
def test_repr_says_what_it_is(kind):
    text = repr(layer_of(kind))
    options = KINDS[kind]
    words = [f"in_features={K}", f"out_features={N}"]
    words += [f"{key}={value}" for key, value in options.items() if key in ("fan_in", "fan_out")]
    words += [f"block={options['block']}"] if "block" in options else []
    words += ["bias=False"] if options.get("bias") is False else ["bias=True"]
    for word in words:
        assert word in text


# ---- copies and files


def check_same(one, other):
    """The same function and the same training step."""
    assert one.layout == other.layout
    x = torch.randn(9, K, dtype=one.weight.dtype)
    assert torch.equal(one(x), other(x))
    for layer in (one, other):
        layer.zero_grad()
        layer(x).square().sum().backward()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine.grad, theirs.grad)


def through_file(save, load):
    file = io.BytesIO()
    save(file)
    file.seek(0)
    return load(file)


@every_kind
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies_are_equal_and_independent(kind, used):
    layer = layer_of(kind)
    if used:
        layer(torch.randn(5, K, dtype=layer.weight.dtype)).sum().backward()
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        through_file(
            lambda file: torch.save(layer, file), lambda file: torch.load(file, weights_only=False)
        ),
    ]
    for made in copies:
        check_same(layer, made)
        with torch.no_grad():
            before = layer.weight.clone()
            made.weight.add_(1)
        assert torch.equal(layer.weight, before)
        assert made.indices.data_ptr() != layer.indices.data_ptr()


@every_kind
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_state_dict_round_trip(kind, assign):
    layer, other = layer_of(kind), layer_of(kind)
    assert layer.layout != other.layout
    other(torch.randn(5, K, dtype=other.weight.dtype))  # its old caches must not survive
    state = through_file(
        lambda file: torch.save(layer.state_dict(), file),
        lambda file: torch.load(file, weights_only=True),
    )
    result = other.load_state_dict(state, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    check_same(layer, other)


@every_kind
def test_safetensors_round_trip(kind, tmp_path):
    layer, other = layer_of(kind), layer_of(kind)
    save_file(layer.state_dict(), tmp_path / "state.safetensors")
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    check_same(layer, other)
    third = layer_of(kind)
    save_model(layer, str(tmp_path / "model.safetensors"))
    load_model(third, str(tmp_path / "model.safetensors"))
    check_same(layer, third)


def test_indices_of_other_integer_types_are_accepted():
    """Files may store what they like, as long as it is exact: the module keeps int32."""
    layer, other = layer_of("fan_in"), layer_of("fan_in")
    state = layer.state_dict()
    state["indices"] = state["indices"].long()
    other.load_state_dict(state)
    assert other.indices.dtype == torch.int32
    check_same(layer, other)


def test_optimizer_holds_the_parameter_across_loading():
    layer, other = layer_of("fan_in"), layer_of("fan_in")
    weight = other.weight
    other.load_state_dict(layer.state_dict())
    assert other.weight is weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to_dtype_casts_weights_and_leaves_indices(dtype):
    layer = layer_of("fan_in")
    layout = layer.layout
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.indices.dtype == torch.int32
    assert layer.layout == layout
    x = torch.randn(70, K).to(dtype)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == dtype


def test_half_is_refused_at_the_call_not_computed_wrongly():
    layer = layer_of("fan_in").half()
    with pytest.raises(TypeError, match="float16"):
        layer(torch.randn(3, K).half())


def test_device_moves_keep_pattern_and_cache_usable():
    layer = layer_of("fan_in")
    x = torch.randn(3, K)
    expected = layer(x)
    assert torch.equal(layer.to("cpu")(x), expected)
    assert torch.equal(layer.cpu().float()(x), expected)


def test_meta_device_then_load():
    """Large models are made without memory and filled from a file."""
    source = layer_of("fan_in")
    with torch.device("meta"):
        layer = sk.SparseLinear(K, N, fan_in=4)
    assert layer.weight.is_meta
    layer.load_state_dict(source.state_dict(), assign=True)
    check_same(source, layer)
    with torch.device("meta"):
        layer = sk.SparseLinear(K, N, fan_in=4)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    check_same(source, layer)


def test_module_apply_functions_do_not_break_the_pattern():
    layer = layer_of("fan_in")
    layout = layer.layout
    layer.float().double().float().requires_grad_(False).eval().train()
    layer.share_memory()
    assert layer.layout == layout
    layer(torch.randn(3, K))


# ---- constructors


def dense_problem(draw):
    seed = draw(st.integers(0, 2**32))
    block = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 2)]))
    rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    linear = torch.nn.Linear(cols * block[1], rows * block[0], bias=draw(st.booleans()))
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return linear, block, draw(st.integers(1, cols)), draw(st.integers(1, rows))


@given(st.data())
def test_from_dense_at_full_fan_is_the_same_layer(data):
    linear, block, _, _ = dense_problem(data.draw)
    sizes = {"fan_in": linear.in_features, "fan_out": linear.out_features}
    for direction, size in sizes.items():
        layer = sk.SparseLinear.from_dense(linear, **{direction: size}, block=block)
        again = layer.to_dense()
        assert type(again) is torch.nn.Linear
        assert torch.equal(again.weight, linear.weight)
        assert (again.bias is None) == (linear.bias is None)
        if linear.bias is not None:
            assert torch.equal(again.bias, linear.bias)
            assert again.bias.data_ptr() != linear.bias.data_ptr()


@given(st.data())
def test_from_dense_keeps_the_largest_blocks(data):
    linear, block, per_row, per_column = dense_problem(data.draw)
    weight = linear.weight.detach()
    rows, cols = weight.shape[0] // block[0], weight.shape[1] // block[1]
    blocks = weight.view(rows, block[0], cols, block[1]).transpose(1, 2)
    score = blocks.double().square().sum((2, 3))
    for direction, count, dim, extent in (
        ("fan_in", per_row, 1, block[1]),
        ("fan_out", per_column, 0, block[0]),
    ):
        layer = sk.SparseLinear.from_dense(linear, **{direction: count * extent}, block=block)
        best = score.topk(count, dim=dim).indices
        mask = torch.zeros_like(score).scatter_(dim, best, 1)
        mask = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        assert torch.equal(layer.to_dense().weight, weight * mask)
        assert torch.equal(dense_weight(layer), weight * mask)


def test_from_dense_keeps_dtype_and_training_flags():
    linear = torch.nn.Linear(8, 6).bfloat16().eval().requires_grad_(False)
    layer = sk.SparseLinear.from_dense(linear, fan_in=4)
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    back = layer.to_dense()
    assert back.weight.dtype == torch.bfloat16
    assert not back.weight.requires_grad
    assert not back.training


REFUSED = {
    "neither": ({}, (TypeError, ValueError), ["fan_in", "fan_out"]),
    "both": ({"fan_in": 4, "fan_out": 4}, (TypeError, ValueError), ["fan_in", "fan_out"]),
    "fan_in 0": ({"fan_in": 0}, ValueError, ["fan_in", "0"]),
    "fan_in > K": ({"fan_in": K + 1}, ValueError, ["fan_in", str(K + 1), str(K)]),
    "fan_out > N": ({"fan_out": N + 1}, ValueError, ["fan_out", str(N + 1), str(N)]),
    "fan_out 0": ({"fan_out": 0}, ValueError, ["fan_out", "0"]),
    "fan_in float": ({"fan_in": 4.0}, TypeError, ["fan_in", "4.0"]),
    "fan_out float": ({"fan_out": 4.0}, TypeError, ["fan_out", "4.0"]),
    "fan_in not in blocks": ({"fan_in": 3, "block": (1, 2)}, ValueError, ["fan_in", "3", "2"]),
    "fan_out not in blocks": ({"fan_out": 4, "block": (3, 1)}, ValueError, ["fan_out", "4", "3"]),
    "block_out": (
        {"fan_in": 4, "block": (5, 1)},
        ValueError,
        ["block", "out_features", "5", str(N)],
    ),
    "block_in": ({"fan_in": 5, "block": (1, 5)}, ValueError, ["block", "in_features", "5", str(K)]),
    "block_out of fan_out": (
        {"fan_out": 5, "block": (5, 1)},
        ValueError,
        ["block", "out_features", "5", str(N)],
    ),
    "block_in of fan_out": (
        {"fan_out": 4, "block": (1, 5)},
        ValueError,
        ["block", "in_features", "5", str(K)],
    ),
    "integer dtype": ({"fan_in": 4, "dtype": torch.int32}, TypeError, ["dtype", "int32"]),
    "complex dtype": ({"fan_in": 4, "dtype": torch.cfloat}, TypeError, ["dtype", "complex64"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_constructor_refuses(name):
    options, kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        sk.SparseLinear(K, N, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-4, 4), (4.0, 4), (4, "4"), (True, 4)])
def test_constructor_refuses_sizes(sizes):
    with pytest.raises((TypeError, ValueError), match=r"in_features|out_features"):
        sk.SparseLinear(*sizes, fan_in=1)


# ---- hostile state


def hostile(layer):
    """name -> (state dict, words of the message). `layer` has fan_in 4 of 16, 12 outputs."""

    def changed(**tensors):
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        return {**state, **tensors}

    def edited(row, slot, value, dtype=torch.int32):
        indices = layer.indices.clone().to(dtype)
        indices[row, slot] = value
        return changed(indices=indices)

    indices = layer.indices.clone()
    return {
        "too large": (edited(5, 3, 16), ["indices", "16"]),
        "much too large": (edited(5, 3, 2**31 - 1), ["indices", str(2**31 - 1)]),
        "past int32": (edited(5, 3, 2**40, torch.int64), ["indices", str(2**40)]),
        "wraps to a good index": (
            edited(5, 3, 2**32 + 15, torch.int64),
            ["indices", str(2**32 + 15)],
        ),
        "negative": (edited(11, 0, -1), ["indices", "-1"]),
        "most negative": (edited(0, 0, -(2**31)), ["indices", str(-(2**31))]),
        "unsorted": (changed(indices=indices.flip(1)), ["indices", "increasing"]),
        "duplicate": (edited(7, 1, int(indices[7, 0])), ["indices", "duplicate"]),
        "float": (changed(indices=indices.float()), ["indices", "float32"]),
        "half": (changed(indices=indices.half()), ["indices", "float16"]),
        "bool": (changed(indices=indices.bool()), ["indices", "bool"]),
        "complex": (changed(indices=indices.cfloat()), ["indices", "complex64"]),
        "one row short": (changed(indices=indices[1:]), ["indices", "(11, 4)"]),
        "one row": (changed(indices=indices[:1]), ["indices", "(1, 4)"]),
        "flat": (changed(indices=indices.flatten()), ["indices", "(48,)"]),
        "transposed": (changed(indices=indices.t()), ["indices", "(4, 12)"]),
        "3-d": (changed(indices=indices[None]), ["indices", "(1, 12, 4)"]),
        "empty": (changed(indices=indices[:, :0]), ["indices", "(12, 0)"]),
        "scalar": (changed(indices=torch.tensor(3)), ["indices", "()"]),
        "fewer per row": (changed(indices=indices[:, :3]), ["indices", "(12, 3)"]),
        "weight shape": (changed(weight=layer.weight[:, :3].detach()), ["weight", "(12, 3, 1, 1)"]),
        "weight flat": (changed(weight=layer.weight.detach().flatten()), ["weight", "(48,)"]),
        "bias shape": (changed(bias=torch.ones(13)), ["bias", "13"]),
        "weight int": (changed(weight=layer.weight.detach().int()), ["weight", "int32"]),
        "weight complex": (changed(weight=layer.weight.detach().cfloat()), ["weight", "complex64"]),
    }


HOSTILE = list(hostile(sk.SparseLinear(K, N, fan_in=4)))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "loose"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in-a-model"])
def test_hostile_state_is_refused_and_changes_nothing(name, assign, strict, nested):
    layer = layer_of("fan_in")
    x = torch.randn(9, K)
    y = layer(x)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    objects = (layer.weight, layer.bias, layer.layout)
    state, words = hostile(layer_of("fan_in"))[name]
    module = layer
    if nested:
        module = torch.nn.ModuleDict({"inner": layer})
        state = {f"inner.{key}": tensor for key, tensor in state.items()}
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        module.load_state_dict(state, assign=assign, strict=strict)
    for word in words:
        assert word in str(caught.value)
    after = layer.state_dict()
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
        assert after[key].dtype == tensor.dtype
    assert layer.weight is objects[0]
    assert layer.bias is objects[1]
    assert layer.layout == objects[2]
    assert torch.equal(layer(x), y)


def test_a_missing_pattern_is_missed():
    """Weights without their indices would mean another matrix."""
    layer = layer_of("fan_in")
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state = layer_of("fan_in").state_dict()
    del state["indices"]
    with pytest.raises(RuntimeError, match="indices"):
        layer.load_state_dict(state)
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_state_of_another_fan_in_or_block_is_refused():
    layer = sk.SparseLinear(K, N, fan_in=4)
    for other in (
        sk.SparseLinear(K, N, fan_in=8),
        sk.SparseLinear(K, N, fan_in=4, block=(4, 1)),
        sk.SparseLinear(K, N, fan_in=4, block=(1, 2)),
        sk.SparseLinear(2 * K, N, fan_in=8),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", ["fan_in", "fan_out"])
def test_a_state_of_the_other_orientation_is_refused(kind):
    """A square layer's shapes do not tell it; the metadata that torch saves beside them does."""
    other = {"fan_in": "fan_out", "fan_out": "fan_in"}[kind]
    net, one = (torch.nn.Sequential(sk.SparseLinear(K, K, **{k: 4})) for k in (kind, other))
    before = copy.deepcopy(net.state_dict())
    state = through_file(lambda file: torch.save(one.state_dict(), file), torch.load)
    with pytest.raises(RuntimeError, match=f"0.indices must be .* with {kind}, got .* {other}"):
        net.load_state_dict(state)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    one.load_state_dict(state)


def test_a_dense_state_is_refused_with_words():
    layer = layer_of("fan_in")
    with pytest.raises(RuntimeError, match="indices"):
        layer.load_state_dict(torch.nn.Linear(K, N).state_dict())


def test_indices_written_from_outside_do_not_reach_a_pointer():
    """The buffer is public: whoever edits it in place gets a refusal or the old pattern."""
    layer = layer_of("fan_in")
    x = torch.randn(9, K)
    layer(x)
    layer.indices.fill_(2**30)
    with pytest.raises(ValueError, match="indices"):
        layer(x)


def test_a_good_pattern_written_from_outside_is_used():
    """DistributedDataParallel broadcasts buffers: ranks then share the pattern of the first."""
    layer, other = layer_of("fan_in"), layer_of("fan_in")
    x = torch.randn(9, K)
    layer(x)
    with torch.no_grad():
        for mine, theirs in zip(
            layer.state_dict().values(), other.state_dict().values(), strict=True
        ):
            mine.copy_(theirs)
    check_same(layer, other)


# ---- loading


def test_every_bad_layer_is_named_and_none_is_changed():
    net = torch.nn.Sequential(*(layer_of("fan_in") for _ in range(3)))
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    state = net.state_dict()
    state["0.indices"] = torch.full_like(state["0.indices"], 99)
    state["2.weight"] = state["2.weight"][:3]
    state["2.bias"] = state["2.bias"].int()
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    for word in ("0.indices", "99", "2.weight", "(3, 4, 1, 1)", "2.bias", "int32"):
        assert word in str(caught.value)
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def unexpected(state):
    state["more"] = torch.ones(1)


BROKEN = {
    "meta": lambda state: state.update(weight=state["weight"].to("meta")),
    "sparse": lambda state: state.update(weight=state["weight"].to_sparse()),
    "missing": lambda state: state.pop("bias"),
    "unexpected": unexpected,
    "no tensor": lambda state: state.update(weight=[1.0]),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_load_that_fails_changes_nothing(name, assign):
    layer, other = layer_of("fan_in"), layer_of("fan_in")
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    weight, state = layer.weight, other.state_dict()
    BROKEN[name](state)
    with pytest.raises(RuntimeError):
        layer.load_state_dict(state, assign=assign)
    assert layer.weight is weight
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert torch.equal(layer.layout.indices, layer.indices)


def test_assigning_eight_bit_floats_is_refused_and_copying_them_is_not():
    layer, state = layer_of("fan_in"), layer_of("fan_in").state_dict()
    state["weight"] = state["weight"].to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match="float8_e4m3fn"):
        layer.load_state_dict(state, assign=True)
    layer.load_state_dict(dict(state))
    assert torch.equal(layer.weight, state["weight"].float())


def test_a_failing_load_hook_changes_nothing():
    layer, other = layer_of("fan_in"), layer_of("fan_in")
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}

    def fail(module, state, *_):
        raise KeyError("hook")

    layer.register_load_state_dict_pre_hook(fail)
    with pytest.raises(KeyError, match="hook"):
        layer.load_state_dict(other.state_dict())
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["parametrized", "pruned"],
)
def test_a_layer_whose_weight_is_computed_loads_its_own_state_and_is_not_reset(wrap):
    one, other = layer_of("fan_in"), layer_of("fan_in")
    wrap(one)
    wrap(other)
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, K)
    assert torch.equal(other(x), one(x))
    with pytest.raises(RuntimeError, match="parametrized or pruned"):
        other.reset_parameters()


def test_hooks_may_rename_keys():
    layer, other = layer_of("fan_in"), layer_of("fan_in")

    def rename(module, state, prefix, *_):
        state[prefix + "weight"] = state.pop(prefix + "w")

    layer.register_load_state_dict_pre_hook(rename)
    state = other.state_dict()
    state["w"] = state.pop("weight")
    layer.load_state_dict(state)
    check_same(layer, other)


# ---- small


def test_numpy_integers_are_sizes():
    size = np.int64
    block = (size(3), size(2))
    layer = sk.SparseLinear(size(K), size(N), fan_in=size(4), block=block)
    assert layer(torch.randn(2, K)).shape == (2, N)
    layout = sk.FanInLayout.random(size(N), size(K), size(4), block)
    again = sk.FanInLayout(layout.indices, size(K), size(N), block)
    for value in (layer.in_features, layer.out_features, layer.fan_in, *layer.block):
        assert type(value) is int
    for made in (layout, again):
        for value in (made.in_features, made.out_features, made.fan_in, *made.block):
            assert type(value) is int
    for wrong in (np.bool_(True), np.float64(4), torch.tensor(4)):
        with pytest.raises(TypeError, match="fan_in"):
            sk.SparseLinear(K, N, fan_in=wrong)


def test_no_bias_by_none():
    layer = sk.SparseLinear(K, N, fan_in=4, bias=None)
    assert layer.bias is None
    assert "bias" in layer._parameters  # else forward takes the long way to a product of one token
    with pytest.raises(TypeError, match="bias"):
        sk.SparseLinear(K, N, fan_in=4, bias=0)


def test_more_blocks_than_int32_can_number_are_refused():
    for make in (
        lambda: sk.SparseLinear(2**16, 2**16, fan_in=2**15, device="meta"),
        lambda: sk.FanInLayout.random(2**16, 2**16, 2**15),
        lambda: sk.FanInLayout(torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15), 2**16),
    ):
        with pytest.raises(ValueError, match="2147483648"):
            make()


def test_a_pattern_that_is_a_parameter_may_be_assigned():
    """As in what other libraries load, who make every tensor a Parameter."""
    layer, other = (sk.SparseLinear(8, 6, fan_in=4) for _ in range(2))
    state = {k: torch.nn.Parameter(v, v.is_floating_point()) for k, v in other.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.layout == other.layout
    assert dict(layer.named_buffers()).keys() == {"indices"}
    bad = {**state, "indices": torch.nn.Parameter(state["indices"] + 99, requires_grad=False)}
    with pytest.raises(RuntimeError, match="must lie in"):
        layer.load_state_dict(bad, assign=True)
    assert layer.layout == other.layout
    assert dict(layer.named_buffers()).keys() == {"indices"}
