"""New folders, files that are whole or absent, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_transformer.errors import writing


def new_folder(root: Path, prefix: str, suffix: str = "") -> Path:
    """Makes a folder of a new name in `root`, with the permissions that the user's umask gives.

    `tempfile.mkdtemp` would make one that nobody else can read.
    """
    folder = root / f"{prefix}{secrets.token_hex(6)}{suffix}"
    folder.mkdir()
    return folder


def sha256(path: Path) -> str:
    """Of the file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Returns when a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write what takes the place of `path` at the end of the block.

    What was there stays whole until then, and if the block fails.
    """
    beside = path.with_name(f".{path.name}.temporary")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is never seen half written; a UserError if it cannot be written."""
    with writing(path, "free some space or choose another --out"), replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
