"""Times a call on the GPU's own clock, from a cold second-level cache.

Before each call a buffer larger than the second-level cache is written, so no candidate finds its
operands there; the time from the event before the call to the event after it is the GPU's. While
the buffer is written the processor has time to queue the call. For a call so short that it may not
have (`GRAPH_BELOW_S`) everything in the turn is captured in CUDA graphs, which cost one launch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks import timing
from benchmarks.timing import Candidate, Timing

# The flush must not fit the cache, nor be so short that the processor falls behind.
FLUSH_CACHES = 4
FLUSH_MIN_BYTES = 256 * 2**20
# Where a candidate is faster than this, its launches may take as long as its kernels.
GRAPH_BELOW_S = 3e-4
WARM_UP_CALLS = 2


class Clock:
    """The events and the flushing buffer of one GPU.

    Attributes:
        flushed_bytes: how much is written before each call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flushed_bytes = max(FLUSH_CACHES * cache, FLUSH_MIN_BYTES)
        self._buffer = torch.empty(self.flushed_bytes // 4, dtype=torch.int32, device=device)

    def sample_s(self, call: Candidate, calls: int = 1) -> float:
        """Seconds per call by the GPU's clock, over `calls` calls that each start cold."""
        pairs = []
        for turn in range(calls):
            # Not zeros: some memory is faster with them.
            self._buffer.fill_(turn + 1)
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3 / calls

    def warm_up(self, candidates: Mapping[str, Candidate]) -> None:
        """Calls each candidate until what is compiled, tuned or derived at first use is there."""
        for call in candidates.values():
            for _ in range(WARM_UP_CALLS):
                call()
        torch.cuda.synchronize(self._device)

    def estimate_s(self, candidates: Mapping[str, Candidate]) -> dict[str, float]:
        """Warms the candidates up and guesses their times, in seconds."""
        self.warm_up(candidates)
        return timing.estimate_s(candidates, self.sample_s)

    def interleave(
        self,
        candidates: Mapping[str, Candidate],
        *,
        budget_s: float,
        repeats: int | None,
        estimates: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Timing], str]:
        """Times the candidates in turns; also says how: with events, or CUDA graphs.

        One that cannot be captured is queued call by call among the graphs, and named.
        """
        guesses = self.estimate_s(candidates) if estimates is None else estimates
        chosen, how = dict(candidates), "events"
        if min((guesses[name] for name in candidates), default=1.0) < GRAPH_BELOW_S:
            refused = []
            for name, call in candidates.items():
                try:
                    chosen[name] = capture(call)
                except RuntimeError:
                    # What torch raises where a call waits for the device, or allocates outside.
                    torch.cuda.synchronize(self._device)
                    refused.append(name)
            how = "CUDA graphs" + (f" (not {', '.join(refused)})" if refused else "")
        timings = timing.interleave(
            chosen,
            budget_s=budget_s,
            repeats=repeats,
            estimates={name: guesses[name] for name in chosen},
            sampler=self.sample_s,
        )
        return timings, f"{how}, cold L2"


def capture(call: Candidate) -> Candidate:
    """The replay of a CUDA graph of the call, which must have been called before.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> object:
        graph.replay()
        # Its memory is the graph's: it has to live as long as the replay can be called.
        return result

    return replay
