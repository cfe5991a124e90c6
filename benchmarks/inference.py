"""Times a forward of the weight-sparse transformer, for a prompt and token by token.

    python -m benchmarks.inference                 d_model 2048, 8 layers, density 1/256
    python -m benchmarks.inference --smoke         tiny, in seconds

    prefill   one prompt of 256 tokens, without a cache
    decode    one more token for each of a batch of 1 or 16, keys and values of 128 in the cache

The variants take turns in one process, in float32 and with everything in bfloat16. `masked_dense`
holds its zeros already and has our abs_topk: the fastest that masked dense can be.

Correctness comes first: the logits of the sparse model, also those from the cache, must be those
of masked dense with the same weights. Otherwise its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import sys

from benchmarks import run
from benchmarks.devices import Device
from benchmarks.transformer import measure
from benchmarks.transformer.jobs import LARGE_MODEL, SMOKE_MODEL, Case, Group


def plan(options: run.Options, _: Device) -> list[Group]:
    model = SMOKE_MODEL if options.smoke else LARGE_MODEL
    dense = ("masked_dense_kernel", "dense")
    variants = {"float32": dense, "bfloat16": dense if measure.has_bf16_dense(options) else ()}
    groups = []
    for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 16)):
        cases = tuple(
            Case(model, variant, dtype, phase, batch)
            for dtype, others in variants.items()
            for variant in ("sparse", *others)
        )
        measured = cases[: 1 if options.smoke else None] if phase == "prefill" else ()
        groups.append(Group(phase, cases, measured))
    return groups


main = run.Benchmark(
    name="inference",
    description=__doc__,
    cases=plan,
    measure=measure.measure_group,
    missing=measure.missing,
)

if __name__ == "__main__":
    sys.exit(main())
