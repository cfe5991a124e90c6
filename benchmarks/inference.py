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
from collections.abc import Sequence

from benchmarks.transformer import program
from benchmarks.transformer.check import check, densified
from benchmarks.transformer.jobs import Inference
from benchmarks.transformer.program import Group
from benchmarks.transformer.variants import LARGE_MODEL, SMOKE_MODEL, Case, make_model
from sparse_transformer import Transformer


def plan(options: program.Options) -> list[Group]:
    """What is to be measured."""
    model = SMOKE_MODEL if options.smoke else LARGE_MODEL
    groups = []
    for phase, batch in (("prefill", 1), ("decode", 1), ("decode", 16)):
        cases = tuple(
            Case(model, variant, dtype, phase, batch)
            for dtype in ("float32", "bfloat16")
            for variant in ("sparse", "masked_dense_kernel", "dense")
        )
        measured = cases[: 1 if options.smoke else None] if phase == "prefill" else ()
        groups.append(Group(phase, cases, memory=measured))
    return groups


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    options, command = program.parse(program.Options, "inference", __doc__, arguments)
    groups = plan(options)
    sparse = make_model(groups[0].cases[0], options.device)
    verdict = check(sparse, gradients=False)
    models: dict[tuple[str, str], Transformer] = {}

    def make(case: Case) -> Inference:
        key = (case.variant, case.dtype)
        if key not in models:
            is_masked = case.variant == "masked_dense_kernel"
            model = densified(sparse) if is_masked else make_model(case, options.device)
            models[key] = model.to(case.torch_dtype)
        job = Inference(case, options.device, models[key])
        if case.variant == "sparse":
            job.verdict = verdict
        return job

    return program.run(groups, make, options, command)


if __name__ == "__main__":
    sys.exit(main())
