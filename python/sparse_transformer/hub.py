"""Models in folders and on the Hugging Face hub.

A folder is that of `export_model`, which `load_model` and every program read too; or one of the
published formats. `huggingface_hub` does the downloads and uploads; a folder needs neither it nor a
network. Its PyTorchModelHubMixin is not used: it would be a base class of the model and so a
requirement of every user, and it knows nothing of tokenizers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from sparse_transformer import published
from sparse_transformer.errors import UserError, one_line
from sparse_transformer.model import Transformer
from sparse_transformer.released import load_released
from sparse_transformer.run import (
    device_of,
    give_tokenizer,
    load_weights,
    model_card,
    save_model,
)
from sparse_transformer.train import checkpoint as checkpoints

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def from_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """See `Transformer.from_pretrained`."""
    name, place = str(name_or_folder), device_of(device)
    known = Path(name_or_folder).exists() or name in checkpoints.models()
    remote = not known and _NAME.fullmatch(name) is not None
    folder = _download(name, revision, token) if remote else checkpoints.find(name_or_folder)
    tokenizer = checkpoints.tokenizer_of(folder)
    if checkpoints.steps(folder) or folder.name.startswith("step-"):
        model = load_weights(folder, device=place)
    else:
        model = load_released(folder).to(place).eval()
        elsewhere = published.tokenizer_name(folder)
        if remote and elsewhere and not tokenizer.exists():
            tokenizer = _download(elsewhere, None, token) / tokenizer.name
    if tokenizer.exists():
        give_tokenizer(model, tokenizer)
    return model


def push_to_hub(
    model: Transformer,
    name: str,
    *,
    card: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """See `Transformer.push_to_hub`."""
    hub = _package(name)
    with tempfile.TemporaryDirectory() as temporary, _errors(name, "cannot be uploaded"):
        folder = Path(temporary, "model")
        save_model(model, folder, card or model_card(model, name))
        api = hub.HfApi(token=token)
        url = api.create_repo(name, private=private, exist_ok=True)
        # Of an older upload a later step may be there, which would be read instead.
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, delete_patterns="step-*")
    return str(url)


def _download(name: str, revision: str | None, token: str | bool | None) -> Path:
    """The folder of the hub's cache with the files of a model, which are downloaded if need be."""
    hub = _package(name)
    with _errors(name, "is no folder here, and cannot be downloaded"):
        files = [*published.FILES, "tokenizer.json", "step-*"]
        return Path(
            hub.snapshot_download(name, revision=revision, token=token, allow_patterns=files)
        )


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"{name} is no folder here, and the hub needs a package: pip install huggingface_hub"
        ) from error


@contextlib.contextmanager
def _errors(name: str, problem: str) -> Iterator[None]:
    """Inside, what the hub raises becomes a UserError."""
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        yield
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a folder here nor a model on the hub that you may read: correct "
            "the name, or log in with: hf auth login"
        ) from error
    # HTTPError is of the package that the hub's package uses for its connections.
    except (OSError, errors.HFValidationError, errors.HTTPError) as error:
        raise UserError(
            f"{name} {problem} ({one_line(error)}): connect to the network, or log in with: "
            "hf auth login"
        ) from error
