"""Checkpoints: safetensors and JSON in a folder per step, never pickle.

    OUT/step-00001234/tensors.safetensors   parameters, optimizer state, topology, generators
    OUT/step-00001234/meta.json             everything that is not a tensor; the size and hash of it

A folder is written under a temporary name, flushed to the disk and then renamed, so `step-*` is
always complete, whenever the process dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_transformer.config import ModelConfig
from sparse_transformer.errors import UserError, one_line, suggest
from sparse_transformer.files import new_folder, sha256, sync
from sparse_transformer.model import Transformer

# Where models are found by their names: in the package, in a checkout beside `python/`, or in
# `models/` of the current folder.
MODELS = [
    Path(__file__).parents[1] / "models",
    Path(__file__).parents[3] / "models",
    Path("models"),
]
_FORMAT = 1
_TENSORS, _META = "tensors.safetensors", "meta.json"
_STEP = re.compile(r"step-(\d{8,})")
# Names of folders that a process which died may have left behind.
_TEMPORARY = ".temporary-"
# What reading a file raises that is damaged or was written by something else.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, and where it lies."""

    step: int
    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def folder_of(directory: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of `step` lies or would lie."""
    return Path(directory, f"step-{step:08d}")


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps of which `directory` has a checkpoint, in order; [] if there is no directory."""
    root = Path(directory)
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))


def models() -> dict[str, Path]:
    """The folders of the models of the package, its checkout and `models/` here, by name."""
    roots = [root for root in reversed(MODELS) if root.is_dir()]
    folders = (folder for root in roots for folder in sorted(root.iterdir()))
    return {folder.name: folder for folder in folders if steps(folder)}


def find(path_or_name: str | os.PathLike[str]) -> Path:
    """A path that exists, or else the folder of the model of that name.

    A UserError with the nearest names if neither exists.
    """
    path = Path(path_or_name)
    if path.exists():
        return path
    known = models()
    if str(path) in known:
        return known[str(path)]
    if not known:
        raise UserError(f"{path} does not exist: name the folder of a training run")
    raise UserError(
        f"{path} does not exist, and there is no model of that name: {suggest(str(path), known)}"
    )


