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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

Candidate = Callable[[], object]
# Seconds per call, over so many calls in a row.
Sampler = Callable[[Candidate, int], float]

# A sample lasts at least this long: 1000 times what two readings of the clock take.
MIN_SAMPLE_S = 2e-4
# A first call longer than this is not repeated before the turns.
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


def interleave(
    candidates: Mapping[str, Candidate],
    groups: Iterable[Collection[str]] = (),
    *,
    budget_s: float = 0.5,
    limit_s: float = math.inf,
    min_samples: int = MIN_SAMPLES,
    sampler: Sampler = sample_s,
) -> dict[str, Timing]:
    """Times the candidates in turns and returns the Timing of each.

    The first calls pay for pages, threads, packed copies and lazily built schedules, so they are no
    samples. They say how many calls make a sample; where one is short, the best of three does.

    Args:
        candidates: name -> the call to time.
        groups: names among which only the fastest matters. One that takes `HOPELESS` times as long
            as the fastest of each of its groups sits out from then on, after the first call already
            if that takes `HOPELESS` squared times as long; it keeps what was measured.
        budget_s: after about this long no further round starts, but every candidate gets at
            least `min_samples`, at most 101. A slow candidate sits out once it has used up an equal
            share of the time.
        limit_s: after this long each has at least one sample, and no further round starts.
        min_samples: see `budget_s`.
        sampler: takes one sample; by default with the processor's clock.
    """
    groups = list(groups)
    guesses = {name: sampler(call, 1) for name, call in candidates.items()}
    hopeless = _hopeless(guesses, groups, HOPELESS**2)
    for name in guesses:
        if guesses[name] <= LONG_S:
            guesses[name] = min(guesses[name], *(sampler(candidates[name], 1) for _ in range(2)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    share_s = budget_s / max(1, len(candidates))

    def needs_more(name: str) -> bool:
        has_enough = len(samples[name]) >= min_samples and spent[name] > share_s
        return not (name in hopeless or has_enough)

    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(MAX_SAMPLES):
            turn = [name for name in candidates if needs_more(name)]
            for name in turn:
                calls = max(1, math.ceil(MIN_SAMPLE_S / max(guesses[name], 1e-9)))
                seconds = sampler(candidates[name], calls)
                samples[name].append(seconds)
                spent[name] += seconds * calls
            latest = {name: min(samples[name], default=guesses[name]) for name in candidates}
            hopeless |= _hopeless(latest, groups, HOPELESS)
            if not turn or sum(spent.values()) >= limit_s:
                break
    finally:
        if collects:
            gc.enable()
    return {name: summarize(values or [guesses[name]]) for name, values in samples.items()}


def _hopeless(
    seconds: Mapping[str, float], groups: Iterable[Collection[str]], times: float
) -> set[str]:
    """Those that take more than `times` as long as the fastest of each of their groups."""
    limits: dict[str, float] = {}
    for group in groups:
        fastest = min(seconds[name] for name in group)
        limits |= {name: max(limits.get(name, 0.0), times * fastest) for name in group}
    return {name for name, limit in limits.items() if seconds[name] > limit}
