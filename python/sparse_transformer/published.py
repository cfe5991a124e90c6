"""Folders in which others publish weight-sparse transformers, read into one form: the release's.

    beeg_config.json, final_model.pt                    openai/circuit_sparsity, on GitHub
    config.json, model.safetensors                      openai/circuit-sparsity, on Hugging Face
    config.json, pytorch_model.bin or sparse_model.bin  jacobcd52/sparse_pretrain_public

Only tensors and JSON are read; no code of a folder runs.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_transformer.errors import UserError

RELEASE_CONFIG, RELEASE_WEIGHTS = "beeg_config.json", "final_model.pt"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_PRETRAIN_WEIGHTS = ("pytorch_model.bin", "sparse_model.bin")
# What a download needs of a repository of any of these formats.
FILES = (RELEASE_CONFIG, RELEASE_WEIGHTS, _CONFIG, _WEIGHTS, *_PRETRAIN_WEIGHTS)

# Fields that the configurations of the release carry and its code does not know. They change what a
# forward computes unless they have these values.
_UNKNOWN_TO_RELEASE = {
    "unembed_rank": None,
    "bigram_table_rank": None,
    "mup": False,
    "scale_invariance": False,
    "use_tied_aux_matrix": False,
}
# Fields that no tensor would contradict if they were left out.
_NEEDED = ("block_size", "vocab_size", "n_layer", "n_head", "d_model", "activation_type", "afrac")

_PRETRAIN_MODEL = {
    "n_layer": "n_layer",
    "d_model": "d_model",
    "n_ctx": "block_size",
    "d_head": "d_head",
    "d_mlp": "d_mlp",
    "vocab_size": "vocab_size",
    "use_rms_norm": "rms_norm",
    "tie_embeddings": "tied_unembed",
    "use_bigram_table": "enable_bigram_table",
    "use_attention_sinks": "sink",
    "activation": "activation_type",
    "use_bias": "bias",
}
# Fields without a say in the forward of inference; whether there are positions, the tensors tell.
_PRETRAIN_SILENT = {"use_positional_embeddings", "dropout", "gradient_checkpointing"}
_PRETRAIN_SPARSITY_SILENT = {
    "enable_weight_sparsity",
    "target_l0_fraction",
    "min_weights_per_neuron",
}
_PRETRAIN_PLACES = "attn_in,attn_out,mlp_in,mlp_out,mlp_neuron,attn_v,attn_k,attn_q"
_PRETRAIN_ONLY = {
    "use_flash_attention": True,  # without it the sinks are not used
    "mlp_neuron_pre_activation": False,
    "activation_topk_mode": "per_token",
}
# Causal masks.
_BUFFERS = (".attn.bias", ".attn.causal_mask")


@dataclass(frozen=True)
class Published:
    """A checkpoint in the words of the release.

    Attributes:
        config: fields of the release's `GPTConfig`.
        tensors: by the names of the file.
        config_file, weights_file: their names, for messages.
        spell: from the release's name of a tensor to that of the file.
        strict: every tensor of the file must be used.
        keeps_one: AbsTopK keeps at least one channel.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    config_file: str
    weights_file: str
    spell: Callable[[str], str] = str
    strict: bool = True
    keeps_one: bool = False

    def refuse_unused(self, used: set[str]) -> None:
        """Raises UserError if a tensor has a name that is not in `used`: the model lacks a part."""
        unused = [name for name in self.tensors if name not in used]
        unused = [name for name in unused if not name.endswith(_BUFFERS)]
        if self.strict and unused:
            raise UserError(
                f"{self.weights_file} has {unused[0]}, which {self.config_file} does not ask for: "
                "download both again, or choose another model"
            )


def read(directory: str | os.PathLike[str]) -> Published:
    """Reads a folder of any of the three formats.

    Raises:
        UserError: the folder has none of them; a file of it is missing, damaged or holds more than
            tensors; or a configuration with parts that are not supported.
    """
    folder = Path(directory)
    if (folder / RELEASE_CONFIG).exists() or not (folder / _CONFIG).exists():
        config = _read_json(folder / RELEASE_CONFIG)
        _refuse(config, _UNKNOWN_TO_RELEASE, RELEASE_CONFIG)
        tensors = _read_pickle(folder / RELEASE_WEIGHTS)
        return Published(config, tensors, RELEASE_CONFIG, RELEASE_WEIGHTS, strict=False)
    config = _read_json(folder / _CONFIG)
    if "model_config" in config:
        return _read_pretrain(folder, config)
    if "afrac" not in config and config.get("model_type") != "circuitgpt":
        kind = config.get("model_type", "another program")
        raise UserError(
            f"{folder / _CONFIG} is of {kind}, or its download is not complete: only models of "
            "openai/circuit-sparsity, of sparse_pretrain, and those of sparse_transformer with "
            "their folder step-* can be read"
        )
    lacking = [name for name in _NEEDED if name not in config]
    if lacking:
        raise UserError(f"{folder / _CONFIG} lacks {', '.join(lacking)}: download it again")
    _refuse(config, _UNKNOWN_TO_RELEASE, _CONFIG)
    if "tie_word_embeddings" in config:
        config.setdefault("tied_unembed", config["tie_word_embeddings"])
    tensors = _read_safetensors(folder / _WEIGHTS)
    return Published(config, tensors, _CONFIG, _WEIGHTS, lambda name: f"circuit_model.{name}")


