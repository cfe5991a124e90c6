"""Hooks: what is recorded is what the plain model computes, and what is changed has its effect."""

import pytest
import torch
from test_model import SMALL, batch, make

import sparse_kernels as sk
from sparse_transformer import hooks, intervene, record
from sparse_transformer.hooks import HookPoint
from sparse_transformer.interventions import Set


@pytest.fixture(scope="module")
def model():
    return make(dtype=torch.float32)


@pytest.fixture(scope="module")
def tokens():
    return batch()[0]


def bare(model):
    points = [module for module in model.modules() if isinstance(module, HookPoint)]
    assert sum(len(point.names) for point in points) == len(hooks.names(model))
    return not any(point.replacements or point.recordings for point in points)


def test_recording_changes_nothing_and_sees_every_place(model, tokens):
    wanted = model(tokens)
    with hooks.recording(model) as seen:
        assert torch.equal(model(tokens), wanted)
    assert list(seen) == hooks.names(model)
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
    with hooks.recording(model) as seen:
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
    with hooks.replacing(model, {name: lambda x: x.clone() for name in hooks.names(model)}):
        torch.testing.assert_close(model(tokens), wanted, rtol=0, atol=0)
    assert bare(model)


@pytest.mark.parametrize("name", hooks.names(make()))
def test_every_place_can_be_replaced(model, tokens, name):
    wanted = model(tokens)
    with hooks.replacing(model, {name: torch.zeros_like}), hooks.recording(model, [name]) as seen:
        changed = model(tokens)
    assert seen[name].abs().max() == 0
    assert (changed - wanted).abs().max() > 1e-3
    assert torch.equal(model(tokens), wanted)


def test_zeroed_sublayers_leave_the_embedding(model, tokens):
    zeroed = {n: torch.zeros_like for n in hooks.names(model) if n.endswith("resid_delta")}
    with hooks.replacing(model, zeroed), hooks.recording(model, ["final_resid"]) as seen:
        model(tokens)
    assert torch.equal(seen["final_resid"], model.embed(tokens))


def test_contexts_nest_in_order_and_recordings_see_the_result(model, tokens):
    with (
        hooks.recording(model, ["0.attn.q"]) as outer,
        hooks.replacing(model, {"0.attn.q": lambda x: x + 1}),
        hooks.replacing(model, {"0.attn.q": lambda x: x * 2}),
    ):
        model(tokens)
    with hooks.recording(model, ["0.attn.q"]) as plain:
        model(tokens)
    torch.testing.assert_close(outer["0.attn.q"], (plain["0.attn.q"] + 1) * 2)
    assert bare(model)


def test_gradients_reach_a_recorded_activation(model, tokens):
    with hooks.recording(model, ["1.mlp.post_act"]) as seen:
        logits = model(tokens)
    (grad,) = torch.autograd.grad(logits.square().sum(), seen["1.mlp.post_act"])
    assert grad.abs().max() > 0


def test_hooks_leave_when_the_block_raises(model, tokens):
    def raises(x):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"), hooks.replacing(model, {"0.mlp.act_in": raises}):
        model(tokens)
    assert bare(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0.attn.qq", r"no hook point '0\.attn\.qq': did you mean 0\.attn\.q"),
        ("7.mlp.post_act", r"no hook point '7\.mlp\.post_act': did you mean"),
        ("xyz", "no hook point 'xyz': there are"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(model, name, message):
    with pytest.raises(ValueError, match=message), hooks.recording(model, ["0.attn.q", name]):
        pass
    with pytest.raises(ValueError, match=message), hooks.replacing(model, {name: torch.zeros_like}):
        pass
    assert bare(model)


def test_an_intervention_must_keep_the_shape(model, tokens):
    wanted = r"'0\.attn\.y' must return shape \(3, 70, 32\), got \(3, 70, 31\)"
    narrow = hooks.replacing(model, {"0.attn.y": lambda x: x[..., 1:]})
    with pytest.raises(ValueError, match=wanted), narrow:
        model(tokens)
    assert bare(model)


def test_one_line_each_from_python(model, tokens):
    wanted = model(tokens)
    seen = record(model, tokens, ["0.mlp.post_act", "1.attn.q"])
    assert list(seen) == ["1.attn.q", "0.mlp.post_act"] or list(seen) == [
        "0.mlp.post_act",
        "1.attn.q",
    ]
    assert not any(tensor.requires_grad for tensor in seen.values())
    with hooks.recording(model) as every:
        model(tokens)
    assert all(torch.equal(seen[name], every[name]) for name in seen)
    for changes in (
        Set("0.mlp.post_act", 0.0),
        [Set("0.mlp.post_act", 0.0)],
        {"0.mlp.post_act": torch.zeros_like},
    ):
        with intervene(model, changes):
            zeroed = model(tokens)
            assert record(model, tokens, ["0.mlp.post_act"])["0.mlp.post_act"].abs().max() == 0
        assert (zeroed - wanted).abs().max() > 1e-3
        assert bare(model)


def test_pytorch_hooks_work_too(model, tokens):
    seen = []
    point = model.get_submodule("blocks.0.mlp.hook_neurons")
    handle = point.register_forward_hook(lambda _, __, output: seen.append(output))
    model(tokens)
    handle.remove()
    assert torch.equal(seen[0], record(model, tokens)["0.mlp.post_act"])
