"""Builds, checks, measures and profiles the GPU kernels: `python -m benchmarks.gpu`."""

import sys
from pathlib import Path

# A machine with a GPU may have nothing but a checkout, in which the kernels are built in place.
PACKAGES = str(Path(__file__).resolve().parents[2] / "python")
if PACKAGES not in sys.path:
    sys.path.append(PACKAGES)
