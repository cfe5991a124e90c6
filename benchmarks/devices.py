"""The devices that a benchmark runs on: what to compare with there, the bound, the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks import baselines, peaks, peers, report, roofline, timing
from benchmarks.baselines import Operands
from benchmarks.timing import Candidate, Timing
from sparse_kernels import cpu
from sparse_transformer import keep_freed_memory

NAMES = ("cpu", "cuda")


@dataclass(frozen=True)
class Baselines:
    """The other ways to compute one product; what a device does not have is left out.

    Args:
        masked: masked dense as users run it, as "masked dense", and "compiled masked".
        dense: plain dense, by a name that ends with the precision of the multiplications.
        same_dtype: which of these has the dtype of the case and no tricks.
        sparse: other sparse libraries, by name and form.
        isolated: ours with fewer resources, as "one thread"; compared with ours and nothing else.
        notes: column of a row -> a sentence that says why it is empty.
    """

    masked: Mapping[str, Candidate]
    dense: Mapping[str, Candidate]
    same_dtype: str
    sparse: Mapping[str, Candidate]
    isolated: Mapping[str, Candidate] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class BoundLike(Protocol):
    """The terms of a lower bound of the time of one product."""

    @property
    def ms(self) -> float: ...
    @property
    def peak_ms(self) -> float: ...
    @property
    def limit(self) -> str: ...


class Device(Protocol):
    """What a benchmark asks of the device that it runs on."""

    name: str  # torch's name of the device type
    backend: str | None  # measured unless the user names another; None: the one sk chooses

    def prepare(self, *, smoke: bool) -> list[str]:
        """Measures the peaks and sets the allocator; returns sentences about what is missing."""
        ...

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        """What a reader needs to judge or repeat the numbers."""
        ...

    def baselines(self, operands: Operands, product: str, ours: Candidate) -> Baselines:
        """What ours is compared with."""
        ...

    def bound(self, work: roofline.Work, dtype: str) -> BoundLike | None:
        """The least time that `work` takes, or None if nothing was measured."""
        ...

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Warms the candidates up and guesses their times, in seconds."""
        ...

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: timing.Budget,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        """Times the candidates in turns; also says in some words how."""
        ...  # fmt: skip


def why_not(name: str) -> str | None:
    """None if a benchmark can run on that device here, else a sentence."""
    if name not in NAMES:
        return f"it must be one of {', '.join(NAMES)}, got {name!r}"
    if name == "cuda" and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return (
            "PyTorch finds no GPU (torch.cuda.is_available() is False, "
            f"torch {torch.__version__} was built {built})"
        )
    return None


def connect(name: str) -> Device:
    """The device of that name."""
    if name == "cuda":
        from benchmarks.gpu.device import Gpu

        return Gpu()
    return Processor()


class Processor:
    """The processor, with the threads that torch has."""

    name = "cpu"
    backend: str | None = "cpu"

    def __init__(self) -> None:
        self._peaks: roofline.Peaks | None = None
        self._keeps_freed_memory = False

    def prepare(self, *, smoke: bool) -> list[str]:
        # For every candidate alike: otherwise each large result starts with page faults, which can
        # take longer than the product.
        self._keeps_freed_memory = keep_freed_memory()
        if not cpu.isas():
            return peers.missing()
        sizes = peaks.SMOKE_SIZES if smoke else peaks.SIZES
        found = peaks.measure(cpu.isa(), torch.get_num_threads(), sizes)
        if isinstance(found, str):
            return [found, *peers.missing()]
        self._peaks = found
        return peers.missing()

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        isa = cpu.isa() if cpu.isas() else None
        found = None if self._peaks is None else self._peaks.as_dict()
        machine = report.describe_machine(command, isa=isa, peaks=found)
        versions = {name: report.version_of(name) for name in ("scipy", "sparselab", "mkl")}
        return machine | {"keeps_freed_memory": self._keeps_freed_memory, "peers": versions}

    def baselines(self, operands: Operands, product: str, ours: Candidate) -> Baselines:
        case = operands.case
        is_bf16 = case.dtype == "bfloat16"
        notes = {}
        why_no_bf16 = baselines.why_no_bf16_dense(operands, product)
        if why_no_bf16 is not None:
            notes["bf16_dense_note"] = why_no_bf16
        sparse: dict[str, Candidate] = {}
        why_no_peer = peers.why_none(case)
        if why_no_peer is None:
            sparse, wrong = peers.candidates(operands, product, ours)
            why_no_peer = "; ".join(wrong) or None
        if why_no_peer is not None:
            notes["sparse_note"] = why_no_peer
        masked = {"masked dense": baselines.masked_dense(operands, product)}
        isolated = {}
        if case.has_goal and not is_bf16 and torch.get_num_threads() > 1:
            isolated = {"one thread": baselines.on_one_thread(ours)}
        return Baselines(
            masked={} if is_bf16 and why_no_bf16 else masked,
            dense=baselines.dense_candidates(operands, product, bf16=why_no_bf16 is None),
            same_dtype="torch bf16" if is_bf16 else "torch fp32",
            sparse=sparse,
            isolated=isolated,
            notes=notes,
        )

    def bound(self, work: roofline.Work, dtype: str) -> BoundLike | None:
        if self._peaks is None:
            return None
        return roofline.bound(work, self._peaks, is_bf16=dtype == "bfloat16")

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        return timing.estimate_s(candidates)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        budget: timing.Budget,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        timings = timing.interleave(
            candidates,
            budget_s=budget.seconds,
            repeats=budget.repeats,
            limit_s=budget.limit_s,
            estimates=estimates,
        )
        return timings, "wall clock, in turns"  # fmt: skip
