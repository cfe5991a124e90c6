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
from dataclasses import replace
from functools import cache, partial

from benchmarks import run
from benchmarks.devices import Device
from benchmarks.transformer import check, measure
from benchmarks.transformer.jobs import LARGE_MODEL, SMOKE_MODEL, Case, Group, Inference, make_model
from sparse_transformer import Transformer


def plan(options: run.Options, _: Device | None = None) -> list[Group]:
    model = SMOKE_MODEL if options.smoke else LARGE_MODEL
    bf16_dense = () if measure.why_no_bf16_dense(options) else ("masked_dense_kernel", "dense")
    variants = {"float32": ("masked_dense_kernel", "dense"), "bfloat16": bf16_dense}
    groups = []
    for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 16)):
        cases = tuple(
            Case(model, variant, dtype, phase, batch)
            for dtype, dense in variants.items()
            for variant in ("sparse", *dense)
        )
        measured = cases[: 1 if options.smoke else None] if phase == "prefill" else ()
        groups.append(Group(phase, cases, measured))
    return groups


@cache
def shared_model(case: Case, device: str) -> Transformer:
    """The model of a case, of which all phases and batches differ in nothing."""
    if case.variant == "masked_dense_kernel":
        sparse = shared_model(replace(case, variant="sparse", dtype="float32"), device)
        model = check.densified(sparse)
    else:
        model = make_model(case, device)
    return model.to(case.torch_dtype)


@cache
def verdict(case: Case, device: str) -> check.Verdict:
    """The check of the sparse model in float32."""
    return check.check(shared_model(case, device), gradients=False)


def make(case: Case, device: str) -> Inference:
    """The job of a case, with the verdict about its model."""
    of_model = replace(case, phase="prefill", batch=1)
    job = Inference(case, device, shared_model(of_model, device))
    if case.variant == "sparse":
        job.verdict = verdict(replace(of_model, dtype="float32"), device)
    return job


BENCHMARK = run.Benchmark(
    name="inference",
    description=__doc__,
    cases=plan,
    measure=lambda group, options, device: measure.measure_group(group, options, make),
    missing=measure.missing,
)
main = partial(run.main, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
