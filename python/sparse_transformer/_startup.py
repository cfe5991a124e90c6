"""What may end a program of this package while it imports: Ctrl-C, or a package that is missing.

Neither shows a traceback. The package imports this module first. It does nothing where the package
is used as a library.
"""

from __future__ import annotations

import os
import signal
import sys
from types import TracebackType


def ready() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: object) -> None:
    # An exception could be taken for a failed import, and there is nothing to tidy up yet.
    os._exit(130)


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says which package is missing and ends with status 2; other errors end as ever."""
    package = (getattr(error, "name", None) or "sparse_").partition(".")[0]
    if not issubclass(kind, ModuleNotFoundError) or package.startswith("sparse_"):
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"error: {package} is not installed: pip install '.[transformer]' in the checkout",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _is_program(arguments: list[str]) -> bool:
    """Whether Python was started with `-m sparse_transformer.something`."""
    if "-m" not in arguments[:-1]:
        return False
    return arguments[arguments.index("-m") + 1].startswith("sparse_transformer.")


if _is_program(sys.orig_argv):
    sys.excepthook = _explain
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
