"""Times a training step of the weight-sparse transformer against masked dense and dense.

    python -m benchmarks.training                  d_model 1024, densities 1/64 and 1/256
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
from dataclasses import replace

from benchmarks import run
from benchmarks.devices import Device
from benchmarks.transformer import measure
from benchmarks.transformer.jobs import LARGE_MODEL, MODEL, SMOKE_MODEL, Case, Group

GPU_BATCH = 64


def plan(options: run.Options, _: Device) -> list[Group]:
    smoke, on_gpu = options.smoke, options.device != "cpu"
    model = SMOKE_MODEL if smoke else LARGE_MODEL if on_gpu else MODEL
    base = Case(model, "sparse", batch=2 if smoke else GPU_BATCH if on_gpu else 8)
    kernels = ("masked_dense_kernel", "dense")
    bf16_dense = ("masked_dense_abs_topk", *kernels) if measure.has_bf16_dense(options) else ()
    variants = (
        (base, ("sparse", "masked_dense", *kernels)),
        (replace(base, dtype="bfloat16"), ("sparse", *bf16_dense)),
        (
            replace(base, model=replace(model, density=model.density / 4)),
            ("sparse", "masked_dense"),
        ),
    )
    cases = [replace(case, variant=name) for case, names in variants for name in names]
    # A dense matrix takes as much memory at any density.
    memory = [case for case in cases if case.variant == "sparse" or case.model == model]
    return [Group("default", tuple(cases), tuple(memory[: 1 if smoke else None]))]


main = run.Benchmark(
    name="training",
    description=__doc__,
    cases=plan,
    measure=measure.measure_group,
    missing=measure.missing,
)

if __name__ == "__main__":
    sys.exit(main())