def tokenizer_name(directory: str | os.PathLike[str]) -> str | None:
    """The name on the hub of the tokenizer that the folder asks for and does not hold."""
    if not (path := Path(directory, _CONFIG)).exists():
        return None
    training = _read_json(path).get("training_config")
    name = training.get("tokenizer_name") if isinstance(training, dict) else None
    return name if isinstance(name, str) else None


def _read_pretrain(folder: Path, stored: Mapping[str, Any]) -> Published:
    """`SparseGPT` of sparse_pretrain, `src/model.py` and `src/config.py`."""
    model, sparsity = stored["model_config"], stored.get("sparsity_config") or {}
    if not isinstance(model, dict) or not isinstance(sparsity, dict):
        raise UserError(f"{folder / _CONFIG} does not describe a model: download it again")
    lacking = [name for name in ("n_layer", "d_model", "n_ctx", "vocab_size") if name not in model]
    if lacking:
        raise UserError(
            f"model_config of {folder / _CONFIG} lacks {', '.join(lacking)}: download it again"
        )
    _refuse({**model, **sparsity}, _PRETRAIN_ONLY, _CONFIG)
    known = _PRETRAIN_ONLY.keys() | _PRETRAIN_MODEL.keys() | _PRETRAIN_SILENT
    known |= _PRETRAIN_SPARSITY_SILENT | {
        "enable_activation_sparsity",
        "activation_topk_fraction",
        "activation_sparsity_locations",
    }
    unknown = [n for n in (*model, *sparsity) if n not in known and "anneal" not in n]
    if unknown:
        raise UserError(
            f"{folder / _CONFIG} has {', '.join(unknown)}, which is not known here: choose another "
            "model"
        )
    config: dict[str, Any] = {
        "rms_norm": True,
        "tied_unembed": False,
        "enable_bigram_table": True,
        "sink": True,
        "d_head": 16,
    }
    config |= {theirs: model[ours] for ours, theirs in _PRETRAIN_MODEL.items() if ours in model}
    try:
        config["n_head"] = config["d_model"] // config["d_head"]
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / _CONFIG} does not describe a model ({error}): download it again"
        ) from error
    active = sparsity.get("enable_activation_sparsity", True)
    config["afrac"] = sparsity.get("activation_topk_fraction", 0.25) if active else None
    config["afrac_loctypes"] = sparsity.get("activation_sparsity_locations", _PRETRAIN_PLACES)
    there = [name for name in _PRETRAIN_WEIGHTS if (folder / name).exists()]
    if not there:
        raise UserError(
            f"{folder} has neither {' nor '.join(_PRETRAIN_WEIGHTS)}: download it again"
        )
    tensors = _read_pickle(folder / there[0])
    return Published(config, tensors, _CONFIG, there[0], _spell_pretrain, keeps_one=True)


def _spell_pretrain(name: str) -> str:
    name = name.replace("attn.attn_imp.", "attn.attn_fn.")
    return name.replace("transformer.h.", "blocks.").removeprefix("transformer.")


def _refuse(config: Mapping[str, Any], only: Mapping[str, Any], file: str) -> None:
    """Raises UserError for a field that has another value than the one that is supported."""
    for name, value in only.items():
        if (config.get(name, value) or None) != (value or None):
            raise UserError(
                f"{file} has {name} = {config[name]!r}, and only {value!r} is supported: choose "
                "another model"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with _opening(path):
            stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(stored, dict):
        raise UserError(
            f"{path} must hold a JSON object, got a {type(stored).__name__}: download it again"
        )
    return stored


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with _opening(path):
        file = path.open("rb")
    with file:
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)
        # What torch raises for a file that is cut short depends on where it is cut.
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.PickleError) as error:
            raise UserError(
                f"{path} is damaged or holds more than tensors, and was not read: download it again"
            ) from error
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise UserError(
            f"{path} must hold a state dict of tensors, and does not: download it again"
        )
    return stored


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    # Only this format needs the package.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with _opening(path):
            return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Inside, what keeps `path` from being read becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): "
            f"name a folder with {RELEASE_CONFIG} and {RELEASE_WEIGHTS}, or with {_CONFIG} and "
            f"{_WEIGHTS} or {_PRETRAIN_WEIGHTS[0]}"
        ) from error
