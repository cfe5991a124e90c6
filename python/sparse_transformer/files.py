"""New folders, files that are whole or absent, and hashes of files."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from sparse_transformer.errors import UserError


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


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is never seen half written.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.temporary")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space or choose another --out"
        ) from error
