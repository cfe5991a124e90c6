"""Times abs_topk against torch.topk + scatter, with the options of `benchmarks.matmul`."""

from __future__ import annotations

import sys
from functools import partial

from benchmarks import matmul, run

main = run.Benchmark(
    name="activation",
    description=__doc__,
    cases=partial(matmul.choose, "activation"),
    measure=matmul.measure,
    options=matmul.Options,
)

if __name__ == "__main__":
    sys.exit(main())
