"""Times a training step of the weight-sparse transformer against masked dense and dense.

    python -m benchmarks.training                  d_model 1024, densities 1/64 and 1/256
    python -m benchmarks.training --part l0        the cost as L0 grows at d_model 1024
    python -m benchmarks.training --part width     the cost as the width grows at the same L0
    python -m benchmarks.training --part all       all three
    python -m benchmarks.training --smoke          tiny, in seconds
    python -m benchmarks.training --from FILE      the tables of a result file; measures nothing

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

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import report
from benchmarks.timing import summarize
from benchmarks.transformer import memory, results
from benchmarks.transformer.check import check
from benchmarks.transformer.parts import measure_parts, scaled
from benchmarks.transformer.program import Benchmark, Options
from benchmarks.transformer.program import main as run_program
from benchmarks.transformer.variants import (
    COMPILED,
    DENSE,
    GPU_MODEL,
    MASKED_DENSE,
    MASKED_DENSE_ABS_TOPK,
    MASKED_DENSE_KERNEL,
    SMOKE_MODEL,
    SPARSE,
    Case,
    Shape,
    Training,
    Variant,
    state_bytes,
    why_no_bf16_dense,
)

PARTS = ("default", "l0", "width")
L0_INVERSES = (1024, 512, 256, 128, 64, 32, 16)
WIDTHS = (256, 512, 1024, 2048)
ROUNDS = 3
# No further round of a part starts when it has taken this long, or would end later.
PART_S = 240.0
# In each round a variant takes as many steps as fit into this, at least one.
ROUND_S = 3.0
MAX_STEPS = 6
# A variant whose step takes longer has one sample.
VERY_SLOW_S = 15.0


@dataclass(frozen=True)
class Group:
    """Cases that take turns, all of them in memory at once; of some the peak memory is measured."""

    part: str
    cases: tuple[Case, ...]
    memory: bool = False


def groups(parts: Sequence[str], shape: Shape, *, on_gpu: bool, bf16_dense: bool) -> list[Group]:
    """What is to be measured."""
    made = []
    smoke = shape == SMOKE_MODEL
    if "default" in parts:
        half = [SPARSE]
        if bf16_dense:
            half += [MASKED_DENSE_ABS_TOPK, MASKED_DENSE_KERNEL, DENSE]
        if on_gpu:
            half.append(COMPILED)
        cases = [
            *_cases(shape, SPARSE, MASKED_DENSE, MASKED_DENSE_KERNEL, DENSE),
            *_cases(shape, *half, dtype="bfloat16"),
            *_cases(replace(shape, density=shape.density / 4), SPARSE, MASKED_DENSE),
        ]
        made.append(Group("default", tuple(cases), memory=True))
    if "l0" in parts:
        # The ratio of the two densities stays that of the shape, so that all of L0 grows alike.
        ratio = shape.embedding_density / shape.density
        swept = [
            replace(shape, density=1 / n, embedding_density=ratio / n, min_nonzeros=1)
            for n in ((16, 8, 4) if smoke else L0_INVERSES)
        ]
        cases = [Case(one, SPARSE) for one in swept]
        made.append(Group("l0", (*cases, *_cases(shape, MASKED_DENSE))))
    if "width" in parts:
        swept = [_of_width(shape, width) for width in ((32, 64) if smoke else WIDTHS)]
        cases = [Case(one, variant) for one in swept for variant in (SPARSE, MASKED_DENSE)]
        made.append(Group("width", tuple(cases)))
    return made


def _cases(shape: Shape, *variants: Variant, dtype: str = "float32") -> list[Case]:
    return [Case(shape, variant, dtype) for variant in variants]


def _of_width(shape: Shape, width: int) -> Shape:
    """The shape with another width and the same L0."""
    ratio = shape.d_model / width
    return replace(
        shape,
        d_model=width,
        density=min(1.0, shape.density * ratio**2),
        embedding_density=min(1.0, shape.embedding_density * ratio),
        min_nonzeros=1,
    )


class Measured:
    """What has been measured of a case so far."""

    def __init__(self, case: Case, device: str) -> None:
        self.training = Training(case, device)
        is_sparse = case.variant.linear == "sparse"
        self.verdict = check(self.training.model, case.shape) if is_sparse else None
        self.steps_s: list[float] = []
        self.rewiring_s: list[float] = []
        self.parts_ms: list[dict[str, float]] = []
        self.estimate_s = 0.0

    @property
    def failure(self) -> str | None:
        """A sentence, or None."""
        if self.verdict is not None and self.verdict.failure is not None:
            return self.verdict.failure
        loss = self.training.loss
        if self.steps_s and not math.isfinite(loss):
            return f"the loss is {loss}"
        return None

    def warm_up(self) -> None:
        """The first steps pay for pages, optimizer state and lazily built schedules."""
        if self.training.changes_connections:
            self.training.step(rewires=True)
        self.estimate_s = _seconds(self.training.step)

    def take_turn(self, most: int) -> None:
        """At most so many samples, and one step that is split into its parts."""
        if self.failure is not None or (self.estimate_s > VERY_SLOW_S and self.steps_s):
            return
        count = min(most, max(1, int(ROUND_S / max(self.estimate_s, 1e-3))))
        self.steps_s += [_seconds(self.training.step) for _ in range(count)]
        if self.training.changes_connections:
            # The step after a change of the connections builds new schedules: that is part of its
            # cost, so the two are timed together.
            both = (True, False)
            self.rewiring_s.append(
                sum(_seconds(partial(self.training.step, rewires=r)) for r in both)
            )
        if not self.training.case.variant.compiled:
            self.parts_ms.append(measure_parts(self.training.step, self.training.device))

    def row(self, part: str, peak_mb: float | None) -> dict[str, Any]:
        """The row of the case."""
        case, verdict = self.training.case, self.verdict
        row: dict[str, Any] = {"phase": "train", "part": part, **case.columns()}
        row |= {
            "device": self.training.device,
            "threads": torch.get_num_threads(),
            "projection": case.variant.projection,
            "l0": self.training.l0(),
            "correct": self.failure is None,
            "failure": self.failure,
            "error": verdict.error if verdict else None,
            "dense_error": verdict.dense_error if verdict else None,
            "peak_mb": peak_mb,
            **dict.fromkeys(results.TIMED),
        }
        if self.failure is not None or not self.steps_s:
            return row
        ordinary, period = summarize(self.steps_s), self.training.period
        change_ms = 0.0
        if self.rewiring_s:
            change_ms = summarize(self.rewiring_s).median_ms - 2 * ordinary.median_ms
        step_ms = ordinary.median_ms + change_ms / period
        parts_ms = None
        if self.parts_ms:
            parts_ms = scaled(self.parts_ms, ordinary.median_ms)
            parts_ms["topology"] += change_ms / period
        sizes = state_bytes(self.training)
        return row | {
            "step_ms": step_ms,
            "tokens_per_s": 1e3 * case.shape.tokens / step_ms,
            "ordinary_ms": ordinary.median_ms,
            "rewiring_ms": ordinary.median_ms + change_ms if self.rewiring_s else None,
            "period": period if self.rewiring_s else None,
            "spread_ms": ordinary.spread_ms,
            "samples": ordinary.samples,
            "samples_ms": [round(1e3 * seconds, 2) for seconds in self.steps_s],
            "parts_ms": parts_ms,
            "instrumented_ms": min((sum(p.values()) for p in self.parts_ms), default=None),
            "state_mb": sizes["state"] / 1e6,
            "bigram_mb": sizes["bigram"] / 1e6,
            "patterns_mb": sizes["patterns"] / 1e6,
            "loss": self.training.loss,
        }


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_group(group: Group, device: str, *, smoke: bool) -> list[dict[str, Any]]:
    """The rows of a group."""
    start = time.perf_counter()
    rounds = 1 if smoke else ROUNDS
    count = len(group.cases)
    peaks: list[float | None] = [None] * count
    measured: list[Measured] = []
    with report.progress(total=count * (1 + rounds + group.memory)) as bar:
        for number, case in enumerate(group.cases if group.memory else ()):
            if number == 0 or not smoke:
                bar.set_description(f"memory of {case.label}")
                peaks[number] = memory.measure_peak_mb(case, device=device, phase="train")
            bar.update()
        for case in group.cases:
            bar.set_description(f"check {case.label}")
            measured.append(Measured(case, device))
            if measured[-1].failure is None:
                measured[-1].warm_up()
            bar.update()
        with _without_collection():
            round_s = 0.0
            for _ in range(rounds):
                round_start = time.perf_counter()
                if round_start - start + round_s > PART_S and round_s:
                    break
                for one in measured:
                    bar.set_description(f"time {one.training.case.label}")
                    one.take_turn(1 if smoke else MAX_STEPS)
                    bar.update()
                round_s = time.perf_counter() - round_start
    return [one.row(group.part, peak) for one, peak in zip(measured, peaks, strict=True)]


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, Python does not collect garbage."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def measure(options: Options, parts: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each group."""
    on_gpu = options.device != "cpu"
    shape = SMOKE_MODEL if options.smoke else GPU_MODEL if on_gpu else Shape()
    reason = None if on_gpu else why_no_bf16_dense(shape, backward=True)
    if reason is not None and "default" in parts:
        print(reason, flush=True)
    for group in groups(parts, shape, on_gpu=on_gpu, bf16_dense=reason is None):
        yield measure_group(group, options.device, smoke=options.smoke)


BENCHMARK = Benchmark("training", __doc__ or "", PARTS, ("default",), measure)
main = partial(run_program, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
