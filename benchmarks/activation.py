"""Times abs_topk: `python -m benchmarks.matmul --operation abs_topk` by another name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from benchmarks import matmul, run


@dataclass(frozen=True)
class Options(matmul.Options):
    """Options of the command line."""

    operation: Literal["abs_topk"] = "abs_topk"
    """What is measured."""


BENCHMARK = replace(matmul.BENCHMARK, name="activation", description=__doc__, options=Options)
main = partial(run.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
