"""What a user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """An error whose text is one sentence that says what to do; programs print it and exit 2."""


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Inside, what keeps `path` from being written becomes a UserError with this advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): {advice}") from error


def one_line(text: object) -> str:
    """The text of an error without line breaks, cut where it is long."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def suggest(name: str, known: Iterable[str], far: str | None = None) -> str:
    """How a sentence about an unknown name ends: with the nearest names, or `far`, or all names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return far or f"there are {', '.join(known)}"
