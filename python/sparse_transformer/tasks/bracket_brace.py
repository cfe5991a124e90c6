"""bracket_brace: after a string comes `:` in a dict and `,` in a list.

    sizes = {'width       ->  ':
    sizes = ['width       ->  ',

The fact is the bracket that opened the literal. The closing quote belongs to the answers, which are
single tokens with it.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    indent = lines.indentation(random)
    lead = lines.lead(random, indent)
    quote = random.choice("'''\"")
    name = words.compound(random)
    start = random.choice(
        (
            *(f"{name} = ", f"{name} = ", f"{name} = ", f"self.{name} = ", f"self._{name} = "),
            *("return ", f"{random.choice(words.FUNCTIONS)}({name}, ", f"assert {name} == "),
            f"self.assertEqual({name}, ",
        )
    )
    outer = ""
    kind = random.random()
    if kind < 0.12:
        # Inside a dict, both can be a value.
        outer = f"{{{quote}{random.choice(words.KEYS)}{quote}: "
    elif kind < 0.2:
        outer = f"[{words.variable(random)}, "
    inner = ""
    if random.random() < 0.25:
        inner = f"\n{' ' * (indent + 4)}"
    key = random.choice(words.KEYS)
    if random.random() < 0.3:
        key = random.choice((words.phrase(random, 2, 3), words.compound(random)))
    rest = f"{inner}{quote}{key}"
    return Draft(
        f"{lead}{start}{outer}{{{rest}",
        f"{lead}{start}{outer}[{rest}",
        f"{quote}:",
        f"{quote},",
    )


TASK = Task(
    name="bracket_brace",
    description="After the first string of a literal put a colon in a dict and a comma in a list.",
    draw=_draw,
)
