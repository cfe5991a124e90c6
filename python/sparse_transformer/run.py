"""What a training run left in its folder: a model and the tokenizer that belongs to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_transformer.data import load_tokenizer
from sparse_transformer.errors import UserError
from sparse_transformer.model import Transformer
from sparse_transformer.train import checkpoint as checkpoints

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_run(
    checkpoint: Path, step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """The model, in evaluation mode, and the tokenizer of a run.

    Args:
        checkpoint: the folder of a training run, or of one checkpoint in it.
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
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist: name the folder of a training run")
    model = checkpoints.load_model(checkpoint, step, device=place).eval()
    tokenizer = load_tokenizer(tokenizer_of(checkpoint))
    if tokenizer.get_vocab_size() != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens and the model "
            f"{model.config.vocab_size}: copy the tokenizer.json of its run there"
        )
    model.tokenizer = tokenizer
    return model, tokenizer


def load_model(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a training run, in evaluation mode; its tokenizer is `model.tokenizer`.

    Args:
        path: the folder of the run, or of one checkpoint in it.
        step: the checkpoint of this step, by default the newest.
        device: where the model goes.

    Raises:
        UserError: as `load_run`.
    """
    return load_run(Path(path), step, device)[0]


def tokenizer_of(checkpoint: Path) -> Path:
    """`tokenizer.json` of the run, also where a checkpoint in the run's folder is named."""
    inside = checkpoint / "tokenizer.json"
    alone = inside.exists() or not checkpoint.name.startswith("step-")
    return inside if alone else checkpoint.parent / "tokenizer.json"
