"""var_swap: the second value of a swap is the variable that was named first.

    left, right = right,       ->   left
    right, left = left,        ->   right

The fact is the order of the two. The two may be attributes or places in a list.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_PAIRS = (
    *(("a", "b"), ("b", "a"), ("x", "y"), ("i", "j"), ("p", "q"), ("left", "right")),
    *(("start", "end"), ("first", "last"), ("old", "new"), ("key", "value"), ("n", "m")),
)


def _draw(random: Random) -> Draft:
    pair = list(random.choice(_PAIRS))
    if random.random() < 0.7:
        pair = words.variables(random, 2)
    indent = lines.indentation(random)
    lead = lines.lead(random, indent, pair)
    start, end = "", ""
    kind = random.random()
    if kind < 0.2:
        start = f"self.{random.choice(('', '_'))}"
    elif kind < 0.4:
        start, end = f"{words.variable(random, pair)}[", "]"
    if random.random() < 0.35:
        # The test has them in either order, independently of the swap.
        one, other = random.sample(pair, 2)
        test = f"{start}{one}{end} {random.choice('<>')} {start}{other}{end}"
        lead += f"if {test}:\n{' ' * (indent + 4)}"
    one, other = random.sample(pair, 2)
    # A bare name is one token with the space before it.
    last, space = (f" {start}", "") if start else ("", " ")
    return Draft(
        f"{lead}{start}{one}{end}, {start}{other}{end} = {start}{other}{end},{last}",
        f"{lead}{start}{other}{end}, {start}{one}{end} = {start}{one}{end},{last}",
        f"{space}{one}",
        f"{space}{other}",
    )


TASK = Task(
    name="var_swap",
    description="End a swap of two variables with the one that was named first.",
    draw=_draw,
)
