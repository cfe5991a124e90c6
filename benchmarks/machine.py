"""What a benchmark asks of the machine that it runs on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks import roofline
from benchmarks.baselines import Operands
from benchmarks.timing import Candidate, Timing


@dataclass(frozen=True)
class Rivals:
    """The other ways to compute one product; what a machine does not have is left out.

    Args:
        masked: masked dense as users run it, as "masked dense", and "compiled masked".
        dense: plain dense, by a name that ends with the precision of the multiplications.
        same_dtype: which of these has the dtype of the case and no tricks.
        sparse: torch's sparse matrices: for each kind, "csr" or "bsr", the forms that it has.
        alone: ours with fewer resources, as "one thread"; compared with ours and nothing else.
        notes: column of a row -> a sentence that says why it is empty.
    """

    masked: Mapping[str, Candidate]
    dense: Mapping[str, Candidate]
    same_dtype: str
    sparse: Mapping[str, Mapping[str, Candidate]]
    alone: Mapping[str, Candidate] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class BoundLike(Protocol):
    """The terms of a lower bound of the time of one product."""

    @property
    def ms(self) -> float: ...
    @property
    def peak_ms(self) -> float: ...
    @property
    def limit(self) -> str: ...


class Machine(Protocol):
    """What a benchmark asks of the device that it runs on."""

    name: str  # torch's name of the device type
    backend: str | None  # which of ours is measured unless the user says so; None: the one chosen

    def prepare(self, *, smoke: bool) -> None:
        """Measures what the machine can do, and sets what is set for every candidate alike."""
        ...

    def describe(self, command: Sequence[str]) -> dict[str, Any]:
        """What a reader needs to judge or repeat the numbers."""
        ...

    def rivals(self, operands: Operands, product: str, ours: Candidate) -> Rivals:
        """What there is to beat."""
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
        *,
        budget_s: float,
        repeats: int | None,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        """Times the candidates in turns; also says in some words how."""
        ...
