"""Where the numbers of edges stand, so that they touch neither each other nor other edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Point = tuple[float, float]

# Where along a segment, the best first.
_PLACES = (0.5, 0.42, 0.58, 0.34, 0.66, 0.27, 0.73, 0.2, 0.8, 0.14, 0.86)
_ALONG = np.linspace(0.02, 0.98, 33)
# In a gap, the strongest: where there are more nobody can read them all.
_MOST_PLACED = 250


def curve(start: Point, end: Point) -> tuple[Point, Point]:
    """The two control points of the cubic that leaves and arrives vertically."""
    middle = (start[1] + end[1]) / 2
    return (start[0], middle), (end[0], middle)


def points_of(start: Point, end: Point, at: np.ndarray) -> np.ndarray:
    """Points `(N, 2)` of that cubic at the parameters `(N,)`."""
    corners = np.array([start, *curve(start, end), end])
    rest = 1 - at
    powers = np.stack([rest**3, 3 * rest**2 * at, 3 * rest * at**2, at**3], 1)
    return powers @ corners


def place_numbers(
    segments: Sequence[tuple[Point, Point]],
    sizes: Mapping[int, tuple[float, float]],
    order: Sequence[int],
) -> dict[int, tuple[Point, bool]]:
    """Chooses a place on its segment for each number of one gap between rows.

    Args:
        segments: all that cross the gap.
        sizes: width and height of the numbers, by the place of their segment in `segments`.
        order: the keys of `sizes`; the first ones get the best places, and the last of very many
            get none.

    Returns:
        The centre of each, and whether it touches no other number there.
    """
    if not segments:
        return {}
    lines = np.concatenate([points_of(start, end, _ALONG) for start, end in segments])
    owners = np.repeat(np.arange(len(segments)), len(_ALONG))
    by_x = np.argsort(lines[:, 0], kind="stable")
    lines, owners = lines[by_x], owners[by_x]
    taken = np.empty((0, 4))  # centre, then half the size
    found: dict[int, tuple[Point, bool]] = {}
    for number in order[_MOST_PLACED:]:
        (x0, y0), (x1, y1) = segments[number]
        found[number] = ((x0 + x1) / 2, (y0 + y1) / 2), False
    for number in order[:_MOST_PLACED]:
        half = np.array(sizes[number]) / 2
        candidates = points_of(*segments[number], np.array(_PLACES))
        reach = candidates[:, 0].min() - half[0], candidates[:, 0].max() + half[0]
        near = slice(*np.searchsorted(lines[:, 0], reach))
        others = lines[near][owners[near] != number]
        # (candidates, others): what lies within the number there.
        covers = (np.abs(candidates[:, None] - others) <= half).all(-1).sum(1)
        apart = np.abs(candidates[:, None] - taken[:, :2]) - (half + taken[:, 2:])
        touches = (apart < 0).all(-1).sum(1)
        best = int(np.argmin(touches * len(lines) + covers))
        centre = candidates[best]
        taken = np.vstack([taken, np.concatenate([centre, half])])
        found[number] = (float(centre[0]), float(centre[1])), not touches[best]
    return found
