"""else_elif: `else` ends with a colon, a condition follows `elif`.

    if isinstance(node, Leaf):          if isinstance(node, Leaf):
        size = 1                            size = 1
    else       ->  :                    elif       ->   isinstance

The fact is the last token itself, so this is the easiest task. The condition begins as that of the
`if` before it does.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    # At the margin `elif` would be two tokens.
    indent = random.choice((4, 8))
    name = words.variable(random, pool=random.choice((words.LETTERS, words.SUBJECTS)))
    begin = random.choice((name, name, name, "self", "self", "isinstance", "isinstance", "not"))
    text = lines.lead(random, indent, (name,), lines.how_many(random) // random.choice((1, 2, 2)))
    for branch in range(random.choice((1, 1, 1, 2, 3))):
        # A comment alone would be no block.
        body = ["#"]
        while body[-1].lstrip().startswith("#"):
            body = lines.lines(random, indent + 4, random.choice((1, 1, 2)), (name,))
        text += f"{'elif' if branch else 'if'} {_condition(random, begin, name)}:\n"
        text += "\n".join([*body, " " * indent])
    return Draft(f"{text}else", f"{text}elif", ":", f" {begin}")


def _condition(random: Random, begin: str, name: str) -> str:
    other = words.variable(random, (name,))
    if begin == "isinstance":
        return f"isinstance({name}, {random.choice((random.choice(words.CLASSES), 'str', 'list'))})"
    if begin == "not":
        return f"not {random.choice((other, f'self.{other}', f'{other}.{name}'))}"
    subject = f"self.{other}" if begin == "self" else name
    value = random.choice((words.quoted(random), words.number(random), other, "None", "True"))
    return f"{subject} {random.choice(('==', '==', '==', 'is', 'in', '>', '<'))} {value}"


TASK = Task(
    name="else_elif",
    description="Put a colon after else, and after elif a condition that begins as the if's does.",
    draw=_draw,
)
