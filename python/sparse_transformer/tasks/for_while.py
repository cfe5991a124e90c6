"""for_while: `in` follows the name after `for`, a colon follows it after `while`.

    for line          ->   in
    while line        ->  :

The fact is the keyword before the name.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    name = words.compound(random)
    if random.random() < 0.3:
        name = random.choice(words.LETTERS)
    return Draft(f"{lead}for {name}", f"{lead}while {name}", " in", ":")


TASK = Task(
    name="for_while",
    description="Go on with in after the name of a for loop, with a colon after that of a while.",
    draw=_draw,
)