def save(
    directory: str | os.PathLike[str],
    step: int,
    tensors: dict[str, Tensor],
    meta: dict[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Writes the checkpoint of `step`, then removes all but the newest `keep`.

    Args:
        directory: made if it does not exist. One process at a time may write to it.
        tensors: by name, of any device; tensors must not share memory.
        meta: anything that JSON can hold.
        keep: at least 1; None keeps all.

    Raises:
        UserError: the disk is full or cannot be written. What was there before is unharmed.
        ValueError: there is a checkpoint of this step.
    """
    if keep is not None and keep < 1:
        raise UserError(f"--keep must be at least 1, got {keep}")
    root = Path(directory)
    target = folder_of(root, step)
    if target.exists():
        # A folder cannot be replaced in one go, so this would not be safe.
        raise ValueError(f"{target} exists already")
    temporary = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_temporary(root)
        temporary = new_folder(root, _TEMPORARY)
        _write(temporary, step, tensors, meta)
        temporary.rename(target)
        sync(root)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(_cannot_write(root, step, error)) from error
    _remove_temporary(root)
    if keep is not None:
        for old in steps(root)[:-keep]:
            remove(root, old)
    return target


def load(
    directory: str | os.PathLike[str],
    step: int | None = None,
    *,
    device: str | torch.device = "cpu",
    prefix: str = "",
    option: str = "--step",
) -> Checkpoint:
    """Reads the checkpoint of `step`, by default the newest one.

    Args:
        directory: as for `save`; the folder of one checkpoint itself; or a name, see `find`.
        device: where the tensors go.
        prefix: only the tensors whose names begin with it.
        option: how the program that asks lets its user choose a step.

    Raises:
        UserError: there is none, or it is damaged; the sentence names the next older one.
    """
    root = find(directory)
    if (match := _STEP.fullmatch(root.name)) and not steps(root):
        if step not in (None, int(match[1])):
            raise UserError(
                f"{root} is the checkpoint of step {int(match[1])} and not of step {step}: leave "
                f"out {option}, or name the folder of the run"
            )
        root, step = root.parent, int(match[1])
    available = steps(root)
    if not available:
        raise UserError(f"there is no checkpoint in {root}: start a run with --out {root}")
    if step is None:
        step = available[-1]
    if step not in available:
        raise UserError(
            f"there is no checkpoint of step {step} in {root}: "
            f"there are {', '.join(map(str, available))}"
        )
    path = folder_of(root, step)
    with damage_named(path, option):
        meta = _read_meta(path, step)
        tensors = _read_tensors(path, str(device), prefix)
    return Checkpoint(step, path, tensors, meta)


@contextlib.contextmanager
def damage_named(path: Path, option: str = "--step") -> Iterator[None]:
    """Inside, what a damaged checkpoint raises becomes a UserError that names the next older one.

    `option` is how the program that asks lets its user choose a step.
    """
    try:
        yield
    except _DAMAGE as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        match = _STEP.fullmatch(path.name)
        older = [step for step in steps(path.parent) if match and step < int(match[1])]
        advice = (
            f"use the older one of step {older[-1]} with {option} {older[-1]}"
            if older
            else "there is no older one, so copy it again, or start a new run in another folder"
        )
        raise UserError(
            f"the checkpoint {path} cannot be read ({one_line(reason)}): {advice}"
        ) from error


def model_of(point: Checkpoint, config: ModelConfig, device: torch.device | str) -> Transformer:
    """The model whose tensors `point` has, as `config` computes it.

    A RuntimeError, TypeError or ValueError if they do not fit each other, or are not finite.
    """
    state = part(point.tensors, "model")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
    return Transformer.from_state(config, state, device=device)


def load_weights(
    directory: str | os.PathLike[str],
    step: int | None = None,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model of a run; arguments and errors are those of `load`."""
    point = load(directory, step, device=device, prefix="model.")
    with damage_named(point.path):
        return model_of(point, _config_of(point), device)


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """That of the model of a run; arguments and errors are those of `load`."""
    point = load(directory, prefix="model.none")
    with damage_named(point.path):
        return _config_of(point)


def _config_of(point: Checkpoint) -> ModelConfig:
    return ModelConfig.from_dict(point.meta["settings"]["model"])


def tokenizer_of(checkpoint: Path) -> Path:
    """`tokenizer.json` of the run, also where a checkpoint in the run's folder is named."""
    inside = checkpoint / "tokenizer.json"
    alone = inside.exists() or not checkpoint.name.startswith("step-")
    return inside if alone else checkpoint.parent / "tokenizer.json"


def remove(directory: str | os.PathLike[str], step: int) -> None:
    """Removes a checkpoint; not even a process that dies leaves a part of it under its name."""
    path = folder_of(directory, step)
    doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def set_aside(directory: str | os.PathLike[str], after: int) -> list[Path]:
    """Renames the checkpoints of later steps than `after`, so that they are no longer found.

    For a run that resumes from an older one. Returns the new paths, `set-aside-*`.
    """
    moved = []
    for step in steps(directory):
        if step > after:
            path = folder_of(directory, step)
            aside = new_folder(Path(directory), "set-aside-")
            moved.append(path.rename(aside / path.name))
    return moved


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix` and a dot, by what follows."""
    return {
        name[len(prefix) + 1 :]: tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }


def _write(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = folder / _TENSORS
    save_file(cpu, path)
    record = {
        "format": _FORMAT,
        "step": step,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "content": meta,
    }
    with open(folder / _META, "w", encoding="utf-8") as file:
        # NaN and infinity are no JSON; nothing that is saved may be one.
        json.dump(record, file, indent=1, allow_nan=False)
    # safetensors makes files that nobody else can read.
    path.chmod((folder / _META).stat().st_mode)
    sync(path)
    sync(folder / _META)
    sync(folder)


def _read_meta(path: Path, step: int) -> dict[str, Any]:
    """What `save` was given as `meta`."""
    record = json.loads((path / _META).read_text(encoding="utf-8"))
    if record["format"] != _FORMAT:
        raise ValueError(f"it has format {record['format']}, this release reads {_FORMAT}")
    if record["step"] != step:
        raise ValueError(f"it was saved as that of step {record['step']}")
    tensors = path / _TENSORS
    if tensors.stat().st_size != record["bytes"]:
        raise ValueError(f"{tensors.stat().st_size} of {record['bytes']} bytes are there")
    if sha256(tensors) != record["sha256"]:
        raise ValueError("its bytes have changed since it was written")
    meta = record["content"]
    if not isinstance(meta, dict):
        raise TypeError(f"its content must be a JSON object, got a {type(meta).__name__}")
    return meta


def _read_tensors(path: Path, device: str, prefix: str) -> dict[str, Tensor]:
    with safe_open(path / _TENSORS, framework="pt", device=device) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def _remove_temporary(root: Path) -> None:
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _cannot_write(root: Path, step: int, error: Exception) -> str:
    reason = str(error.strerror if isinstance(error, OSError) else error)
    # safetensors has only its text.
    full = os.strerror(errno.ENOSPC) in reason
    advice = "free some space" if full else "make the folder writable"
    available = steps(root)
    last = f"the one of step {available[-1]} is unharmed" if available else "there is none yet"
    return (
        f"the checkpoint of step {step} cannot be written to {root} ({reason}): "
        f"{advice}, then continue with --resume; {last}"
    )
