"""Times the three sparse products against dense, other sparse libraries and the roofline bound.

    python -m benchmarks.matmul                      the cases with a goal, in about 80 seconds
    python -m benchmarks.matmul --full               every layer of every published width; hours
    python -m benchmarks.matmul --smoke              tiny shapes, in seconds
    python -m benchmarks.matmul --case 2048-8192     the cases whose name contains this
    python -m benchmarks.matmul --device cuda        the cases of a GPU

A row is one product of one case, or `step`, the sum of the three. A row that is wrong prints FAIL
instead of a speed and makes the exit status 1. Ctrl-C ends the run and keeps the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks import baselines, peers, run
from benchmarks.baselines import Operands, Rival, Rivals
from benchmarks.cases import Case, matmul_cases
from benchmarks.roofline import count_work
from benchmarks.run import Benchmark, Operation
from benchmarks.timing import Budget, Candidate
from sparse_kernels import backends


def operations(case: Case, device: str, backend: str | None) -> Iterator[Operation]:
    """The three products of a case, over the same operands."""
    operands = Operands.draw(case, device=device)
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
    case, on_gpu = operands.case, operands.x.is_cuda
    is_bf16 = case.dtype == "bfloat16"
    notes = {}
    no_bf16 = None if on_gpu else baselines.why_no_bf16_dense(operands, product)
    if no_bf16 is not None:
        notes["bf16_dense_note"] = no_bf16
    found: Rivals = {}
    if not (is_bf16 and no_bf16):
        masked = baselines.masked_dense(operands, product)
        found["masked dense"] = Rival(masked, "masked_dense")
        if on_gpu and case.has_goal:
            compiled = torch.compile(masked, fullgraph=True, dynamic=False)
            found["compiled masked"] = Rival(compiled, "compiled_masked")
    if case.has_goal and not is_bf16 and not on_gpu and torch.get_num_threads() > 1:
        # Not next to ours, which would find its operands in the caches.
        found["one thread"] = Rival(baselines.under(ours, "num_threads", 1), "one_thread")
    found |= baselines.dense_rivals(operands, product, bf16=no_bf16 is None)
    sparse, why_no_peer = peers.rivals(operands, product, ours)
    if why_no_peer is not None:
        notes["sparse_note"] = why_no_peer
    return found | sparse, notes


BENCHMARK = Benchmark(
    name="matmul",
    description=__doc__,
    cases=matmul_cases,
    operations=operations,
    # Seconds of measuring for each product, once everything is warm.
    budgets={
        "smoke": Budget(0.01),
        "default": Budget(0.3, limit_s=0.8),
        "wide": Budget(0.6),
        "full": Budget(0.6),
    },
    missing=peers.missing,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    return run.main(BENCHMARK, arguments)


if __name__ == "__main__":
    sys.exit(main())
