"""What the programs have in common: how they end, their tables, their files for programs."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sparse_transformer import _startup
from sparse_transformer.errors import UserError, writing

Config = TypeVar("Config")

# How torch says, in a RuntimeError, that an allocation failed.
_NO_MEMORY = re.compile(r"not enough memory|out of memory|can't allocate memory", re.IGNORECASE)


def status(run: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs; returns the exit status: 2 after an error, 130 after Ctrl-C, else what `run` says."""
    _startup.ready()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A text that the terminal cannot show must not end a program.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run() or 0
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the text has seen enough; nothing is left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _refuse(f"{error.filename or 'a file'}: {error.strerror or error}: choose another")
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("no backend can run"):
            return _refuse(str(error))
        if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        return _refuse("there is not enough memory: choose a smaller model or fewer tokens at once")


def entry(
    config: type[Config], name: str, run: Callable[[Config], None], interrupted: str = "interrupted"
) -> Callable[..., int]:
    """The `main` of a program, whose options are the fields of `config`, and which `run` is.

    Args:
        name: of the module, after `sparse_transformer.`.
        interrupted: what to say after Ctrl-C.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        """The program; returns its exit status: 2 after an error, 130 after Ctrl-C."""
        # Those who use the package as a library need no parser.
        import tyro

        given = tyro.cli(config, prog=f"python -m sparse_transformer.{name}", args=arguments)
        return status(lambda: run(given), interrupted)

    return main


def _refuse(sentence: str) -> int:
    print(f"error: {printable(sentence)}", file=sys.stderr)
    return 2


def printable(text: str) -> str:
    """The text with escapes in place of what is not UTF-8, as names of files may be."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_text(text: str) -> str:
    """A text of the command line, in UTF-8; "-" stands for what is on standard input."""
    try:
        found = sys.stdin.read() if text == "-" else text
        found.encode()
    except UnicodeError as error:
        raise UserError(f"the text {text!r} is not UTF-8: convert it") from error
    return found


def cropped(ids: list[int], length: int) -> list[int]:
    """The tokens of a prompt of `length` tokens that are read; a note says if they are fewer."""
    if len(ids) < length:
        print(f"of the prompt's {length} tokens the last {len(ids)} are read", file=sys.stderr)
    return ids


def need_whole(option: str, value: int, least: int, most: int = 2**63 - 1) -> None:
    """Raises UserError unless `least <= value <= most`."""
    if not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise UserError(f"{option} must be {bound}, got {value}")


def need_writable(option: str, path: Path | None) -> None:
    """Raises UserError if no file can be written at `path`; asked before anything takes time."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it with {option}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: choose another {option}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: choose another {option}")


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns two spaces apart, the first `left` of them flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ""
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text += "  ".join(cells).rstrip() + "\n"
    return text


def write_json(path: Path, content: object) -> None:
    """Writes what `--json` asks for."""
    with writing(path, "choose another --json"):
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
