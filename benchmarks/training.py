"""Times a training step of the weight-sparse transformer against masked dense and dense.

    python -m benchmarks.training                  d_model 1024, densities 1/64 and 1/256
    python -m benchmarks.training --part l0        the cost as L0 grows at d_model 1024
    python -m benchmarks.training --part width     the cost as the width grows at the same L0
    python -m benchmarks.training --part all       all three
    python -m benchmarks.training --smoke          tiny, in seconds

The default takes at most five minutes on two idle cores. The variants take turns in one process:

    sparse                  SparseLinear at its final density. Every 20th step changes the
                            connections; the time of a step includes its share of that.
    masked_dense            the published recipe as released: torch.topk and scatter for
                            activations, a global torch.topk over each matrix after every step
    masked_dense_abs_topk   the same with our abs_topk (in bfloat16)
    masked_dense_kernel     the same with our abs_topk and the fastest projection known
    dense                   nn.Linear, without AbsTopK: the plain model
    masked_dense_compiled   on a GPU: masked_dense_kernel through torch.compile

All of them have our attention, norms and loss, and an allocator that keeps its pages.

Correctness comes first: the logits of each sparse model, and in float64 its gradients, must be
those of masked dense with the same weights. Otherwise its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.transformer import program
from benchmarks.transformer.check import check
from benchmarks.transformer.jobs import Training
from benchmarks.transformer.program import Group
from benchmarks.transformer.variants import (
    COMPILED,
    DENSE,
    LARGE_MODEL,
    MASKED_DENSE,
    MASKED_DENSE_ABS_TOPK,
    MASKED_DENSE_KERNEL,
    MODEL,
    SMOKE_MODEL,
    SPARSE,
    Case,
)

L0_INVERSES = (1024, 512, 256, 128, 64, 32, 16)
WIDTHS = (256, 512, 1024, 2048)
GPU_BATCH = 64


@dataclass(frozen=True)
class Options(program.Options):
    """Options of the command line."""

    part: Literal["default", "l0", "width", "all"] = "default"
    """What to measure."""


def plan(options: Options) -> list[Group]:
    """What is to be measured."""
    smoke, on_gpu = options.smoke, options.device != "cpu"
    model = SMOKE_MODEL if smoke else LARGE_MODEL if on_gpu else MODEL
    batch = 2 if smoke else GPU_BATCH if on_gpu else 8
    base = Case(model, SPARSE, batch=batch)
    sparser = replace(base, model=replace(model, density=model.density / 4))
    default = [
        *(replace(base, variant=v) for v in (SPARSE, MASKED_DENSE, MASKED_DENSE_KERNEL, DENSE)),
        *(
            replace(base, variant=v, dtype="bfloat16")
            for v in (SPARSE, MASKED_DENSE_ABS_TOPK, MASKED_DENSE_KERNEL, DENSE)
        ),
        *([replace(base, variant=COMPILED, dtype="bfloat16")] if on_gpu else []),
        *(replace(sparser, variant=v) for v in (SPARSE, MASKED_DENSE)),
    ]
    # All of L0 grows alike: the ratio of the two densities stays.
    ratio = model.embedding_density / model.density
    l0 = [_at(base, density=1 / n, embedding_density=ratio / n)
          for n in ((16, 8, 4) if smoke else L0_INVERSES)]  # fmt: skip
    width = [_of_width(base, width) for width in ((32, 64) if smoke else WIDTHS)]
    groups = {
        "default": Group("default", tuple(default), memory=True),
        "l0": Group("l0", (*l0, replace(base, variant=MASKED_DENSE))),
        "width": Group(
            "width", tuple(replace(c, variant=v) for c in width for v in (SPARSE, MASKED_DENSE))
        ),
    }
    return list(groups.values()) if options.part == "all" else [groups[options.part]]


def _at(case: Case, **changes: float) -> Case:
    """The case with another model, whose densities are exact."""
    return replace(case, model=replace(case.model, min_nonzeros=1, **changes))  # type: ignore[arg-type]


def _of_width(case: Case, width: int) -> Case:
    """The case with another width and the same L0."""
    model = case.model
    ratio = model.d_model / width
    return _at(
        case,
        d_model=width,
        density=min(1.0, model.density * ratio**2),
        embedding_density=min(1.0, model.embedding_density * ratio),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; `arguments` are the words after the module's name."""
    options, command = program.parse(Options, "training", __doc__, arguments)

    def make(case: Case) -> Training:
        job = Training(case, options.device)
        if case.variant == SPARSE:
            job.verdict = check(job.model)
        return job

    return program.run(plan(options), make, options, command)


if __name__ == "__main__":
    sys.exit(main())
