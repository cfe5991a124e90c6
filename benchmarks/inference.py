"""Times a forward of the weight-sparse transformer, for a prompt and token by token.

    python -m benchmarks.inference                 d_model 2048, 8 layers, density 1/256
    python -m benchmarks.inference --part decode   only that
    python -m benchmarks.inference --smoke         tiny, in seconds
    python -m benchmarks.inference --from FILE     the tables of a result file; measures nothing

    prefill   one prompt of 256 tokens, without a cache
    decode    one more token for each of a batch of 1 or 16, keys and values of 128 in the cache

The variants take turns in one process, in float32 and with everything in bfloat16:

    sparse         SparseLinear
    masked_dense   dense matrices that hold the zeros already, with our abs_topk: the fastest that
                   masked dense can be
    dense          nn.Linear without AbsTopK: the plain model

Correctness comes first: the logits of the sparse model, also those from the cache, must be those
of masked dense with the same weights. Otherwise its rows say FAIL and the exit status is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import report, timing
from benchmarks.timing import Timing
from benchmarks.transformer import memory, results
from benchmarks.transformer.check import Verdict, check, densified
from benchmarks.transformer.parts import measure_parts, scaled
from benchmarks.transformer.program import Benchmark, Options
from benchmarks.transformer.program import main as run_program
from benchmarks.transformer.variants import (
    DENSE,
    LARGE_MODEL,
    MASKED_DENSE_KERNEL,
    SMOKE_MODEL,
    SPARSE,
    Case,
    Shape,
    make_model,
    pattern_bytes,
    why_no_bf16_dense,
)
from sparse_transformer import KVCache, Transformer

PARTS = ("prefill", "decode")


@dataclass(frozen=True)
class Call:
    """What is timed: T tokens for each of a batch, after `before` tokens in the cache, if any."""

    phase: str
    batch: int
    tokens: int
    before: int
    repeats: int


def calls(shape: Shape, *, smoke: bool) -> list[Call]:
    """Everything that is timed, in order."""
    few, many = (2, 2) if smoke else (5, 31)
    half = shape.context // 2
    return [
        Call("prefill", 1, shape.context, 0, few),
        Call("decode", 1, 1, half, many),
        Call("decode", 16, 1, half, many),
    ]


@dataclass(frozen=True)
class Contender:
    """A model of a case, ready to run."""

    case: Case
    model: Transformer
    peak_mb: float | None

    def candidate(self, call: Call, device: str) -> Callable[[], torch.Tensor]:
        """The call on this model."""
        generator = torch.Generator().manual_seed(2)
        size = (call.batch, call.tokens)
        tokens = torch.randint(self.case.shape.vocab_size, size, generator=generator).to(device)
        cache = None
        if call.phase == "decode":
            dtype = self.case.torch_dtype
            cache = KVCache(self.model.config, call.batch, device=device, dtype=dtype)

        def run() -> torch.Tensor:
            if cache is not None:
                cache.length = call.before
            with torch.inference_mode():
                logits: torch.Tensor = self.model(tokens, cache)
            if device != "cpu":
                torch.cuda.synchronize()
            return logits

        return run


def cases(shape: Shape, *, bf16_dense: bool) -> list[Case]:
    """Every model that is timed."""
    return [
        Case(shape, variant, dtype)
        for dtype in ("float32", "bfloat16")
        for variant in (SPARSE, MASKED_DENSE_KERNEL, DENSE)
        if variant == SPARSE or dtype == "float32" or bf16_dense
    ]


def make_contender(
    case: Case, sparse: Transformer, peak_mb: float | None, device: str
) -> Contender:
    """The model of a case; masked dense has the weights of `sparse`."""
    masked = case.variant == MASKED_DENSE_KERNEL
    model = densified(sparse, case.shape) if masked else make_model(case, device)
    return Contender(case, model.to(case.torch_dtype).eval(), peak_mb)


def measure_call(
    call: Call, contenders: Sequence[Contender], verdict: Verdict, device: str
) -> list[dict[str, Any]]:
    """The rows of a call."""
    failed = [verdict.failure is not None and c.case.variant == SPARSE for c in contenders]
    timed = {
        str(number): contender.candidate(call, device)
        for number, contender in enumerate(contenders)
        if not failed[number]
    }
    timings = timing.interleave(timed, repeats=call.repeats)
    rows = []
    for number, contender in enumerate(contenders):
        row = describe(call, contender, device)
        if contender.case.variant == SPARSE:
            row |= {"error": verdict.error, "dense_error": verdict.dense_error}
        if failed[number]:
            row |= {"correct": False, "failure": verdict.failure}
        else:
            candidate = timed[str(number)]
            parts = [measure_parts(candidate, device) for _ in range(call.repeats)]
            row |= columns(call, contender.model, timings[str(number)], parts)
        rows.append(row)
    return rows


def describe(call: Call, contender: Contender, device: str) -> dict[str, Any]:
    """A row with nothing measured yet."""
    case = contender.case
    return {
        "phase": call.phase,
        **case.columns(),
        # Its mask is applied already, so there is only one masked dense.
        "variant": "masked_dense" if case.variant == MASKED_DENSE_KERNEL else case.variant.name,
        "tokens": call.batch * call.tokens,
        "batch": call.batch,
        "cached": call.before,
        "device": device,
        "threads": torch.get_num_threads(),
        "peak_mb": contender.peak_mb if call.phase == "prefill" else None,
        "correct": True,
        "failure": None,
        "error": None,
        "dense_error": None,
        **dict.fromkeys(results.TIMED),
    }


def columns(
    call: Call, model: Transformer, taken: Timing, parts: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The columns of a row that is correct; the state is the weights alone."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    bigram = 0 if model.bigram is None else model.bigram.numel() * model.bigram.element_size()
    return {
        "step_ms": taken.median_ms,
        "spread_ms": taken.spread_ms,
        "samples": taken.samples,
        "tokens_per_s": 1e3 * call.batch * call.tokens / taken.median_ms,
        "parts_ms": scaled(parts, taken.median_ms),
        "instrumented_ms": min(sum(sample.values()) for sample in parts),
        "state_mb": (weights - bigram) / 1e6,
        "bigram_mb": bigram / 1e6,
        "patterns_mb": pattern_bytes(model) / 1e6,
    }


def measure(options: Options, parts: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each call."""
    device = options.device
    shape = SMOKE_MODEL if options.smoke else LARGE_MODEL
    reason = None if device != "cpu" else why_no_bf16_dense(shape, backward=False)
    if reason is not None:
        print(reason, flush=True)
    chosen = [call for call in calls(shape, smoke=options.smoke) if call.phase in parts]
    wanted = cases(shape, bf16_dense=reason is None)
    with report.progress(total=2 * len(wanted) + len(chosen)) as bar:
        sparse = make_model(Case(shape, SPARSE), device)
        verdict = check(sparse, shape, inference=True)
        peaks: list[float | None] = []
        for number, case in enumerate(wanted):
            bar.set_description(f"memory of {case.label}")
            measured = "prefill" in parts and (number == 0 or not options.smoke)
            peaks.append(
                memory.measure_peak_mb(case, device=device, phase="prefill") if measured else None
            )
            bar.update()
        contenders = []
        for case, peak_mb in zip(wanted, peaks, strict=True):
            bar.set_description(f"make {case.label}")
            contenders.append(make_contender(case, sparse, peak_mb, device))
            bar.update()
        for call in chosen:
            bar.set_description(f"{call.phase}, batch {call.batch}")
            rows = measure_call(call, contenders, verdict, device)
            bar.update()
            yield rows


BENCHMARK = Benchmark("inference", __doc__ or "", PARTS, PARTS, measure)
main = partial(run_program, BENCHMARK)

if __name__ == "__main__":
    sys.exit(main())
