"""if_ternary: a conditional expression continues with `else`, an `if` statement ends with a colon.

    size = 1 if mode is None       ->   else
    if mode is None                ->  :

The fact is whether an expression stands before the `if`.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    subject = words.compound(random)
    if random.random() < 0.2:
        subject = f"self.{subject}"
    test = words.condition(random, subject)
    target = random.choice((f"{words.compound(random)} = ", f"self.{subject} = ", "return "))
    if subject.startswith("self."):
        target = random.choice((f"{words.compound(random)} = ", "return "))
    value = random.choice((words.simple(random), words.simple(random), words.call(random), subject))
    return Draft(f"{lead}{target}{value} if {test}", f"{lead}if {test}", " else", ":")


TASK = Task(
    name="if_ternary",
    description="Go on with else in a conditional expression, with a colon in an if statement.",
    draw=_draw,
)
