"""How long finding a circuit may take: `Budget` says it, `Progress` keeps it and shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from tqdm import tqdm

from sparse_transformer.ranges import need


@dataclass(frozen=True)
class Budget:
    """Limits of the search for one circuit.

    Where `seconds` are too few, there are fewer trials, steps and held-out prompts, and less is
    pruned. How much depends on the machine, so two runs then differ.

    Attributes:
        seconds: time for one circuit, its validation, controls and drawing included.
        trials: number of hyperparameter trials, including those of an interrupted search.
        steps: training steps of a mask.
        pairs: prompt pairs per training step.
        finalists: number of best trials that are pruned further.
        test_pairs: held-out prompt pairs in each of three draws.
    """

    seconds: float = 600.0
    trials: int = 3
    steps: int = 150
    pairs: int = 16
    finalists: int = 3
    test_pairs: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            need(value > 0, field.name, "above 0", value)

    def within(self, seconds: float, step: float) -> Budget:
        """The same with as many trials and steps as these seconds allow, if each takes `step`."""
        # Few trials with many steps are better than many with few.
        steps = int(seconds / step)
        trials = min(self.trials, max(1, steps // self.steps))
        return replace(self, trials=trials, steps=min(self.steps, max(1, steps // trials)))


class Progress:
    """One bar for all steps, and the time that is left for the present one.

    Attributes:
        laps: seconds that each step took.
        reserved: seconds that the steps leave for something else.
    """

    def __init__(self, seconds: float = math.inf, *, shown: bool | None = False) -> None:
        """
        Args:
            seconds: for everything.
            shown: whether there is a bar; None: where stderr is a terminal.
        """
        self.laps: dict[str, float] = {}
        self.reserved = 0.0
        self._began = time.monotonic()
        self._seconds = self._limit = seconds
        self._span = (0.0, 1.0)
        self._bar = tqdm(
            total=1.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            disable=None if shown is None else not shown,
            leave=False,
        )

    @property
    def left(self) -> float:
        """Seconds until the present step should end; below 0 if it is late."""
        return self._began + self._limit - time.monotonic()

    @contextmanager
    def step(self, name: str, until: float) -> Iterator[None]:
        """A step, which ends at this share of all; it gets its part of the time that is left."""
        began, at = time.monotonic(), self._span[0]
        self._bar.set_description(name)
        used = began - self._began
        left = max(0.0, self._seconds - self.reserved - used)
        self._limit = used + left * (until - at) / max(1 - at, 1e-9)
        self._span = at, until
        yield
        self.advance(1.0)
        self._limit, self._span = self._seconds, (until, 1.0)
        self.laps[name] = round(time.monotonic() - began, 1)

    @contextmanager
    def part(self, first: float, last: float) -> Iterator[None]:
        """The part of the present step from the share `first` to `last`, and its time."""
        limit, (low, high) = self._limit, self._span
        used = time.monotonic() - self._began
        self._limit = used + max(0.0, self.left) * (last - first) / (1 - first)
        self._span = low + (high - low) * first, low + (high - low) * last
        yield
        self.advance(1.0)
        self._limit, self._span = limit, (low, high)

    def advance(self, done: float, **notes: int) -> None:
        """Moves the bar to this share of the present step or part."""
        low, high = self._span
        if notes:
            self._bar.set_postfix(notes, refresh=False)
        self._bar.update(max(0.0, low + (high - low) * min(done, 1.0) - self._bar.n))

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()
