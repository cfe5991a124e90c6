"""nnsight and TransformerLens on a model: with the packages where they are installed."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from test_model import batch, make

from sparse_transformer import UserError, hooks, load_model
from sparse_transformer.hooks import HookPoint

ROOT = Path(__file__).parents[2]


def test_hook_points_are_modules_that_forward_hooks_read_and_replace():
    """What nnsight relies on: each is called once in a forward, with what flows, and returns it."""
    model, tokens = make(dtype=torch.float32), batch(T=9)[0]
    points = [module for module in model.modules() if isinstance(module, HookPoint)]
    calls = []
    handles = [point.register_forward_hook(lambda *call: calls.append(call)) for point in points]
    with hooks.recording(model) as seen:
        model(tokens)
    for handle in handles:
        handle.remove()
    assert [point for point, _, _ in calls] == points
    # q, k and v pass one point together.
    recorded = [value for name, value in seen.items() if not name.endswith((".q", ".k", ".v"))]
    alone = [out for point, _, out in calls if len(point.names) == 1]
    assert all(map(torch.equal, alone, recorded))
    together = [out for point, _, out in calls if len(point.names) == 3]
    assert torch.equal(together[0], torch.stack([seen[f"0.attn.{name}"] for name in "qkv"], 2))
    handle = model.get_submodule("blocks.0.mlp.hook_neurons").register_forward_hook(
        lambda point, args, out: torch.zeros_like(out)
    )
    changed = model(tokens)
    handle.remove()
    with hooks.replacing(model, {"0.mlp.post_act": torch.zeros_like}):
        assert torch.equal(changed, model(tokens))
    assert not torch.equal(changed, model(tokens))


@pytest.fixture(scope="module")
def small():
    return load_model("python-small")


@pytest.fixture(scope="module")
def tokens(small):
    return torch.tensor([small.tokenizer.encode("for item in items").ids])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nnsight_reads_edits_and_differentiates(small, tokens):
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not installed")
    traced = nnsight.NNsight(small)
    with traced.trace(tokens):
        neurons = traced.blocks[0].mlp.hook_neurons.output.save()
    assert torch.equal(neurons, hooks.record(small, tokens)["0.mlp.post_act"])
    with traced.trace(tokens):
        traced.blocks[0].attn.hook_qkv.output[:, :, 2] = 0
        logits = traced.output.save()
    with hooks.replacing(small, {"0.attn.v": torch.zeros_like}):
        assert torch.equal(logits, small(tokens))
    with traced.trace(tokens):
        neurons = traced.blocks[1].mlp.hook_neurons.output
        with traced.output[0, -1, 5].backward():
            slope = neurons.grad.save()
    assert slope.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformer_lens_has_the_usual_names(small, tokens):
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    from sparse_transformer.lens import to_transformer_lens

    bridge = to_transformer_lens(small)
    assert torch.equal(bridge.to_tokens("for item in items"), tokens)
    assert torch.equal(bridge(tokens), small(tokens))
    logits, cache = bridge.run_with_cache("for item in items")
    torch.testing.assert_close(logits, small(tokens))
    seen = hooks.record(small, tokens)
    B, T, H, d = *tokens.shape, small.config.heads, small.config.d_head
    for layer in range(small.config.n_layer):
        same = {
            "ln1.hook_normalized": "attn.act_in",
            **{f"attn.hook_{name}": f"attn.{name}" for name in "qkv"},
            "attn.hook_z": "attn.y",
            "hook_attn_out": "attn.resid_delta",
            "ln2.hook_normalized": "mlp.act_in",
            "mlp.hook_post": "mlp.post_act",
            "hook_mlp_out": "mlp.resid_delta",
        }
        found = {theirs: cache[f"blocks.{layer}.{theirs}"] for theirs in same}
        assert found["attn.hook_q"].shape == (B, T, H, d)
        for theirs, ours in same.items():
            wanted = seen[f"{layer}.{ours}"]
            torch.testing.assert_close(found[theirs].reshape(wanted.shape), wanted)
        before, middle, after = (
            cache[f"blocks.{layer}.hook_resid_{x}"] for x in ("pre", "mid", "post")
        )
        torch.testing.assert_close(middle, before + found["hook_attn_out"])
        torch.testing.assert_close(after, middle + found["hook_mlp_out"])
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        z = torch.einsum("bhts,bshd->bthd", pattern, found["attn.hook_v"])
        torch.testing.assert_close(z, found["attn.hook_z"])
    torch.testing.assert_close(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
    edited = bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0)]
    )
    with hooks.replacing(small, {"1.attn.y": torch.zeros_like}):
        assert torch.equal(edited, small(tokens))
    with pytest.raises(UserError, match="one length"):
        bridge(tokens, attention_mask=tokens * 0)
    # The model itself stays as it was.
    assert not any(point.replacements for point in small.modules() if isinstance(point, HookPoint))


def test_transformer_lens_is_named_where_it_is_missing(monkeypatch):
    for name in ("transformer_lens", "transformer_lens.config"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sparse_transformer.lens", raising=False)
    with pytest.raises(UserError, match="pip install 'transformer-lens"):
        importlib.import_module("sparse_transformer.lens")


def test_the_entry_point_names_what_exists():
    text = (ROOT / "pyproject.toml").read_text()
    group = r'entry-points."transformer_lens.architectures"\]\n(\w+) = "([\w.]+):(\w+)"'
    name, module, attribute = re.search(group, text).groups()
    source = Path(find_spec(module).origin).read_text()
    assert f"class {attribute}(" in source
    assert f'ARCHITECTURE = "{name}"' in source
