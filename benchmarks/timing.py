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
MIN_SAMPLES = 5
MIN_SAMPLES_SLOW = 3
MAX_SAMPLES = 101


@dataclass(frozen=True)
class Timing:
    """Median and spread (interquartile range), in milliseconds, over `samples` samples."""

    median_ms: float
    spread_ms: float
    samples: int


@dataclass(frozen=True)
class Budget:
    """How long candidates are timed: the arguments of `interleave` of the same names."""

    budget_s: float = 0.5
    repeats: int | None = None
    limit_s: float | None = None


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


def estimate_s(
    candidates: Mapping[str, Candidate], sampler: Sampler = sample_s
) -> dict[str, float]:
    """Warms each candidate up and returns a first guess of its time: the better of two calls.

    The first call pays for pages, threads, packed copies and lazily built schedules.
    """
    estimates = {}
    for name, call in candidates.items():
        first = sampler(call, 1)
        more = 2 if first < SLOW_S else 1 if first < VERY_SLOW_S else 0
        estimates[name] = min((sampler(call, 1) for _ in range(more)), default=first)
    return estimates


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    budget_s: float = 0.5,
    repeats: int | None = None,
    limit_s: float | None = None,
    estimates: Mapping[str, float] | None = None,
    sampler: Sampler = sample_s,
) -> dict[str, Timing]:
    """Times the candidates in turns and returns the Timing of each.

    Args:
        candidates: name -> the call to time.
        budget_s: after about this long no further round starts, but every candidate gets at
            least 5 samples (3 if it takes longer than 0.15 s; one that takes more than a second
            keeps its estimate), at most 101. A slow candidate sits out once it has used up an
            equal share of the time.
        repeats: take exactly so many samples of each instead.
        limit_s: after this long no further round starts, even if some have fewer samples, at
            least one, than `budget_s` would give them.
        estimates: what `estimate_s` said about these candidates, to not warm them up again.
        sampler: takes one sample; by default with the processor's clock.
    """
    guesses = estimate_s(candidates, sampler) if estimates is None else estimates
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    turns = dict(candidates)
    for name in candidates:
        if guesses[name] > VERY_SLOW_S and not repeats:
            samples[name].append(guesses[name])
            del turns[name]
    calls = {name: max(1, math.ceil(MIN_SAMPLE_S / max(guesses[name], 1e-9))) for name in turns}
    wanted = {
        name: repeats or (MIN_SAMPLES_SLOW if guesses[name] > SLOW_S else MIN_SAMPLES)
        for name in turns
    }
    share_s = budget_s / max(1, len(candidates))
    spent = dict.fromkeys(turns, 0.0)
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats or MAX_SAMPLES):
            done = all(len(samples[name]) >= wanted[name] for name in turns)
            if done and (repeats or sum(spent.values()) >= budget_s):
                break
            if limit_s is not None and all(samples.values()) and sum(spent.values()) >= limit_s:
                break
            for name, call in turns.items():
                if len(samples[name]) >= wanted[name] and (repeats or spent[name] > share_s):
                    continue
                seconds = sampler(call, calls[name])
                samples[name].append(seconds)
                spent[name] += seconds * calls[name]
    finally:
        if collects:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}
