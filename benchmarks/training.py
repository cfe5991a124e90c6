"""Times a training step of the weight-sparse transformer against masked dense and dense.

    python -m benchmarks.training                  d_model 1024, densities 1/64 and 1/256
    python -m benchmarks.training --part l0        the cost as L0 grows at d_model 1024
    python -m benchmarks.training --part width     the cost as the width grows at the same L0
    python -m benchmarks.training --smoke          tiny, in seconds

The default takes at most five minutes on two idle cores. The variants take turns in one process,
with our attention, norms and loss and an allocator that keeps its pages; docs/benchmarks.md
describes them. Every 20th step of `sparse` changes the connections; the time of a step includes its
share of that.

Correctness comes first: the logits of each sparse model, and in float64 its gradients, must be
those of masked dense with the same weights. Otherwise its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks import run
from benchmarks.devices import Device
from benchmarks.transformer import measure
from benchmarks.transformer.jobs import LARGE_MODEL, MODEL, SMOKE_MODEL, Case, Group

# How many times the L0, or the width, of the model.
L0_TIMES, SMOKE_L0_TIMES = tuple(2.0**n for n in range(-4, 3)), (0.5, 1.0, 2.0)
WIDTH_TIMES, SMOKE_WIDTH_TIMES = (0.25, 0.5, 1.0, 2.0), (0.5, 1.0)
GPU_BATCH = 64


@dataclass(frozen=True)
class Options(run.Options):
    part: Literal["default", "l0", "width", "all"] = "default"
    """What to measure."""


def plan(options: Options, _: Device) -> list[Group]:
    smoke, on_gpu = options.smoke, options.device != "cpu"
    model = SMOKE_MODEL if smoke else LARGE_MODEL if on_gpu else MODEL
    base = Case(model, "sparse", batch=2 if smoke else GPU_BATCH if on_gpu else 8)
    both, kernels = ("sparse", "masked_dense"), ("masked_dense_kernel", "dense")
    bf16_dense = ("masked_dense_abs_topk", *kernels) if measure.has_bf16_dense(options) else ()
    variants = (
        (base, ("sparse", "masked_dense", *kernels)),
        (replace(base, dtype="bfloat16"), ("sparse", *bf16_dense)),
        (replace(base, model=replace(model, density=model.density / 4)), both),
    )
    default = [replace(case, variant=name) for case, names in variants for name in names]
    # A dense matrix takes as much memory at any density.
    memory = [case for case in default if case.variant == "sparse" or case.model == model]
    l0 = [_scaled(base, n, n) for n in (SMOKE_L0_TIMES if smoke else L0_TIMES)]
    # A matrix with n times the rows and columns has as many weights at 1 / n^2 of the density.
    width = [
        replace(_scaled(base, n**-2, 1 / n, d_model=round(n * model.d_model)), variant=name)
        for n in (SMOKE_WIDTH_TIMES if smoke else WIDTH_TIMES)
        for name in both
    ]
    groups = {
        "default": Group("default", tuple(default), tuple(memory[: 1 if smoke else None])),
        "l0": Group("l0", (*l0, replace(base, variant="masked_dense"))),
        "width": Group("width", tuple(width)),
    }
    return list(groups.values()) if options.part == "all" else [groups[options.part]]


def _scaled(case: Case, blocks: float, embeddings: float, **changes: Any) -> Case:
    """The case with so many times the densities of its blocks and its embeddings."""
    model = replace(
        case.model,
        density=min(1.0, case.model.density * blocks),
        embedding_density=min(1.0, case.model.embedding_density * embeddings),
        min_nonzeros=1,
        **changes,
    )
    return replace(case, model=model)


main = run.Benchmark(
    name="training",
    description=__doc__,
    cases=plan,
    measure=measure.measure_group,
    options=Options,
    missing=measure.missing,
)

if __name__ == "__main__":
    sys.exit(main())
