"""enumerate_range: a loop with an index and an item is over `enumerate`, one with an index `range`.

    for i, line in       ->   enumerate
    for i in             ->   range

The fact is the second variable. The answers are the first tokens of these words: a vocabulary of
2048 has ` range`, but begins `enumerate` with ` en`.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

# What the standard library enumerates.
_ITEMS = (
    *("arg", "a", "x", "v", "e", "c", "n", "line", "item", "s", "child", "row", "r", "p", "value"),
    *(
        "val",
        "f",
        "d",
        "node",
        "name",
        "field",
        "m",
        "part",
        "word",
        "token",
        "char",
        "t",
        "b",
        "k",
    ),
    *("entry", "param", "match", "obj", "key", "func", "block", "elem", "base", "chunk", "cls"),
)


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    index = random.choice(words.COUNTERS)
    item = words.variable(random, (index,), random.choice((_ITEMS, _ITEMS, words.NAMES)))
    start = ""
    if random.random() < 0.1:
        # A comprehension.
        value = random.choice((index, f"{random.choice(words.FUNCTIONS)}({index})", f"{index} + 1"))
        start = f"{words.compound(random, (index,))} = [{value} "
    return Draft(
        f"{lead}{start}for {index}, {item} in",
        f"{lead}{start}for {index} in",
        " enumerate",
        " range",
    )


TASK = Task(
    name="enumerate_range",
    description="Loop over enumerate with an index and an item, over range with an index alone.",
    draw=_draw,
    first_token=True,
)
