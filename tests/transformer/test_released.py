"""The released format: loaded models compute the same, written ones hold the same tensors."""

import dataclasses
import json

import plain
import pytest
import torch
from safetensors.torch import save_file

from sparse_transformer import Transformer, UserError, load_released, record, save_released

BASE = {
    "block_size": 24,
    "vocab_size": 60,
    "n_layer": 2,
    "n_head": 4,
    "d_head": 8,
    "d_model": 32,
    "d_mlp": 80,
    "bias": True,
    "ln_bias": True,
    "rms_norm": True,
    "activation_type": "gelu",
    "afrac": 0.25,
    "afrac_loctypes": "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out",
    "tied_unembed": False,
    "enable_bigram_table": True,
    "learnable_bigram_table": True,
    "sink": True,
    "dropout": 0.0,
    "tokenizer_name": "tinypython_2k",
}
HF, PRETRAIN, BRIDGE = "model.safetensors", "pytorch_model.bin", "sparse_model.bin"
VARIANTS = {
    "sinks": {},
    "no sinks": {"sink": False},
    "concatenated positions": {"d_pos_emb": 8},
    "added positions": {"added": True},
    "tied": {"tied_unembed": True},
    "tied, positions, no sinks": {"tied_unembed": True, "d_pos_emb": 4, "sink": False},
    "no bigram": {"enable_bigram_table": False},
    "logits bias": {"final_logits_bias": True},
    "no bias": {"bias": False},
    "no AbsTopK": {"afrac": None},
    "old name of d_mlp": {"d_mlp": None, "n_mlp": 80},
}


def write(folder, variant, seed=0, **changes):
    """A checkpoint as a release has it; returns its tensors."""
    config = {**BASE, **VARIANTS[variant], **changes}
    added, bias = config.pop("added", False), config.pop("final_logits_bias", False)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def sparse(rows, columns, share=0.1):
        # The largest of the whole matrix, so that rows differ; one row is empty.
        weight = draw(rows, columns)
        weight[3] = 0
        threshold = weight.abs().flatten().quantile(1 - share)
        return weight * (weight.abs() > threshold)

    V, D, P = config["vocab_size"], config["d_model"], config.get("d_pos_emb") or 0
    W, neurons = config["n_head"] * config["d_head"], config["d_mlp"] or config["n_mlp"]
    wide = P or D
    state = {
        "transformer.wte.weight": sparse(V, D, 0.3),
        "transformer.wpe.weight": draw(config["block_size"], wide) * (added or P > 0),
    }
    for layer in range(config["n_layer"]):
        here = f"transformer.h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", 3 * W, D + P),
            ("attn.c_proj", D, W),
            ("mlp.c_fc", neurons, D + P),
            ("mlp.c_proj", D, neurons),
        ):
            state[f"{here}.{name}.weight"] = sparse(rows, columns)
            if config["bias"]:
                state[f"{here}.{name}.bias"] = draw(rows)
        for name in ("ln_1", "ln_2"):
            state[f"{here}.{name}.weight"] = 1 + 0.1 * draw(D)
        if P:
            for name in ("ln_p1", "ln_p2"):
                state[f"{here}.{name}.weight"] = 1 + 0.1 * draw(P)
        if config["sink"]:
            state[f"{here}.attn.attn_imp.sink_logit"] = draw(config["n_head"])
    state["transformer.ln_f.weight"] = 1 + 0.1 * draw(D)
    tied = config["tied_unembed"]
    state["lm_head.weight"] = state["transformer.wte.weight"] if tied else sparse(V, D, 0.3)
    if config["enable_bigram_table"]:
        state["bigram_table"] = draw(V, V)
    state["final_logits_bias"] = draw(V) * bias
    (folder / "beeg_config.json").write_text(json.dumps(config))
    torch.save(state, folder / "final_model.pt")
    return state


