"""The model against a plain dense float64 one, and the properties that hold for all variants."""

import dataclasses
import json
import pickle

import plain
import pytest
import torch

import sparse_kernels as sk
from sparse_transformer import KVCache, ModelConfig, SparseEmbedding, Transformer, functional

SMALL = ModelConfig(
    vocab_size=50, n_layer=2, d_model=32, context=80, d_head=8, density=0.2, embedding_density=0.4
)


def make(config=SMALL, seed=0, dtype=torch.float64, **arguments):
    """A model in which nothing is zero that could be something."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, generator=generator, dtype=dtype, **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", ".sinks", "norm.weight")) or name == "bigram":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.3 * noise.to(dtype)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4  # large enough that every part moves the logits
    return model


def batch(config=SMALL, B=3, T=70, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (B, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].contiguous()


VARIANTS = {
    "published": {},
    "positions beside": {"positions": 8},
    "positions added": {"added_positions": True},
    "no sinks": {"sinks": False},
    "no bigram": {"bigram": False},
    "tied": {"tied": True},
    "no bias": {"bias": False},
    "logits bias": {"logits_bias": True},
    "all active": {"active": None},
    "some places": {"active_places": ("attn_in", "attn_q", "mlp_out")},
    "other heads": {"n_head": 3, "d_mlp": 40},
    "writers by fan-in": {"writers": "fan_in"},
}


@pytest.mark.parametrize("linear", ["sparse", "masked_dense", "dense"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_agree_with_the_plain_model(linear, variant):
    config = dataclasses.replace(SMALL, linear=linear, **VARIANTS[variant])
    model = make(config)
    if config.logits_bias:
        model.logits_bias.normal_()
    tokens, targets = batch()
    weights = plain.dense_weights(model)
    wanted = plain.logits(config, weights, tokens)
    torch.testing.assert_close(model(tokens), wanted, rtol=1e-9, atol=1e-9)

    loss = model.loss(tokens, targets)
    wanted_loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-10, atol=1e-10)
    loss.backward()
    wanted_loss.backward()
    for name, (got, exists) in plain.dense_gradients(model).items():
        want = weights[name].grad
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want * exists, rtol=1e-7, atol=1e-10, msg=name)


def test_the_three_linears_agree_with_equal_weights():
    sparse = make(dtype=torch.float32)
    tokens, targets = batch()
    wanted, loss = sparse(tokens), sparse.loss(tokens, targets)
    state = {name: tensor.float().detach() for name, tensor in plain.dense_weights(sparse).items()}
    for linear in ("masked_dense", "dense"):
        other = Transformer(dataclasses.replace(SMALL, linear=linear))
        other.load_state_dict(state)
        torch.testing.assert_close(other(tokens), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.loss(tokens, targets), loss, rtol=1e-5, atol=1e-5)


def test_abs_topk_by_torch_is_the_same():
    model = make(dtype=torch.float32)
    other = Transformer(dataclasses.replace(SMALL, abs_topk="torch"))
    other = Transformer.from_state(other.config, model.state_dict())
    tokens, _ = batch()
    torch.testing.assert_close(other(tokens), model(tokens))


def test_writers_keep_a_fan_out_or_a_fan_in():
    for writers in ("fan_out", "fan_in"):
        model = Transformer(dataclasses.replace(SMALL, writers=writers))
        for layer in (model.blocks[0].attn.out, model.blocks[0].mlp.down):
            assert layer.transpose == (writers == "fan_out")
            width = layer.out_features if layer.transpose else layer.in_features
            assert layer.layout.fan_in == max(SMALL.min_nonzeros, round(SMALL.density * width))


def test_later_tokens_do_not_matter():
    model = make(dtype=torch.float32)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :40], before[:, :40], rtol=1e-5, atol=1e-5)
    assert (after[:, 40:] - before[:, 40:]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["published", "positions beside", "positions added", "tied"])
@torch.no_grad()
def test_the_cache_gives_what_the_whole_sequence_gives(variant):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    model = make(config)
    tokens, _ = batch(T=config.context)
    cache = KVCache(config, 3, dtype=torch.float64)
    pieces = [model(tokens[:, :9], cache)]
    pieces += [model(tokens[:, place : place + 1], cache) for place in range(9, config.context)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="at most context = 80 in all, got 80 before and 1"):
        model(tokens[:, :1], cache)


def test_same_seed_same_bits():
    runs = []
    for _ in range(2):
        model = make(dtype=torch.float32)
        loss = model.loss(*batch())
        loss.backward()
        runs.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_bfloat16_and_autocast():
    model = make(dtype=torch.float32)
    tokens, targets = batch()
    loss = model.loss(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.loss(tokens, targets)
    mixed.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(mixed, loss, rtol=2e-2, atol=2e-2)
    half = make(dtype=torch.float32).bfloat16()
    half.loss(tokens, targets).backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in half.parameters())
    torch.testing.assert_close(half.loss(tokens, targets), loss, rtol=5e-2, atol=5e-2)


def test_fans_follow_density_multiple_and_state():
    config = ModelConfig(
        vocab_size=40, n_layer=1, d_model=64, context=8, density=1 / 32, embedding_density=1 / 16
    )
    model = Transformer(config)
    wanted = {
        "embed": 4,
        "blocks.0.attn.qkv": 4,  # 64 / 32 is below the least number, 4
        "blocks.0.attn.out": 4,
        "blocks.0.mlp.up": 4,
        "blocks.0.mlp.down": 4,
        "unembed": 4,
    }
    assert {name: model.target_fan(name) for name in model.sparse_layers()} == wanted
    assert {n: la.layout.blocks_per_row for n, la in model.sparse_layers().items()} == wanted
    layers = model.sparse_layers()
    assert isinstance(layers["embed"], SparseEmbedding)
    assert [layers[name].transpose for name in wanted] == [True, False, True, False, True, False]

    wide = Transformer(config, fan_multiple=8)
    assert wide.target_fan("unembed") == 4
    assert {la.layout.blocks_per_row for la in wide.sparse_layers().values()} == {32}
    dense = Transformer(config, fan_multiple=1000)
    assert {la.layout.density for la in dense.sparse_layers().values()} == {1.0}

    again = Transformer.from_state(config, wide.state_dict())
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens), wide(tokens))
    assert again.target_fan("unembed") == 4


@torch.no_grad()
def test_every_kind_starts_with_sums_of_one_size():
    spread = {}
    for linear, multiple in (("dense", 1), ("sparse", 1), ("sparse", 8)):
        config = ModelConfig(d_model=128, n_layer=2, linear=linear)
        generator = torch.Generator().manual_seed(0)
        model = Transformer(config, generator=generator, fan_multiple=multiple)
        x = torch.randn(256, 128, generator=generator)
        up = model.blocks[0].mlp.up(x)
        down = model.blocks[0].mlp.down(torch.nn.functional.gelu(up))
        rows = model.embed(torch.arange(256))
        spread[linear, multiple] = torch.stack([up.std(), down.std(), rows.std()])
    for other in (("sparse", 1), ("sparse", 8)):
        torch.testing.assert_close(spread[other], spread["dense", 1], rtol=0.15, atol=0)


def test_embedding_looks_up_and_collects_repeated_tokens():
    layer = SparseEmbedding(20, 16, fan_out=3, bias=False, dtype=torch.float64)
    tokens = torch.tensor([[1, 5, 1], [19, 0, 1]])
    table = sk.to_dense(layer.weight.detach(), layer.layout).requires_grad_()
    y = layer(tokens)
    torch.testing.assert_close(y, table[tokens])
    grad = torch.randn_like(y)
    y.backward(grad)
    table[tokens].backward(grad)
    exists = sk.to_dense(torch.ones_like(layer.weight), layer.layout)
    torch.testing.assert_close(sk.to_dense(layer.weight.grad, layer.layout), table.grad * exists)
    before = sk.to_dense(layer.weight.detach(), layer.layout)
    new = sk.FanInLayout.random(20, 16, 5)
    sk.rewire_(layer, None, new)
    after = sk.to_dense(layer.weight.detach(), layer.layout)
    assert torch.equal(after, before * sk.to_dense(torch.ones_like(layer.weight), new))


def test_gradients_of_the_pieces():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.rms_norm, (x, weight))
    bigram = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    targets, tokens = torch.randint(5, (6,)), torch.randint(5, (6,))

    def loss(logits, bigram):
        return functional.cross_entropy_(logits.clone().view(6, 5), targets, bigram, tokens)

    assert torch.autograd.gradcheck(
        loss, (x.detach()[:, :3].reshape(6, 5).requires_grad_(), bigram)
    )


def test_loss_scales_and_leaves_logits_alone_without_gradients():
    model = make()
    tokens, targets = batch()
    model.loss(tokens, targets).backward()
    once = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (model.loss(tokens, targets) * 3).backward()
    for one, three in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(three.grad, 3 * one)
    logits = torch.randn(6, 5)
    kept = logits.clone()
    functional.cross_entropy_(logits, torch.zeros(6, dtype=torch.int64), None, torch.arange(6))
    assert torch.equal(logits, kept)


def test_half_precision_gradients_do_not_vanish_before_the_loss_is_scaled():
    # A probability over M is next to nothing in float16; over M, times the scale, it is not.
    M, V, scale = 65536, 4, 65536.0
    logits = torch.randn(M, V).half()
    targets = torch.randint(V, (M,))
    leaf = logits.clone().requires_grad_()
    loss = functional.cross_entropy_(leaf * 1, targets, None, targets)
    (loss * scale).backward()
    wide = logits.double().requires_grad_()
    (torch.nn.functional.cross_entropy(wide, targets) * scale).backward()
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=2e-3, atol=1e-6)


def test_no_table_of_the_size_of_a_matrix_is_ever_made():
    # Sizes of which every dense matrix would be larger than every activation.
    config = ModelConfig(
        vocab_size=512, n_layer=1, d_model=512, context=4, d_head=64, bigram=False,
        density=1 / 128, embedding_density=1 / 128,
    )  # fmt: skip
    model = Transformer(config)
    tokens = torch.randint(512, (1, 4))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        model.loss(tokens, tokens).backward()
    # The smallest matrix has 512 x 512 entries; the largest thing wanted is a block of scores.
    assert 512 <= largest < 512 * 512 / 4


def test_config_survives_json():
    config = dataclasses.replace(SMALL, fans={"embed": 5}, active_places=("attn_in",))
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert ModelConfig.from_dict(stored) == config
    with pytest.raises(ValueError, match="has no field depth"):
        ModelConfig.from_dict({**stored, "depth": 3})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"d_model": 40, "d_head": 16}, "d_head must be a divisor of d_model, got 16"),
        ({"linear": "conv"}, "linear must be sparse or masked_dense or dense, got 'conv'"),
        ({"writers": "both"}, "writers must be fan_out or fan_in, got 'both'"),
        ({"density": 0.0}, "density must be above 0"),
        ({"active": 2.0}, "active must be"),
        ({"active_places": ("resid",)}, "active_places must be of attn_in"),
        ({"min_nonzeros": 0}, "min_nonzeros must be at least 1"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**wrong)


def test_forward_refuses():
    model = make(dtype=torch.float32)
    for tokens, message in (
        (torch.zeros(3, dtype=torch.int64), "tokens must be int64"),
        (torch.zeros(1, 3), "tokens must be int64"),
        (torch.zeros(1, 81, dtype=torch.int64), "at most context = 80"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens)
    with pytest.raises(ValueError, match="targets must have the shape of tokens"):
        model.loss(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.slow
def test_compiles_to_one_graph():
    model = make(dtype=torch.float32)
    tokens, targets = batch(T=66)
    wanted = model.loss(tokens, targets)
    wanted.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, targets)
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_loss_on_kept_logits_has_the_right_gradient():
    """`loss` overwrites its logits; a hook on `unembed` gets a copy."""
    model = make()
    tokens, targets = batch()
    kept = []
    handle = model.unembed.register_forward_hook(lambda _, __, out: kept.append(out))
    (model.loss(tokens, targets) + kept[0].logsumexp(-1).square().mean()).backward()
    got = model.unembed.weight.grad.clone()
    handle.remove()
    model.zero_grad()
    logits = model(tokens)
    own = logits - torch.nn.functional.embedding(tokens, model.bigram)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (loss + own.logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(got, model.unembed.weight.grad, rtol=1e-9, atol=1e-12)


def test_logits_that_are_overwritten_cannot_be_used_again():
    logits = torch.randn(4, 5, requires_grad=True) * 1.0
    kept = logits.square().sum()
    loss = functional.cross_entropy_(logits, torch.arange(4), None, torch.arange(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + kept).backward()


@pytest.mark.parametrize("linear", ["sparse", "masked_dense", "dense"])
@pytest.mark.parametrize("token", [-1, SMALL.vocab_size])
def test_a_token_that_does_not_exist_is_refused(linear, token):
    model = make(dataclasses.replace(SMALL, linear=linear, bigram=False))
    tokens = torch.tensor([[1, 2, token]])
    with pytest.raises(IndexError, match="out of range"):
        model(tokens)
    with pytest.raises(IndexError, match="out of range"):
        model.loss(tokens, tokens)


def test_no_tokens_give_no_logits_and_no_loss():
    tokens = torch.zeros(0, 8, dtype=torch.int64)
    assert make()(tokens).shape == (0, 8, SMALL.vocab_size)
    for empty in (tokens, tokens.view(2, 0)):
        with pytest.raises(ValueError, match="a loss needs at least one token"):
            make().loss(empty, empty)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("abs_topk", ["kernel", "torch"])
def test_a_model_can_be_pickled(activation, abs_topk):
    model = make(dataclasses.replace(SMALL, activation=activation, abs_topk=abs_topk))
    tokens, _ = batch()
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens), model(tokens))
