"""Dense to sparse and back: one matrix, or a whole model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import DTYPES, layouts, seeds, to_dense
from torch import nn

import sparse_kernels as sk


@given(layouts(), st.sampled_from(DTYPES), seeds())
def test_to_dense_from_dense_round_trip(layout, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # Away from zero, so that every kept block beats every dropped one.
    values = torch.rand(layout.values_shape, generator=generator).add(0.5).to(dtype)
    weight = sk.to_dense(values, layout)
    assert weight.dtype == dtype
    assert torch.equal(weight, to_dense(values, layout))
    again, values_again = sk.from_dense(weight, fan_in=layout.fan_in, block=layout.block)
    assert again == layout
    assert torch.equal(values_again, values)


@given(layouts(max_features=60), seeds(), st.booleans())
def test_from_dense_keeps_the_largest_blocks_of_each_row(layout, seed, transposed):
    block_out, block_in = layout.block
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.out_features, layout.in_features)
    weight = torch.randn(shape, generator=generator)
    if transposed:
        weight = weight.t().contiguous().t()
    found, values = sk.from_dense(weight, fan_in=layout.fan_in, block=layout.block)
    blocks = weight.reshape(-1, block_out, layout.block_cols, block_in).transpose(1, 2)
    score = blocks.double().square().sum((2, 3))
    best = score.topk(layout.blocks_per_row, dim=1).indices.sort(dim=1).values
    assert torch.equal(found.indices.long(), best)
    assert torch.equal(values, blocks[torch.arange(len(best))[:, None], best])
    assert values.is_contiguous()


def test_ties_keep_the_lowest_index():
    weight = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 0], [0, 2, -2, 1]])
    layout, _ = sk.from_dense(weight, fan_in=2)
    assert layout.indices.tolist() == [[0, 1], [0, 1], [1, 2]]
    wide = torch.ones(3, 5000)
    layout, _ = sk.from_dense(wide, fan_in=7)
    assert layout.indices.tolist() == [list(range(7))] * 3


def test_magnitudes_too_small_or_large_to_square_still_count():
    for scale in (1e-30, 1e30):
        layout, _ = sk.from_dense(torch.tensor([[1.0, 3, 2, 4]]) * scale, fan_in=2)
        assert layout.indices.tolist() == [[1, 3]]


def test_gradients_flow_through_the_conversions():
    weight = torch.randn(6, 8, requires_grad=True)
    layout, values = sk.from_dense(weight, fan_in=3)
    assert torch.equal(values.detach(), sk.from_dense(weight.detach(), fan_in=3)[1])
    leaf = values.detach().requires_grad_()
    sk.to_dense(leaf, layout).square().sum().backward()
    assert torch.equal(leaf.grad, 2 * leaf.detach())


REFUSED = {
    "list": (lambda: sk.from_dense([[1.0]], fan_in=1), TypeError, ["weight", "Tensor", "list"]),
    "1-d": (lambda: sk.from_dense(torch.ones(4), fan_in=1), ValueError, ["weight", "(4,)"]),
    "3-d": (lambda: sk.from_dense(torch.ones(1, 4, 4), fan_in=1), ValueError, ["weight", "(1, 4"]),
    "int": (
        lambda: sk.from_dense(torch.ones(4, 4).int(), fan_in=1),
        TypeError,
        ["weight", "int32"],
    ),
    "empty": (
        lambda: sk.from_dense(torch.ones(0, 4), fan_in=1),
        ValueError,
        ["0"],
    ),
    "fan_in": (lambda: sk.from_dense(torch.ones(4, 4), fan_in=5), ValueError, ["fan_in", "5", "4"]),
    "fan_in type": (lambda: sk.from_dense(torch.ones(4, 4), fan_in=1.0), TypeError, ["fan_in"]),
    "block": (
        lambda: sk.from_dense(torch.ones(4, 4), fan_in=1, block=(3, 1)),
        ValueError,
        ["block", "3", "4"],
    ),
    "values": (
        lambda: sk.to_dense(torch.ones(4), sk.FanInLayout.random(4, 4, 2)),
        ValueError,
        ["values", "(4, 2, 1, 1)", "(4,)"],
    ),
    "values list": (
        lambda: sk.to_dense([1.0], sk.FanInLayout.random(4, 4, 2)),
        TypeError,
        ["values", "list"],
    ),
    "layout": (lambda: sk.to_dense(torch.ones(4, 2, 1, 1), None), TypeError, ["layout", "None"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_conversions_refuse(name):
    call, kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# ---- models


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).relu()))


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.ModuleDict({"a": Block()})["a"], nn.Linear(16, 8))


def kinds(module):
    return {
        name: type(m).__name__ for name, m in module.named_modules() if "Linear" in repr(type(m))
    }


def test_sparsify_and_densify_a_model_in_place():
    net = model()
    x = torch.randn(5, 16)
    y = net(x)
    assert sk.sparsify_(net, fan_in=16) is net
    assert set(kinds(net).values()) == {"SparseLinear"}
    # Layers of 16 inputs keep all of them; the two `down` layers lose half.
    sparse = net(x)
    assert torch.equal(net[0].up.to_dense().weight, model()[0].up.weight)
    assert (net[0].down.to_dense().weight != 0).sum(1).tolist() == [16] * 16
    assert sk.densify_(net) is net
    assert kinds(net) == kinds(model())
    torch.testing.assert_close(net(x), sparse)
    full = model()
    sk.sparsify_(full, fan_in=16, filter_fn=lambda module, name: module.in_features == 16)
    torch.testing.assert_close(full(x), y)


def test_sparsify_filter_sees_module_and_full_name():
    seen = {}

    def choose(module, name):
        seen[name] = module
        return name.endswith("up")

    net = model()
    original = dict(net.named_modules())
    sk.sparsify_(net, fan_in=4, filter_fn=choose)
    names = ["0.up", "0.down", "1.up", "1.down", "2"]
    assert sorted(seen) == sorted(names)
    for name in names:
        assert seen[name] is original[name]
    assert {name for name, kind in kinds(net).items() if kind == "SparseLinear"} == {"0.up", "1.up"}


def test_a_layer_shared_by_two_places_stays_shared():
    shared = nn.Linear(8, 8)
    net = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(8, 8)})
    sk.sparsify_(net, fan_in=4)
    assert net["a"] is net["b"]
    assert net["a"] is not net["c"]
    assert len(list(net.parameters())) == 4
    sk.densify_(net)
    assert net["a"] is net["b"]


def test_a_model_that_is_itself_a_linear_is_refused():
    """There is no parent to swap it in."""
    with pytest.raises((TypeError, ValueError), match="Linear"):
        sk.sparsify_(nn.Linear(8, 8), fan_in=4)


def test_a_refused_layer_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 2))
    layers = list(net)
    with pytest.raises(ValueError, match="fan_in"):
        sk.sparsify_(net, fan_in=8)  # the last layer has 4 inputs
    assert all(now is before for now, before in zip(net, layers, strict=True))


def test_subclasses_of_linear_are_left_alone():
    """nn.MultiheadAttention reads the weight of its own Linear subclass directly."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    sk.sparsify_(net, fan_in=8)
    assert type(net.linear1) is sk.SparseLinear
    assert type(net.self_attn.out_proj) is not sk.SparseLinear
    net(torch.randn(2, 3, 16)).sum().backward()


