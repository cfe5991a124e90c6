"""New folders, which are renamed when they are complete, and hashes of files."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path


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
