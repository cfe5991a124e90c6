"""Ctrl-C while a program of this package still imports: it ends with status 130 and no traceback.

The package imports this module first. It does nothing where the package is used as a library.
"""

from __future__ import annotations

import os
import signal
import sys


def ready() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    # An exception could be taken for a failed import, and there is nothing to tidy up yet.
    os._exit(130)


def _is_program(arguments: list[str]) -> bool:
    """Whether Python was started with `-m sparse_transformer.something`."""
    if "-m" not in arguments[:-1]:
        return False
    return arguments[arguments.index("-m") + 1].startswith("sparse_transformer.")


if _is_program(sys.orig_argv) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
