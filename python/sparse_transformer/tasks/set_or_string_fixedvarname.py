"""set_or_string_fixedvarname: `set_or_string` with the same variable in all pairs, `result`.

result = set()                  result = ''
for name in names:              for name in names:
    result       ->  .              result        ->   +=
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import set_or_string
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    return set_or_string.draft(random, ("result",))


TASK = Task(
    name="set_or_string_fixedvarname",
    description="As set_or_string, and the variable is always called result.",
    draw=_draw,
    first_token=True,
)
