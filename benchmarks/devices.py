"""The devices that a benchmark can run on, by torch's names."""

from __future__ import annotations

from benchmarks.gpu.machine import Gpu, why_no_gpu
from benchmarks.machine import Machine
from benchmarks.processor import Processor

NAMES = ("cpu", "cuda")


def why_not(name: str) -> str | None:
    """None if a benchmark can run on that device here, else a sentence."""
    if name not in NAMES:
        return f"it must be one of {', '.join(NAMES)}, got {name!r}"
    return why_no_gpu() if name == "cuda" else None


def connect(name: str) -> Machine:
    """The machine of that name."""
    return Gpu() if name == "cuda" else Processor()
