"""Times the three sparse products against dense, other sparse libraries and the roofline bound.

    python -m benchmarks.matmul                      the most telling cases, in about 80 seconds
    python -m benchmarks.matmul --full               every case, in minutes
    python -m benchmarks.matmul --smoke              tiny shapes, in seconds
    python -m benchmarks.matmul --case 2048-8192     the cases whose name contains this
    python -m benchmarks.matmul --device cuda        the cases of a GPU

A row is one product of one case, or `step`, the sum of the three. A row that is wrong prints FAIL
instead of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks import baselines, operations, peers, run
from benchmarks.baselines import Operands, Rivals
from benchmarks.cases import Case, matmul_cases
from benchmarks.operations import Operation
from benchmarks.roofline import count_work
from benchmarks.timing import Candidate
from sparse_kernels import backends


def products(case: Case, device: str, backend: str | None) -> Iterator[Operation]:
    """The three products of a case, over the same operands."""
    operands = Operands.draw(case, device)
    for problem in case.problems(device):
        name, product = backends.choose(problem, backend), problem.product
        ours = baselines.ours(operands, product, name)
        yield Operation(
            product=product,
            backend=name,
            ours=ours,
            check=partial(baselines.check, operands, product, ours),
            work=count_work(case, product, operands.used_in_features),
            rivals=partial(rivals, operands, product, ours),
        )


def rivals(operands: Operands, product: str, ours: Candidate) -> tuple[Rivals, dict[str, str]]:
    """Masked dense, dense and sparse ways to compute the product, and why some are missing."""
    dense, notes = baselines.rivals(operands, product)
    sparse, more = peers.rivals(operands, product, ours)
    return dense | sparse, notes | more


BENCHMARK = operations.benchmark(
    "matmul",
    __doc__,
    matmul_cases,
    products,
    seconds=(0.3, 0.8),
    missing=lambda options: peers.missing(),
)
main = partial(run.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
