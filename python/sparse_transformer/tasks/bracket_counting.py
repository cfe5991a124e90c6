"""bracket_counting: close one list, or two at once.

    rows = [[1, 2, 3        ->  ]]
    rows = [1, 2, 3         ->  ]

The fact is a second opening bracket; lists may stand in between. All is on one line.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    name = words.compound(random)
    start = random.choice(
        (
            *(f"{name} = ", f"{name} = ", f"{name} = ", f"self.{name} = ", f"return {name}, "),
            *("return ", f"{name} += ", f"self.{name}[:] = "),
        )
    )
    size = random.choice((1, 2, 2, 2, 3, 3, 3, 4, 5, 8))
    kind = random.random()
    rows = []
    for _ in range(random.choice((1, 1, 1, 1, 2, 2, 3))):
        if kind < 0.6:
            row = [str(random.randrange(10 if kind < 0.4 else 1000)) for _ in range(size)]
        elif kind < 0.85:
            row = words.variables(random, size)
        else:
            row = [f"{random.randrange(10)}.{random.randrange(10)}" for _ in range(size)]
        rows.append(", ".join(row))
    text = "], [".join(rows)
    return Draft(f"{lead}{start}[[{text}", f"{lead}{start}[{text}", "]]", "]")


TASK = Task(
    name="bracket_counting",
    description="Close two lists if a list of lists was opened, one if a list was.",
    draw=_draw,
)
