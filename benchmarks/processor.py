"""The processor as a benchmark sees it; see `benchmarks.machine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import baselines, report, roofline, timing
from benchmarks.baselines import Operands
from benchmarks.machine import BoundLike, Rivals
from benchmarks.timing import Candidate, Timing
from sparse_kernels import cpu


class Processor:
    """The processor, with the threads that torch has."""

    name = "cpu"
    backend: str | None = "cpu"

    def __init__(self) -> None:
        self._ceilings: roofline.Ceilings | None = None
        self._keeps_freed_memory = False

    def prepare(self, *, smoke: bool) -> None:
        # For every candidate alike: otherwise each large result starts with page faults, which can
        # take longer than the product.
        self._keeps_freed_memory = cpu.keep_freed_memory()
        if cpu.isas():
            sizes = roofline.SMOKE_SIZES if smoke else roofline.SIZES
            self._ceilings = roofline.measure(cpu.isa(), torch.get_num_threads(), sizes)

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        ceilings = None if self._ceilings is None else self._ceilings.as_dict()
        isa = cpu.isa() if cpu.isas() else None
        machine = report.describe_machine(command, isa=isa, ceilings=ceilings)
        return machine | {"keeps_freed_memory": self._keeps_freed_memory}

    def rivals(self, operands: Operands, product: str, ours: Candidate) -> Rivals:
        case = operands.case
        is_bf16 = case.dtype == "bfloat16"
        notes = {}
        why_no_bf16 = baselines.why_no_bf16_dense(operands, product)
        if why_no_bf16 is not None:
            notes["bf16_dense_note"] = why_no_bf16
        why_no_csr = baselines.why_no_csr(case)
        if why_no_csr is not None:
            notes["torch_csr_note"] = why_no_csr
        times_masked = not (is_bf16 and why_no_bf16)
        masked = {"masked dense": baselines.masked_dense(operands, product)} if times_masked else {}
        alone = {}
        if case.is_target and not is_bf16 and torch.get_num_threads() > 1:
            alone = {"one thread": baselines.on_one_thread(ours)}
        return Rivals(
            masked=masked,
            dense=baselines.dense_candidates(operands, product, bf16=why_no_bf16 is None),
            same_dtype="torch bf16" if is_bf16 else "torch fp32",
            sparse={} if why_no_csr else {"csr": baselines.csr_candidates(operands, product)},
            alone=alone,
            notes=notes,
        )

    def bound(self, work: roofline.Work, dtype: str) -> BoundLike | None:
        if self._ceilings is None:
            return None
        return roofline.bound(work, self._ceilings, is_bf16=dtype == "bfloat16")

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        return timing.estimate_s(candidates)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        *,
        budget_s: float,
        repeats: int | None,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        timings = timing.interleave(
            candidates, budget_s=budget_s, repeats=repeats, estimates=estimates
        )
        return timings, "wall clock, in turns"
