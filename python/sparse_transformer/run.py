"""What a training run left in its folder: a model and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparse_transformer import data as corpora
from sparse_transformer.errors import UserError
from sparse_transformer.files import write_atomically
from sparse_transformer.model import Transformer, count_weights
from sparse_transformer.program import printable
from sparse_transformer.tokenizer import load_tokenizer
from sparse_transformer.train import checkpoint as checkpoints

_SAMPLE, _SAMPLE_ROWS = "sample.safetensors", 256


def load_run(
    checkpoint: str | os.PathLike[str], step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model of a run, and its tokenizer; arguments and errors are those of `load_model`."""
    folder = checkpoints.find(checkpoint)
    model = load_weights(folder, step, device)
    return model, give_tokenizer(model, checkpoints.tokenizer_of(folder))


def load_weights(
    folder: Path, step: int | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """The model of `load_run` without a tokenizer."""
    return checkpoints.load_weights(folder, step, device_of(device)).eval()


def device_of(name: torch.device | str) -> torch.device:
    """The device of that name; a UserError if there is none."""
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
        torch.Generator(place)
    # A build without CUDA says so by an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {str(name)!r}: use --device cpu") from error
    if place.type == "meta":
        raise UserError("the device meta computes nothing: use --device cpu")
    return place


def give_tokenizer(model: Transformer, path: Path) -> Tokenizer:
    """Sets `model.tokenizer` to the one in `path` and returns it.

    Raises:
        UserError: it is missing or does not belong to the model.
    """
    tokenizer = load_tokenizer(path)
    size, tokens = tokenizer.get_vocab_size(), model.config.vocab_size
    # Those of others may have gaps.
    if size > tokens or tokenizer.id_to_token(tokens - 1) is None:
        raise UserError(
            f"the tokenizer has {size} tokens and the model {tokens}: copy the tokenizer.json of "
            "its run there"
        )
    model.tokenizer = tokenizer
    return tokenizer


def load_model(
    path_or_name: str | os.PathLike[str],
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a training run, in evaluation mode; its tokenizer is `model.tokenizer`.

    Args:
        path_or_name: the folder of the run, or of one checkpoint in it; or the name of a model that
            comes with the package. A folder of that name goes first.
        step: the checkpoint of this step, by default the newest.
        device: where the model goes.

    Raises:
        UserError: no such device, a checkpoint that cannot be read, or a tokenizer that is missing
            or does not belong to the model.
    """
    return load_run(path_or_name, step, device)[0]


def export_model(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    data: Sequence[str | os.PathLike[str]] = (),
) -> int:
    """Writes a model, without the state of its training, into a folder that `load_model` reads.

    The bigram table is stored in float16, indices in int16 where they fit; everything else as it
    is. With it go a model card, a sample of the corpus, from which circuits take their means and
    snippets, and the last validation.
    Paths of the machine that trained it are left out.

    Args:
        checkpoint: as for `load_run`.
        folder: must be new or empty.
        step: the checkpoint of this step, by default the newest.
        data: see `corpus_sample`.

    Returns:
        The size of all files in bytes.

    Raises:
        UserError: as `load_run` and `corpus_sample`; or a folder that is not empty or cannot be
            written, or a bigram table with values above 65504.
    """
    model = load_model(checkpoint, step=step)  # which refuses what is damaged
    point = checkpoints.load(checkpoint, step, prefix="model.")
    out = Path(folder)
    if not _is_new(out):
        raise UserError(f"{out} is not empty: choose another --out")
    rows = corpus_sample(checkpoint, model, data=data)
    settings = point.meta["settings"]
    settings.get("train", {}).update(data=[], cache_dir=None, start_from=None)
    tensors = {name: _smallest(name, tensor) for name, tensor in point.tensors.items()}
    _write(out, point.step, tensors, settings, model, model_card(model, out.name))
    metrics = checkpoints.tokenizer_of(checkpoints.find(checkpoint)).with_name("metrics.jsonl")
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    if measured := [line for line in lines if '"val_loss"' in line]:
        write_atomically(out / "metrics.jsonl", measured[-1] + "\n")
    # Ids are below 65536, and so are those of uint16 bit by bit.
    save_file({"tokens": rows.to(torch.uint16)}, out / _SAMPLE)
    # safetensors makes files that nobody else can read.
    (out / _SAMPLE).chmod((out / "config.json").stat().st_mode)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def save_model(model: Transformer, folder: str | os.PathLike[str], card: str | None = None) -> None:
    """See `Transformer.save_pretrained`."""
    out = Path(folder)
    if not _is_new(out):
        raise UserError(f"{out} is not empty: choose another folder")
    state = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        raise UserError("a model in float64 would be read in float32: convert it by model.float()")
    tensors = {name: _smallest(name, tensor, exactly=True) for name, tensor in state.items()}
    settings = {"preset": "none", "model": asdict(model.config)}
    _write(out, 0, tensors, settings, model, card or model_card(model, out.name))


def model_card(model: Transformer, name: str) -> str:
    """A README.md for the hub: what the model is, and how it is loaded."""
    config = model.config
    sparse = model.sparse_layers().values()
    dense = sum(layer.in_features * layer.out_features for layer in sparse) or sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    )
    return f"""---
library_name: sparse-kernels
pipeline_tag: text-generation
tags:
- weight-sparse
- interpretability
---
# {name}

A weight-sparse transformer ([Gao et al. 2025](https://arxiv.org/abs/2511.13653)).

| | |
|---|---|
| layers, width | {config.n_layer}, {config.d_model} |
| context, vocabulary | {config.context}, {config.vocab_size} tokens |
| weights of its matrices | {count_weights(model):,} of {dense:,} in a dense model |

```python
from sparse_transformer import Transformer, generate

model = Transformer.from_pretrained("{name}")
generate(model, "def main(")
```
"""


def corpus_sample(
    checkpoint: str | os.PathLike[str],
    model: Transformer,
    *,
    data: Sequence[str | os.PathLike[str]] = (),
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Windows of the corpus of a model, int64 `(rows, context)`.

    They are those that an exported model has in its folder; else evenly spaced ones of the files
    that it was trained on, in the tokens of its tokenizer.

    Args:
        data: take windows of these files and folders instead.
        cache_dir: as for `data.prepare`.

    Raises:
        UserError: a sample that is damaged; or what `data.prepare` refuses.
    """
    folder = checkpoints.find(checkpoint)
    stored = checkpoints.tokenizer_of(folder).with_name(_SAMPLE)
    context, vocab = model.config.context, model.config.vocab_size
    if not data and stored.exists():
        try:
            rows = load_file(stored)["tokens"].long()
            if rows.shape[1] != context or not 0 <= int(rows.min()) <= int(rows.max()) < vocab:
                raise ValueError("it is of another model")
        except (OSError, SafetensorError, LookupError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the sample {stored} cannot be read ({error}): give files with --data"
            ) from error
        return rows
    train = checkpoints.load(folder, prefix="nothing").meta["settings"].get("train", {})
    corpus = corpora.prepare(
        list(data) or train.get("data") or None,
        vocab_size=vocab,
        cache_dir=cache_dir,
    )
    assert model.tokenizer is not None
    return corpora.sample(corpus, model.tokenizer, context, _SAMPLE_ROWS)


def _is_new(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _write(
    out: Path,
    step: int,
    tensors: dict[str, Tensor],
    settings: dict[str, Any],
    model: Transformer,
    card: str,
) -> None:
    checkpoints.save(out, step, tensors, {"settings": settings, "exported": True})
    write_atomically(out / "config.json", json.dumps(settings, indent=1) + "\n")
    if model.tokenizer is not None:
        content = json.loads(model.tokenizer.to_str())
        compact = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
        write_atomically(out / "tokenizer.json", compact)
    write_atomically(out / "README.md", printable(card))


def _smallest(name: str, tensor: Tensor, *, exactly: bool = False) -> Tensor:
    """In the dtype of an exported model; `exactly` only if the values stay as they are."""
    if name == "model.bigram":
        half = tensor.half()
        if exactly:
            return half if torch.equal(half.to(tensor.dtype), tensor) else tensor
        if not half.isfinite().all():
            raise UserError("the bigram table does not fit float16: keep the checkpoint as it is")
        return half
    if not tensor.is_floating_point() and tensor.numel() and int(tensor.max()) < 2**15:
        return tensor.to(torch.int16)
    return tensor
