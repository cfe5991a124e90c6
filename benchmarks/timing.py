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
# A candidate that takes longer than this is content with fewer samples.
SLOW_S = 0.15
# One that takes longer than this is timed once: nothing around it can matter by much.
VERY_SLOW_S = 1.0
MIN_SAMPLES, MIN_SAMPLES_SLOW, MAX_SAMPLES = 5, 3, 101


@dataclass(frozen=True)
class Timing:
    """Median and spread (interquartile range), in milliseconds, over `samples` samples."""

    median_ms: float
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


def estimate_s(call: Candidate, sampler: Sampler = sample_s) -> float:
    """Warms a candidate up and returns a first guess of its time: the best of up to three calls.

    The first call pays for pages, threads, packed copies and lazily built schedules.
    """
    first = sampler(call, 1)
    more = 2 if first < SLOW_S else 1 if first < VERY_SLOW_S else 0
    return min((sampler(call, 1) for _ in range(more)), default=first)


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    estimates: Mapping[str, float],
    budget_s: float = 0.5,
    repeats: int | None = None,
    limit_s: float = math.inf,
    sampler: Sampler = sample_s,
) -> dict[str, Timing]:
    """Times the candidates, which are warm, in turns and returns the Timing of each.

    Args:
        candidates: name -> the call to time.
        estimates: name -> what `estimate_s` said.
        budget_s: after about this long no further round starts, but every candidate gets at
            least 5 samples (3 if it takes longer than 0.15 s; one that takes more than a second
            keeps its estimate), at most 101. A slow candidate sits out once it has used up an
            equal share of the time.
        repeats: take exactly so many samples of each instead.
        limit_s: after this long no further round starts, even if some have fewer samples, at
            least one, than `budget_s` would give them.
        sampler: takes one sample; by default with the processor's clock.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    turns = dict(candidates)
    if not repeats:
        for name in candidates:
            if estimates[name] > VERY_SLOW_S:
                samples[name].append(estimates[name])
                del turns[name]
    calls = {name: max(1, math.ceil(MIN_SAMPLE_S / max(estimates[name], 1e-9))) for name in turns}
    least = {name: MIN_SAMPLES_SLOW if estimates[name] > SLOW_S else MIN_SAMPLES for name in turns}
    wanted = dict.fromkeys(turns, repeats) if repeats else least
    share_s = 0.0 if repeats else budget_s / max(1, len(candidates))
    spent = dict.fromkeys(turns, 0.0)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats or MAX_SAMPLES):
            total_s = sum(spent.values())
            if all(len(samples[n]) >= wanted[n] for n in turns) and total_s >= budget_s:
                break
            if all(samples.values()) and total_s >= limit_s:
                break
            for name, call in turns.items():
                if len(samples[name]) < wanted[name] or spent[name] <= share_s:
                    seconds = sampler(call, calls[name])
                    samples[name].append(seconds)
                    spent[name] += seconds * calls[name]
    finally:
        if collects:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}
