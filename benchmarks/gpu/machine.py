"""The GPU as a benchmark sees it; see `benchmarks.machine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import report, roofline
from benchmarks.baselines import Operands
from benchmarks.gpu import baselines
from benchmarks.gpu.ceilings import GpuCeilings, bound, measure
from benchmarks.gpu.clock import Clock
from benchmarks.machine import BoundLike, Rivals
from benchmarks.timing import Candidate, Timing


class Gpu:
    """PyTorch's current GPU, or another device, for tests."""

    backend: str | None = None

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cuda", torch.cuda.current_device())
        self.name = self._device.type
        self._clock = Clock(self._device)
        self._ceilings: GpuCeilings | None = None

    def prepare(self, *, smoke: bool) -> None:
        self._ceilings = measure(self._device, self._clock, smoke=smoke)

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        ceilings = None if self._ceilings is None else self._ceilings.as_dict()
        machine = report.describe_machine(command, isa=None, ceilings=ceilings)
        return machine | {"gpu": describe_gpu(self._device, self._clock.flushed_bytes)}

    def rivals(self, operands: Operands, product: str, ours: Candidate) -> Rivals:
        compiles = operands.case.is_target
        sparse, notes = baselines.sparse_candidates(operands, product)
        if not compiles:
            notes["compiled_masked_note"] = "compiled and tuned in the promised cases alone"
        return Rivals(
            masked=baselines.masked_candidates(operands, product, compiled=compiles),
            dense=baselines.dense_candidates(operands, product),
            same_dtype=baselines.same_dtype(operands),
            sparse=sparse,
            notes=notes,
        )

    def bound(self, work: roofline.Work, dtype: str) -> BoundLike | None:
        return None if self._ceilings is None else bound(work, self._ceilings, dtype)

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        return self._clock.estimate_s(candidates)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        *,
        budget_s: float,
        repeats: int | None,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        return self._clock.interleave(
            candidates, budget_s=budget_s, repeats=repeats, estimates=estimates
        )


def why_no_gpu() -> str | None:
    """None if PyTorch has a GPU, else a sentence."""
    if torch.cuda.is_available():
        return None
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return (
        "PyTorch finds no GPU (torch.cuda.is_available() is False, "
        f"torch {torch.__version__} was built {built})"
    )


def describe_gpu(device: torch.device, flushed_bytes: int) -> dict[str, Any]:
    """Name, size and software of the GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "driver": report.output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "cuda": torch.version.cuda,
        "triton": report.version_of("triton"),
        "tf32_in_ours": torch.backends.cuda.matmul.allow_tf32,
        "flushed_bytes": flushed_bytes,
    }
