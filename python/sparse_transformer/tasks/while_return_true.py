"""while_return_true: `while True` ends with a colon, `return True` ends the line.

    if not line:                            if not line:
        while True        ->  :                 return True       ->  the line ends

The fact is the keyword before `True`. Both stand in the block of an `if`, which a return ends, so
that the second answer is a line break with the indentation of the `if`.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    indent = random.choice((4, 4, 8, 8, 8))
    lead = lines.lead(random, indent)
    subject = words.compound(random)
    if random.random() < 0.2:
        subject = f"self.{subject}"
    test = words.condition(random, subject)
    if random.random() < 0.2:
        test = f"isinstance({subject}, {random.choice(words.CLASSES)})"
    text = f"{lead}if {test}:\n"
    if random.random() < 0.3:
        text += "".join(f"{line}\n" for line in lines.lines(random, indent + 4, 1))
    text += " " * (indent + 4)
    return Draft(f"{text}while True", f"{text}return True", ":", lines.line_break(indent))


TASK = Task(
    name="while_return_true",
    description="Put a colon after while True, and end the line after return True.",
    draw=_draw,
)