def write_copy(folder, variant, **changes):
    """The same as `write`, as it lies on Hugging Face."""
    state = write(folder, variant, **changes)
    config = json.loads((folder / "beeg_config.json").read_text())
    extra = ("afrac_ste", "afrac_ste_only_non_neurons", "afrac_approx", "rtopk", "mup")
    extra = dict.fromkeys((*extra, "enable_fp8_linear", "scale_invariance"), False)
    ranks = dict.fromkeys(("unembed_rank", "bigram_table_rank", "mup_width_multiplier"))
    config |= {"model_type": "circuitgpt", "architectures": ["CircuitGPTForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config | extra | ranks))
    save_file({f"circuit_model.{n}": t.clone() for n, t in state.items()}, folder / HF)
    for name in ("beeg_config.json", "final_model.pt"):
        (folder / name).unlink()


def write_pretrain(folder, variant, *, sparsity=(), model=(), weights=PRETRAIN, **changes):
    """The same as `write`, as sparse_pretrain uploads it."""
    state = write(folder, variant, **changes)
    config = json.loads((folder / "beeg_config.json").read_text())
    del state["final_logits_bias"]
    if not (added := bool(state["transformer.wpe.weight"].any())):
        del state["transformer.wpe.weight"]
    names = ("n_layer", "d_model", "d_head", "d_mlp", "vocab_size", "dropout")
    described = {name: config[name] for name in names} | {
        "n_ctx": config["block_size"],
        "use_rms_norm": True,
        "tie_embeddings": config["tied_unembed"],
        "use_positional_embeddings": added,
        "use_bigram_table": config["enable_bigram_table"],
        "use_attention_sinks": config["sink"],
        "activation": config["activation_type"],
        "use_bias": config["bias"],
    }
    kept = {
        "enable_weight_sparsity": True,
        "target_l0_fraction": 0.1,
        "enable_activation_sparsity": config["afrac"] is not None,
        "activation_topk_fraction": config["afrac"] or 0.25,
    }
    stored = {
        "model_config": described | dict(model),
        "sparsity_config": kept | dict(sparsity),
        "training_config": {"tokenizer_name": "some/tokenizer"},
    }
    (folder / "config.json").write_text(json.dumps(stored))
    spelled = {
        name.replace("transformer.h.", "blocks.")
        .replace("transformer.", "")
        .replace("attn_imp", "attn_fn"): tensor
        for name, tensor in state.items()
    }
    torch.save(spelled, folder / weights)
    for name in ("beeg_config.json", "final_model.pt"):
        (folder / name).unlink()
    return spelled


OURS = {
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "ln_1": "attn.norm",
    "ln_2": "mlp.norm",
    "ln_p1": "attn.position_norm",
    "ln_p2": "mlp.position_norm",
}


def plain_weights(state):
    """The file's tensors under the names of plain.py, in float64."""
    found = {
        "embed.weight": state["transformer.wte.weight"],
        "unembed.weight": state["lm_head.weight"],
        "norm.weight": state["transformer.ln_f.weight"],
        "logits_bias": state["final_logits_bias"],
        "positions": state["transformer.wpe.weight"],
    }
    if "bigram_table" in state:
        found["bigram"] = state["bigram_table"]
    for name, tensor in state.items():
        if not name.startswith("transformer.h."):
            continue
        layer, rest = name.removeprefix("transformer.h.").split(".", 1)
        module, _, kind = rest.rpartition(".")
        ours = f"{OURS[module]}.{kind}" if module in OURS else "attn.sinks"
        found[f"blocks.{layer}.{ours}"] = tensor
    return {name: tensor.double() for name, tensor in found.items()}


@pytest.mark.parametrize("linear", ["sparse", "dense"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_model_has_the_logits_of_the_file(tmp_path, variant, linear):
    state = write(tmp_path, variant)
    model = load_released(tmp_path, linear=linear)
    tokens = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(1))
    # The formula knows nothing of what was left out because it is zero.
    config = dataclasses.replace(model.config, added_positions=not model.config.positions)
    wanted = plain.logits(config, plain_weights(state), tokens)
    got = model(tokens)
    assert got.dtype == torch.float32
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=0, atol=1e-5)
    assert model.config.added_positions == (variant == "added positions")
    assert model.config.logits_bias == (variant == "logits bias")


def test_equal_magnitudes_of_half_precision_weights_are_chosen_as_released(tmp_path, monkeypatch):
    """Among equals the released `torch.topk` decides; the kernel has a rule of its own."""
    # Where nothing is summed before, equal magnitudes are equal in any precision.
    state = write(tmp_path, "sinks", n_layer=1, afrac_loctypes="attn_in")
    # So coarse that many magnitudes are equal.
    state = {name: (tensor * 2).round().bfloat16() / 2 for name, tensor in state.items()}
    torch.save(state, tmp_path / "final_model.pt")
    model = load_released(tmp_path)
    assert model.config.abs_topk == "torch"

    def keep(config, place, x):
        chosen = x.abs().topk(int(0.25 * x.shape[-1]), sorted=False).indices
        return torch.zeros_like(x).scatter(-1, chosen, x.gather(-1, chosen))

    wanted_at = plain.keep
    monkeypatch.setattr(
        plain,
        "keep",
        lambda config, place, x: (keep if place == "attn_in" else wanted_at)(config, place, x),
    )
    tokens = torch.randint(60, (3, 24), generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(model.config, added_positions=True)
    wanted = plain.logits(config, plain_weights(state), tokens)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(model(tokens).double() / scale, wanted / scale, rtol=0, atol=1e-5)
    by_kernel = load_released(tmp_path, abs_topk="kernel")
    assert (by_kernel(tokens).double() - wanted).abs().max() > 0.1 * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_gives_the_same_tensors_back(tmp_path, variant):
    (tmp_path / "in").mkdir()
    state = write(tmp_path / "in", variant)
    model = load_released(tmp_path / "in")
    save_released(model, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "final_model.pt", weights_only=True)
    assert written.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(written[name], tensor), name
    again = load_released(tmp_path / "out")
    tokens = torch.randint(60, (2, 24))
    assert torch.equal(again(tokens), model(tokens))
    assert again.config == model.config


def test_fans_are_those_of_the_fullest_rows_and_columns(tmp_path):
    state = write(tmp_path, "sinks")
    model = load_released(tmp_path)
    fullest = {
        "embed": (state["transformer.wte.weight"] != 0).sum(1).max(),
        "blocks.1.attn.qkv": (state["transformer.h.1.attn.c_attn.weight"] != 0).sum(1).max(),
        "blocks.1.attn.out": (state["transformer.h.1.attn.c_proj.weight"] != 0).sum(0).max(),
        "blocks.0.mlp.down": (state["transformer.h.0.mlp.c_proj.weight"] != 0).sum(0).max(),
        "unembed": (state["lm_head.weight"] != 0).sum(1).max(),
    }
    for name, count in fullest.items():
        layer = model.sparse_layers()[name]
        assert layer.layout.blocks_per_row == model.target_fan(name) == int(count)
    assert model.config.density == pytest.approx(0.1, abs=0.01)


def test_trained_models_of_every_kind_can_be_written(tmp_path):
    tokens = torch.randint(60, (2, 24))
    for linear in ("sparse", "masked_dense", "dense"):
        (tmp_path / linear).mkdir()
        write(tmp_path / linear, "sinks")
        config = dataclasses.replace(load_released(tmp_path / linear).config, fans=None)
        model = Transformer(dataclasses.replace(config, linear=linear))
        save_released(model, tmp_path / linear)
        torch.testing.assert_close(load_released(tmp_path / linear)(tokens), model(tokens))


def other_formats():
    """Names of tests, writers, and what they can express."""
    for variant in ("sinks", "concatenated positions", "tied", "no bias", "logits bias"):
        yield pytest.param(write_copy, variant, {}, id=f"Hugging Face, {variant}")
    for variant in ("sinks", "no sinks", "added positions", "tied", "no bigram", "no AbsTopK"):
        yield pytest.param(write_pretrain, variant, {}, id=f"sparse_pretrain, {variant}")
    yield pytest.param(write_pretrain, "sinks", {"weights": BRIDGE}, id="sparse_pretrain, bridges")


@pytest.mark.parametrize(("writer", "variant", "options"), list(other_formats()))
def test_other_published_formats_hold_the_same_model(tmp_path, writer, variant, options):
    (tmp_path / "release").mkdir()
    (tmp_path / "other").mkdir()
    write(tmp_path / "release", variant)
    writer(tmp_path / "other", variant, **options)
    release, other = load_released(tmp_path / "release"), load_released(tmp_path / "other")
    assert other.config == dataclasses.replace(
        release.config, active_places=other.config.active_places
    )
    assert set(other.config.active_places) == set(release.config.active_places)
    tokens = torch.randint(60, (2, 24))
    assert torch.equal(other(tokens), release(tokens))


def test_sparse_pretrain_keeps_at_least_one_activation(tmp_path):
    write_pretrain(tmp_path, "sinks", afrac=0.01)
    model = load_released(tmp_path)
    seen = record(model, torch.arange(24)[None])
    # A token whose embedding has no weights has nothing to keep.
    assert (seen["0.attn.act_in"] != 0).sum(-1).max() == 1


def test_refusals_of_other_formats(tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message) as caught:
            load_released(tmp_path)
        assert "\n" not in str(caught.value)

    def with_config(**changes):
        stored = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**stored, **changes}))

    write_copy(tmp_path, "sinks")
    data = (tmp_path / HF).read_bytes()
    (tmp_path / HF).write_bytes(data[:-10])
    refused("model.safetensors is damaged .*download it again")
    (tmp_path / HF).unlink()
    refused("cannot read .*model.safetensors")
    (tmp_path / HF).write_bytes(data)
    with_config(sink=False)
    refused(
        r"has circuit_model\.transformer\.h\.0\.attn\.attn_imp\.sink_logit, which .* not ask for"
    )
    with_config(sink=True, n_layer=3)
    refused(r"lacks circuit_model\.transformer\.h\.2\S*, which config.json asks for")
    with_config(n_layer=2, bigram_table_rank=8)
    refused("config.json has bigram_table_rank = 8, and only None is supported")
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["d_model"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    refused("config.json lacks d_model: download it again")
    (tmp_path / HF).unlink()

    for changes, message in (
        ({"sparsity": {"mlp_neuron_pre_activation": True}}, "mlp_neuron_pre_activation = True"),
        ({"sparsity": {"activation_sparsity_locations": "resid_pre"}}, "AbsTopK at resid_pre"),
        ({"sparsity": {"new": 1}}, "has new, which is not known here"),
        ({"model": {"use_flash_attention": False}}, "use_flash_attention = False"),
        ({"model": {"use_rms_norm": False}}, "rms_norm = False"),
        ({"model": {"d_head": 0}}, "does not describe a model"),
    ):
        write_pretrain(tmp_path, "sinks", **changes)
        refused(message)
    write_pretrain(tmp_path, "sinks", sparsity={"activation_topk_anneal_start_fraction": 0.1})
    load_released(tmp_path)
    (tmp_path / PRETRAIN).write_bytes((tmp_path / PRETRAIN).read_bytes()[:-500])
    refused("pytorch_model.bin is damaged")
    (tmp_path / PRETRAIN).unlink()
    refused("has neither pytorch_model.bin nor sparse_model.bin: download it again")
    with_config(model_config={"n_layer": 2})
    refused("model_config of .* lacks d_model, n_ctx, vocab_size")
    with_config(model_config=3)
    refused("does not describe a model")


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_refusals(tmp_path, capsys):
    def refused(message, folder=tmp_path):
        with pytest.raises(UserError, match=message) as caught:
            load_released(folder)
        assert "\n" not in str(caught.value)

    refused("cannot read .*absent", tmp_path / "absent")
    state = write(tmp_path, "sinks")
    torch.save({"x": Harmful()}, tmp_path / "final_model.pt")
    refused("damaged or holds more than tensors")
    assert capsys.readouterr().out == ""
    torch.save([1, 2], tmp_path / "final_model.pt")
    refused("must hold a state dict of tensors")
    torch.save(state, tmp_path / "final_model.pt")
    data = (tmp_path / "final_model.pt").read_bytes()
    (tmp_path / "final_model.pt").write_bytes(data[: len(data) // 2])
    refused("damaged")
    torch.save({n: t for n, t in state.items() if "ln_f" not in n}, tmp_path / "final_model.pt")
    refused(r"lacks transformer\.ln_f\.weight")
    torch.save({**state, "lm_head.weight": torch.zeros(2, 2)}, tmp_path / "final_model.pt")
    refused(r"lm_head\.weight of .* has shape \(2, 2\), and .* asks for \(60, 32\)")
    for value in (torch.inf, torch.nan):
        sick = state["transformer.h.0.mlp.c_fc.weight"].clone()
        sick[1, 2] = value
        torch.save({**state, "transformer.h.0.mlp.c_fc.weight": sick}, tmp_path / "final_model.pt")
        refused(r"transformer\.h\.0\.mlp\.c_fc\.weight of .* not finite")
    for change, message in (
        ({"rms_norm": False}, "rms_norm = False"),
        ({"residual_activation_type": "relu"}, "residual_activation_type"),
        ({"afrac_loctypes": "attn_in,resid_post_mlp"}, "AbsTopK at resid_post_mlp"),
        ({"use_tied_aux_matrix": True}, "use_tied_aux_matrix"),
        ({"n_layer": "two"}, "does not describe a model"),
        ({"n_layer": 2.0}, "n_layer must be an integer"),
        ({"n_head": 0, "d_head": None}, "does not describe a model"),
        ({"block_size": None}, "does not describe a model"),
        ({"sink": "yes"}, "sinks must be True or False"),
        ({"afrac": "all"}, "does not describe a model"),
        ({"afrac_loctypes": None}, "AbsTopK at None"),
        ({"afrac": 0.02}, "keeps none of 32 channels"),
        ({"tied_unembed": True}, "embedding and unembedding"),
    ):
        write(tmp_path, "sinks")
        stored = {**json.loads((tmp_path / "beeg_config.json").read_text()), **change}
        (tmp_path / "beeg_config.json").write_text(json.dumps(stored))
        refused(message)
    (tmp_path / "beeg_config.json").write_text("{")
    refused("is not JSON")
    (tmp_path / "beeg_config.json").write_text("[]")
    refused("must hold a JSON object")
    with pytest.raises(UserError, match="linear must be"):
        load_released(tmp_path, linear="masked_dense")
    write(tmp_path, "sinks")
    model = load_released(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_released(model, tmp_path / "file")