def test_hooks_do_not_vanish_silently():
    """Whoever put a hook on a layer must not lose it: carried over or refused."""
    net = nn.Sequential(nn.Linear(8, 8))
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        sk.sparsify_(net, fan_in=4)
    except (TypeError, ValueError):
        return
    net(torch.randn(2, 8))
    assert calls


def test_conversion_leaves_random_state_alone():
    torch.manual_seed(0)
    expected = torch.randn(3)
    net = model()
    torch.manual_seed(0)
    sk.sparsify_(net, fan_in=4)
    sk.densify_(net)
    assert torch.equal(torch.randn(3), expected)


class PlainBlock(torch.nn.Module):
    """A block of GPT-2 as people write it: LayerNorm, fused q k v, GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)
        self.c_fc = torch.nn.Linear(width, 4 * width)
        self.mlp_proj = torch.nn.Linear(4 * width, width)

    def forward(self, x):
        B, T, D = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_proj(torch.nn.functional.gelu(self.c_fc(self.ln_2(x))))


class PlainGPT2(torch.nn.Module):
    """Learned positions, and an unembedding that is tied to the embedding."""

    def __init__(self, vocabulary=50, width=32, context=16):
        super().__init__()
        self.wte = torch.nn.Embedding(vocabulary, width)
        self.wpe = torch.nn.Embedding(context, width)
        self.h = torch.nn.ModuleList(PlainBlock(width, 4) for _ in range(2))
        self.ln_f = torch.nn.LayerNorm(width)
        self.lm_head = torch.nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def test_a_plain_gpt2_becomes_sparse_trains_and_comes_back():
    torch.manual_seed(0)
    gpt = PlainGPT2()
    with torch.no_grad():  # four weights a row, as a pruned model has them
        for module in gpt.h.modules():
            if isinstance(module, torch.nn.Linear):
                kept = module.weight.abs().topk(4, dim=1).indices
                module.weight.mul_(torch.zeros_like(module.weight).scatter_(1, kept, 1.0))
    tokens = torch.randint(50, (3, 16))
    wanted = gpt(tokens)
    sk.sparsify_(gpt, fan_in=4, filter_fn=lambda module, name: name.startswith("h."))
    sparse = {name for name, kind in kinds(gpt).items() if kind == "SparseLinear"}
    inside = ("c_attn", "c_proj", "c_fc", "mlp_proj")
    assert sparse == {f"h.{layer}.{name}" for layer in (0, 1) for name in inside}
    assert gpt.lm_head.weight is gpt.wte.weight
    torch.testing.assert_close(gpt(tokens), wanted, rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = gpt(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    trained = gpt(tokens)
    sk.densify_(gpt)
    assert not sparse & {name for name, kind in kinds(gpt).items() if kind == "SparseLinear"}
    assert all((block.c_fc.weight != 0).sum(1).max() <= 4 for block in gpt.h)
    torch.testing.assert_close(gpt(tokens), trained, rtol=1e-4, atol=1e-4)


# ---- what a replacement would lose, share no longer, or break


def tied_bias(net):
    net[1].bias = net[0].bias


def tied_memory(net):
    net[1].weight = nn.Parameter(net[0].weight.data)


def tied_buffer(net):
    net.register_buffer("view", net[0].weight.detach())


def kept_in_a_list(net):
    net.history = {"first": [net[0]]}


def kept_parameter(net):
    net.history = [net[0].bias]


def own_forward(net):
    net[0].forward = lambda x: x


LOST = {
    "bias of two layers": tied_bias,
    "memory of two layers": tied_memory,
    "memory of a buffer": tied_buffer,
    "module in a list": kept_in_a_list,
    "parameter in a list": kept_parameter,
    "forward of its own": own_forward,
    "forward hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "state dict hook": lambda net: net[0].register_state_dict_post_hook(lambda *_: None),
    "tensor hook": lambda net: net[0].weight.register_hook(lambda grad: grad),
    "bias hook": lambda net: net[0].bias.register_post_accumulate_grad_hook(lambda p: None),
}


@pytest.mark.parametrize("name", LOST)
@pytest.mark.parametrize("direction", ["sparsify", "densify"])
def test_refuses_what_a_replacement_would_lose(name, direction):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if direction == "densify":
        sk.sparsify_(net, fan_in=4)
    LOST[name](net)
    layers = list(net)
    with pytest.raises(ValueError, match=r"hooks|are one tensor|in the attribute 'history'"):
        sk.sparsify_(net, fan_in=4) if direction == "sparsify" else sk.densify_(net)
    assert all(now is before for now, before in zip(net, layers, strict=True))


def test_marks_of_parameters_are_kept_there_and_back():
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].weight.no_decay = True
    sk.sparsify_(net, fan_in=4)
    assert net[0].weight.no_decay
    sk.densify_(net)
    assert net[0].weight.no_decay
    assert not hasattr(net[0].bias, "no_decay")


def test_densify_leaves_subclasses_alone():
    class Lookup(sk.SparseLinear):
        def forward(self, tokens):
            return super().forward(nn.functional.one_hot(tokens, self.in_features).float())

    net = nn.Sequential(Lookup(8, 8, fan_out=2), sk.SparseLinear(8, 8, fan_in=2))
    tokens = torch.arange(5)
    y = net(tokens)
    sk.densify_(net)
    assert [type(layer) for layer in net] == [Lookup, nn.Linear]
    torch.testing.assert_close(net(tokens), y)


@pytest.mark.parametrize("layers", [0, 2], ids=["layer", "stack"])
def test_an_encoder_layer_evaluates_as_it_trains(layers):
    """In eval mode PyTorch hands the weights of `linear1` and `linear2` to a dense kernel."""
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(net, layers) if layers else net
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    sk.sparsify_(net, fan_in=8)
    y = net(x, src_key_padding_mask=padding).detach()
    net.eval()
    with torch.no_grad():
        z = net(x, src_key_padding_mask=padding)
    torch.testing.assert_close(z[~padding], y[~padding])
