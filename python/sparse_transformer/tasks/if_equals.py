"""if_equals: after a name a condition compares with `==`, a statement assigns with `=`.

    if mode       ->   ==
    mode          ->   =

The fact is the keyword before the name, `if` or `while`, or that there is none.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    # At the margin the name would be another token at the beginning of the line than in it.
    lead = lines.lead(random, random.choice((4, 4, 8, 8, 8)))
    name = words.compound(random)
    kind = random.random()
    if kind < 0.2:
        name = random.choice(words.LETTERS)
    elif kind < 0.4:
        name = f"self.{name}"
    elif kind < 0.5:
        name = f"{name}.{words.variable(random)}"
    keyword = random.choices(("if", "while"), (19, 1))[0]
    return Draft(f"{lead}{keyword} {name}", f"{lead}{name}", " ==", " =")


TASK = Task(
    name="if_equals",
    description="After a name, compare in a condition and assign in a statement.",
    draw=_draw,
)
