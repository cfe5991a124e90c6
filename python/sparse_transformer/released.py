"""Checkpoints that others have published, and writing of the authors' format.

Their weights are dense tensors with zeros, whose rows hold varying numbers of nonzeros, since the
published top-k is global. Here every row of a reading matrix (every column of a writing one) gets
the fan of the fullest one; what a fuller fan holds beyond its nonzeros is zeros. The model computes
the same, to float32 rounding.

The formats are those of the public repositories openai/circuit_sparsity, `inference/gpt.py`, and
jacobcd52/sparse_pretrain_public, `src/model.py`.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sparse_kernels as sk
from sparse_transformer.config import PLACES, ModelConfig
from sparse_transformer.errors import UserError, writing
from sparse_transformer.files import replacing
from sparse_transformer.model import Transformer, dense_weight
from sparse_transformer.published import RELEASE_CONFIG, RELEASE_WEIGHTS, Published, read

# Ours, theirs, and the released dataclass's default, which a file may leave out. Other fields of
# the file do not change what a forward computes.
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("context", "block_size", 1024),
    ("vocab_size", "vocab_size", 50304),
    ("n_layer", "n_layer", 12),
    ("n_head", "n_head", 12),
    ("d_head", "d_head", None),
    ("d_model", "d_model", 768),
    ("d_mlp", "d_mlp", None),
    ("bias", "bias", True),
    ("activation", "activation_type", "gelu"),
    ("active", "afrac", None),
    ("active_places", "afrac_loctypes", "attn_in,attn_out,mlp_in,mlp_out"),
    ("tied", "tied_unembed", True),
    ("bigram", "enable_bigram_table", False),
    ("positions", "d_pos_emb", None),
    ("sinks", "sink", False),
)
_DEFAULTS = {theirs: default for _, theirs, default in _FIELDS}
_DEFAULTS |= {"rms_norm": False, "residual_activation_type": "identity"}


def load_released(
    directory: str | os.PathLike[str],
    *,
    linear: Literal["sparse", "dense"] = "sparse",
    abs_topk: Literal["kernel", "torch"] | None = None,
) -> Transformer:
    """Reads a published checkpoint into a model with the same logits, to float32 rounding.

    Args:
        directory: holds `beeg_config.json` and `final_model.pt`, the authors' release; or
            `config.json` and `model.safetensors`, its copy on Hugging Face; or `config.json` and
            `pytorch_model.bin` (`sparse_model.bin`), which sparse_pretrain writes. No code of these
            files runs: pickles are read by `torch.load(weights_only=True)`.
        linear: "sparse", or "dense" for a model that keeps the zeros.
        abs_topk: "kernel", or "torch", which of equal magnitudes keeps those that the released code
            keeps. By default the kernel for float32 weights; those of half precision have many
            equal ones.

    Returns:
        The model in float32 on the CPU; `model.config.fans` has the fans that were found.

    Raises:
        UserError: a file that is missing or not of these formats, a weight that is not finite, or a
            model with parts that `Transformer` has not (LayerNorm, a rectified or sparsified
            residual stream, an AbsTopK before the activation or one that keeps nothing).
    """
    if linear not in ("sparse", "dense"):
        raise UserError(f'linear must be "sparse" or "dense" to load a release, got {linear!r}')
    stored = read(directory)
    config = _config(stored, linear)
    dense = _rename(stored, config)
    if abs_topk is None:
        dtypes = {tensor.dtype for tensor in stored.tensors.values()}
        halves = bool(dtypes & {torch.float16, torch.bfloat16})
        abs_topk = "torch" if halves else "kernel"
    config = replace(
        config,
        abs_topk=abs_topk,
        added_positions="positions" in dense and not config.positions,
        logits_bias="logits_bias" in dense,
    )
    if linear == "dense":
        model = Transformer(config)
        model.load_state_dict(dense)
        return model
    state: dict[str, Tensor] = {}
    fans: dict[str, int] = {}
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        if layer == name or "norm" in layer.rsplit(".", 1)[-1]:
            state[name] = tensor
            continue
        # Rows of W hold a fan-in, rows of W^T a fan-out; the table of the embedding is W^T.
        matrix = tensor.t() if layer.endswith((".out", ".down")) else tensor
        fans[layer] = max(1, int((matrix != 0).sum(1).max()))
        layout, values = sk.from_dense(matrix.contiguous(), fans[layer])
        state[name], state[f"{layer}.indices"] = values, layout.indices
    nonzeros = sum(int((t != 0).sum()) for n, t in dense.items() if _is_block_matrix(n))
    entries = sum(t.numel() for n, t in dense.items() if _is_block_matrix(n))
    embeddings = [dense[n] for n in ("embed.weight", "unembed.weight") if n in dense]
    config = replace(
        config,
        fans=fans,
        density=max(nonzeros, 1) / entries,
        embedding_density=max(sum(int((t != 0).sum()) for t in embeddings), 1)
        / sum(t.numel() for t in embeddings),
    )
    return Transformer.from_state(config, state)


def save_released(model: Transformer, directory: str | os.PathLike[str]) -> None:
    """Writes `model` in the released format: dense tensors with zeros, in float32.

    Reading a released checkpoint and writing it again gives the same tensors, bit for bit.

    Args:
        model: of any `linear`.
        directory: is made if need be; its `beeg_config.json` and `final_model.pt` are replaced.

    Raises:
        UserError: a model that the format cannot express (`gelu_tanh`), or a directory that cannot
            be written.
    """
    config = model.config
    if config.activation == "gelu_tanh":
        raise UserError(
            "the released format has no tanh GELU: only models with activation gelu or relu can "
            "be written in it"
        )
    weights = {_released_name(name): tensor for name, tensor in _dense_state(model).items()}
    if "transformer.wpe.weight" not in weights:
        # The released forward adds this table unless it is concatenated.
        weights["transformer.wpe.weight"] = torch.zeros(config.context, config.d_model)
    if config.tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights.setdefault("final_logits_bias", torch.zeros(config.vocab_size))
    folder = Path(directory)
    with writing(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / RELEASE_WEIGHTS) as beside:
            torch.save(weights, beside)
        with replacing(folder / RELEASE_CONFIG) as beside:
            beside.write_text(json.dumps(_released_config(config), indent=2) + "\n")


def _config(source: Published, linear: Literal["sparse", "dense"]) -> ModelConfig:
    file = source.config_file
    stored = {**_DEFAULTS, **source.config}
    if "n_mlp" in stored:
        stored["d_mlp"] = stored["n_mlp"]
    for name, needed in (("rms_norm", True), ("residual_activation_type", "identity")):
        if stored[name] != needed:
            raise UserError(
                f"{file} has {name} = {stored[name]!r}, and only {needed!r} is supported: "
                "choose another model"
            )
    places = tuple(place for place in str(stored["afrac_loctypes"]).split(",") if place)
    unknown = [place for place in places if place not in PLACES]
    if stored["afrac"] is not None and unknown:
        raise UserError(
            f"{file} has AbsTopK at {', '.join(unknown)}, and only {', '.join(PLACES)} are "
            "supported: choose another model"
        )
    try:
        given = {ours: stored[theirs] for ours, theirs, _ in _FIELDS}
        given["d_head"] = given["d_head"] or given["d_model"] // given["n_head"]
        given["active_places"] = tuple(place for place in places if place in PLACES)
        given["positions"] = given["positions"] or 0
        config = ModelConfig(linear=linear, **given)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} does not describe a model ({error}): download it again") from error
    width = min(config.d_model, config.heads * config.d_head, config.neurons)
    least = None if source.keeps_one or not config.active_places else config.active
    if least is not None and int(least * width) == 0:
        raise UserError(
            f"{file} has an AbsTopK that keeps none of {width} channels (afrac {least:g}), which "
            "is not supported: choose another model"
        )
    return config


def _released_config(config: ModelConfig) -> dict[str, Any]:
    stored = {theirs: getattr(config, ours) for ours, theirs, _ in _FIELDS}
    return stored | {
        "n_head": config.heads,
        "d_mlp": config.neurons,
        "ln_bias": False,
        "rms_norm": True,
        "afrac_loctypes": ",".join(config.active_places),
        "learnable_bigram_table": config.bigram,
        "d_pos_emb": config.positions or None,
    }


# Ours to theirs, inside a block and outside.
_IN_BLOCK = {
    "attn.norm": "ln_1",
    "mlp.norm": "ln_2",
    "attn.position_norm": "ln_p1",
    "mlp.position_norm": "ln_p2",
    "attn.qkv": "attn.c_attn",
    "attn.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_OUTSIDE = {
    "embed.weight": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "unembed.weight": "lm_head.weight",
    "bigram": "bigram_table",
    "logits_bias": "final_logits_bias",
}


def _released_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    if rest == "attn.sinks":
        return f"transformer.h.{layer}.attn.attn_imp.sink_logit"
    module, _, kind = rest.rpartition(".")
    return f"transformer.h.{layer}.{_IN_BLOCK[module]}.{kind}"


def _is_block_matrix(name: str) -> bool:
    return name.endswith((".qkv.weight", ".out.weight", ".up.weight", ".down.weight"))


def _rename(source: Published, config: ModelConfig) -> dict[str, Tensor]:
    """The dense state of our model, in float32; parts that are zero or not used are left out."""
    stored, weights = source.tensors, source.weights_file
    tables = [source.spell(name) for name in ("transformer.wte.weight", "lm_head.weight")]
    ends = [stored[name] for name in tables if name in stored]
    if config.tied and len(ends) == 2 and not torch.equal(*ends):
        raise UserError(
            f"{source.config_file} ties embedding and unembedding, and those of {weights} differ: "
            "download both again"
        )
    probe = replace(config, linear="dense", logits_bias=True, added_positions=True)
    if config.positions:
        probe = replace(probe, added_positions=False)
    with torch.device("meta"):
        wanted = Transformer(probe).state_dict()
    # Zero where a release leaves them out.
    optional = {"logits_bias"} | (set() if config.positions else {"positions"})
    found: dict[str, Tensor] = {}
    for name, like in wanted.items():
        theirs = source.spell(_released_name(name))
        if theirs not in stored and config.tied and name == "embed.weight":
            theirs = tables[1]
        if theirs in stored:
            tensor = stored[theirs].to(torch.float32)
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{theirs} of {weights} has values that are not finite: download it again"
                )
            if name in optional and not bool((tensor != 0).any()):
                continue
            if tensor.shape != like.shape:
                raise UserError(
                    f"{theirs} of {weights} has shape {tuple(tensor.shape)}, and "
                    f"{source.config_file} asks for {tuple(like.shape)}: download both again"
                )
            found[name] = tensor
        elif name not in optional:
            raise UserError(
                f"{weights} lacks {theirs}, which {source.config_file} asks for: "
                "download both again"
            )
    source.refuse_unused({source.spell(_released_name(name)) for name in wanted} | set(tables))
    return found


def _dense_state(model: Transformer) -> dict[str, Tensor]:
    """The state dict with every sparse layer as its dense matrix, in float32 on the CPU."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, layer in model.sparse_layers().items():
        del state[f"{name}.indices"]
        state[f"{name}.weight"] = dense_weight(layer, layer.weight.detach())
    return {
        name: tensor.to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in state.items()
    }
