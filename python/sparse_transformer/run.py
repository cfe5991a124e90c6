"""What a training run left in its folder: a model and the tokenizer that belongs to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_transformer.data import load_tokenizer
from sparse_transformer.errors import UserError
from sparse_transformer.files import write_atomically
from sparse_transformer.model import ModelConfig, Transformer
from sparse_transformer.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_run(
    checkpoint: str | os.PathLike[str], step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a run.

    Args:
        checkpoint: the folder of a training run, or of one checkpoint in it; or the name of a model
            that comes with the package.
        step: the checkpoint of this step, by default the newest.
        device: where the model goes.

    Raises:
        UserError: no such device, a checkpoint that cannot be read, or a tokenizer that is missing
            or does not belong to the model.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        torch.Generator(place)
    # A build without CUDA says so by an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {str(device)!r}: use --device cpu") from error
    if place.type == "meta":
        raise UserError("the device meta computes nothing: use --device cpu")
    folder = checkpoints.find(checkpoint)
    point = checkpoints.load(folder, step, device=place, prefix="model.")
    with checkpoints.damage_named(point.path):
        config = ModelConfig.from_dict(point.meta["settings"]["model"])
        model = checkpoints.model_of(point, config, place).eval()
    tokenizer = load_tokenizer(tokenizer_of(folder))
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model "
            f"{model.config.vocab_size}: copy the tokenizer.json of its run there"
        )
    model.tokenizer = tokenizer
    return model, tokenizer


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
        UserError: as `load_run`.
    """
    return load_run(path_or_name, step, device)[0]


def export_model(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
) -> int:
    """Writes a model, without the state of its training, into a folder that `load_model` reads.

    The bigram table is stored in float16, indices in int16 where they fit; everything else as it
    is. Paths of the machine that trained it are left out.

    Args:
        checkpoint: as for `load_run`.
        folder: must be new or empty.
        step: the checkpoint of this step, by default the newest.

    Returns:
        The size of all files in bytes.

    Raises:
        UserError: as `load_run`; or a folder that is not empty or cannot be written, or a bigram
            table with values above 65504.
    """
    load_run(checkpoint, step)  # which refuses what is damaged
    point = checkpoints.load(checkpoint, step, prefix="model.")
    out = Path(folder)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not empty: choose another --out")
    settings = point.meta["settings"]
    settings.get("train", {}).update(data=[], cache_dir=None)
    tensors = {name: _smallest(name, tensor) for name, tensor in point.tensors.items()}
    checkpoints.save(out, point.step, tensors, {"settings": settings, "exported": True})
    write_atomically(out / "config.json", json.dumps(settings, indent=1) + "\n")
    text = tokenizer_of(checkpoints.find(checkpoint)).read_text(encoding="utf-8")
    compact = json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)
    write_atomically(out / "tokenizer.json", compact)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _smallest(name: str, tensor: Tensor) -> Tensor:
    """In the dtype of an exported model."""
    if name == "model.bigram":
        half = tensor.half()
        if not half.isfinite().all():
            raise UserError("the bigram table does not fit float16: keep the checkpoint as it is")
        return half
    if not tensor.is_floating_point() and tensor.numel() and int(tensor.max()) < 2**15:
        return tensor.to(torch.int16)
    return tensor


def tokenizer_of(checkpoint: Path) -> Path:
    """`tokenizer.json` of the run, also where a checkpoint in the run's folder is named."""
    inside = checkpoint / "tokenizer.json"
    alone = inside.exists() or not checkpoint.name.startswith("step-")
    return inside if alone else checkpoint.parent / "tokenizer.json"
