"""Times abs_topk: `python -m benchmarks.matmul --operation abs_topk` by another name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import matmul


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    return matmul.main(["--operation", "abs_topk", *words])


if __name__ == "__main__":
    sys.exit(main())
