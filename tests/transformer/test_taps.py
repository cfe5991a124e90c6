"""Taps: what is recorded is what the plain model computes, and what is changed has its effect."""

import pytest
import torch
from test_model import SMALL, batch, make

import sparse_kernels as sk
from sparse_transformer import taps


@pytest.fixture(scope="module")
def model():
    return make(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    return batch()[0]


def bare(model):
    return all(getattr(module, "tap", None) is None for module in model.modules())


def test_recording_changes_nothing_and_sees_every_tap(model, tokens):
    wanted = model(tokens)
    with taps.record(model) as seen:
        assert torch.equal(model(tokens), wanted)
    assert list(seen) == taps.names(model)
    assert bare(model)
    assert torch.equal(model(tokens), wanted)
    B, T, W = *tokens.shape, SMALL.d_model
    widths = {name: 4 * W if name.endswith("post_act") else W for name in seen}
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == {
        name: (B, T, width) for name, width in widths.items()
    }
    for name, tensor in seen.items():
        # Everything but `y` and the stream itself went through AbsTopK.
        most = int((tensor != 0).sum(-1).max())
        whole = name.endswith(".y") or name == "final_resid"
        assert most > W // 4 if whole else most == widths[name] // 4, name


def test_recorded_values_are_the_ones_that_flow(model, tokens):
    with taps.record(model) as seen:
        logits = model(tokens)
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        attn, mlp = f"{layer}.attn", f"{layer}.mlp"
        read = sk.abs_topk(block.attn.norm(x), SMALL.d_model // 4)
        torch.testing.assert_close(seen[f"{attn}.act_in"], read)
        qkv = block.attn.qkv(read).chunk(3, -1)
        for name, part in zip("qkv", qkv, strict=True):
            torch.testing.assert_close(
                seen[f"{attn}.{name}"], sk.abs_topk(part, SMALL.d_model // 4)
            )
        delta = sk.abs_topk(block.attn.out(seen[f"{attn}.y"]), SMALL.d_model // 4)
        torch.testing.assert_close(seen[f"{attn}.resid_delta"], delta)
        x = x + delta
        read = sk.abs_topk(block.mlp.norm(x), SMALL.d_model // 4)
        torch.testing.assert_close(seen[f"{mlp}.act_in"], read)
        neurons = sk.abs_topk(torch.nn.functional.gelu(block.mlp.up(read)), SMALL.d_model)
        torch.testing.assert_close(seen[f"{mlp}.post_act"], neurons)
        x = x + seen[f"{mlp}.resid_delta"]
    torch.testing.assert_close(seen["final_resid"], x)
    x = model.unembed(model.norm(x)) + model.bigram[tokens]
    torch.testing.assert_close(logits, x)


def test_identity_interventions_change_nothing(model, tokens):
    wanted = model(tokens)
    with taps.intervene(model, {name: lambda x: x.clone() for name in taps.names(model)}):
        torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=0)
    assert bare(model)


@pytest.mark.parametrize("name", taps.names(make()))
def test_every_tap_can_be_intervened_on(model, tokens, name):
    wanted = model(tokens)
    with taps.intervene(model, {name: torch.zeros_like}), taps.record(model, [name]) as seen:
        changed = model(tokens)
    assert seen[name].abs().max() == 0
    assert (changed - wanted).abs().max() > 1e-3
    assert torch.equal(model(tokens), wanted)


def test_zeroed_sublayers_leave_the_embedding(model, tokens):
    zeroed = {n: torch.zeros_like for n in taps.names(model) if n.endswith("resid_delta")}
    with taps.intervene(model, zeroed), taps.record(model, ["final_resid"]) as seen:
        model(tokens)
    assert torch.equal(seen["final_resid"], model.embed(tokens))


def test_contexts_nest_in_order_and_recordings_see_the_result(model, tokens):
    with (
        taps.record(model, ["0.attn.q"]) as outer,
        taps.intervene(model, {"0.attn.q": lambda x: x + 1}),
        taps.intervene(model, {"0.attn.q": lambda x: x * 2}),
    ):
        model(tokens)
    with taps.record(model, ["0.attn.q"]) as plain:
        model(tokens)
    torch.testing.assert_close(outer["0.attn.q"], (plain["0.attn.q"] + 1) * 2)
    assert bare(model)


def test_gradients_reach_a_recorded_activation(model, tokens):
    with taps.record(model, ["1.mlp.post_act"]) as seen:
        logits = model(tokens)
    (grad,) = torch.autograd.grad(logits.square().sum(), seen["1.mlp.post_act"])
    assert grad.abs().max() > 0


def test_taps_leave_when_the_block_raises(model, tokens):
    def raises(x):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), taps.intervene(model, {"0.mlp.act_in": raises}):
        model(tokens)
    assert bare(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.attn.qq", r"no tap '0\.attn\.qq': did you mean 0\.attn\.q"),
        ("7.mlp.post_act", r"no tap '7\.mlp\.post_act': did you mean"),
        ("xyz", "no tap 'xyz': the taps are"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(model, name, message):
    with pytest.raises(ValueError, match=message), taps.record(model, ["0.attn.q", name]):
        pass
    with pytest.raises(ValueError, match=message), taps.intervene(model, {name: torch.zeros_like}):
        pass
    assert bare(model)


def test_an_intervention_must_keep_the_shape(model, tokens):
    wanted = r"tap '0\.attn\.y' must return shape \(3, 70, 32\), got \(3, 70, 31\)"
    narrow = taps.intervene(model, {"0.attn.y": lambda x: x[..., 1:]})
    with pytest.raises(ValueError, match=wanted), narrow:
        model(tokens)
    assert bare(model)
