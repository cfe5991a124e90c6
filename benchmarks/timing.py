"""Times several ways of doing the same thing side by side, so that drift affects all equally.

The candidates take turns (ours, masked, dense, ..., ours, masked, ...): a machine that slows down,
a neighbour that wakes up or a cache that is cold for one is so for all. A sample of a short call is
the mean of several calls in a row, so that the clock's own cost and resolution do not count.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Candidate = Callable[[], object]
# Seconds per call, over so many calls in a row.
Sampler = Callable[[Candidate, int], float]

# A sample lasts at least this long: 1000 times what two readings of the clock take.
MIN_SAMPLE_S = 2e-4
# A candidate that takes longer than this is timed once: nothing around it can matter by much.
SLOW_S = 1.0
# The guess for a candidate that takes longer than this is one warm call, not the better of two.
LONG_S = 0.05
# A candidate that is this much slower than the fastest of its group cannot be the best one.
HOPELESS = 2.0
MIN_SAMPLES, MAX_SAMPLES = 5, 101


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range, in milliseconds, over `samples` samples."""

    time_ms: float
    spread_ms: float
    samples: int


def summarize(samples_s: Iterable[float]) -> Timing:
    """Median and interquartile range of samples in seconds; one sample has no spread, 0."""
    ordered = sorted(samples_s)
    if len(ordered) < 2:
        return Timing(ordered[0] * 1e3, 0.0, 1)
    lower, median, upper = statistics.quantiles(ordered, n=4, method="inclusive")
    return Timing(median * 1e3, (upper - lower) * 1e3, len(ordered))


def sample_s(call: Candidate, calls: int = 1) -> float:
    """Seconds per call, over `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def estimates_s(
    candidates: Mapping[str, Candidate],
    groups: Iterable[Iterable[str]] = (),
    sampler: Sampler = sample_s,
) -> dict[str, float]:
    """Warms the candidates up and returns a first guess of the time of each, in seconds.

    The first call pays for pages, threads, packed copies and lazily built schedules, so the guess
    is the best of three, or of two where a call is long. A long first call is the guess itself
    where it takes `HOPELESS` squared times that of the fastest in every group of the candidate.
    """
    first = {name: sampler(call, 1) for name, call in candidates.items()}
    hopeful = set(candidates) - {name for group in groups for name in group}
    for group in map(list, groups):
        limit = max(LONG_S, HOPELESS**2 * min(first[name] for name in group))
        hopeful |= {name for name in group if first[name] <= limit}

    def guess(name: str) -> float:
        more = 0 if first[name] > SLOW_S else 1 if first[name] > LONG_S else 2
        calls = more if name in hopeful else 0
        return min((sampler(candidates[name], 1) for _ in range(calls)), default=first[name])

    return {name: guess(name) for name in candidates}


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    estimates: Mapping[str, float],
    budget_s: float = 0.5,
    limit_s: float = math.inf,
    min_samples: int = MIN_SAMPLES,
    sampler: Sampler = sample_s,
) -> dict[str, Timing]:
    """Times the candidates, which are warm, in turns and returns the Timing of each.

    Args:
        candidates: name -> the call to time.
        estimates: name -> what `estimate_s` said.
        budget_s: after about this long no further round starts, but every candidate gets at
            least `min_samples`, at most 101; one that takes more than a second keeps its estimate.
            A slow candidate sits out once it has used up an equal share of the time.
        limit_s: after this long each has at least one sample, and no further round starts.
        min_samples: see `budget_s`.
        sampler: takes one sample; by default with the processor's clock.
    """
    slow = {name for name in candidates if estimates[name] > SLOW_S}
    samples = {name: [estimates[name]] if name in slow else [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    share_s = budget_s / max(1, len(candidates))

    def needs_more(name: str) -> bool:
        return name not in slow and (len(samples[name]) < min_samples or spent[name] <= share_s)

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(MAX_SAMPLES):
            is_late = sum(spent.values()) >= limit_s and all(samples.values())
            turn = [] if is_late else [name for name in candidates if needs_more(name)]
            if not turn:
                break
            for name in turn:
                calls = max(1, math.ceil(MIN_SAMPLE_S / max(estimates[name], 1e-9)))
                seconds = sampler(candidates[name], calls)
                samples[name].append(seconds)
                spent[name] += seconds * calls
    finally:
        if collects:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}
