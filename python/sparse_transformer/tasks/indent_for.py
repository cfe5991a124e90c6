"""indent_for: the line after a `for` is indented by four more spaces, after a statement it is not.

    for item in self.items:       ->  a line break and 8 spaces
    item = self.items             ->  a line break and 4 spaces

(here both stand at 4 spaces). The fact is the kind of statement. The answers depend on the
indentation of the lines so far, so the last token alone does not give them. The last space belongs
to the token that follows and is not part of the answers.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    indent = random.choice((0, 4, 4, 8, 8, 8, 12))
    lead = lines.lead(random, indent)
    item, several = words.compound(random), words.variable(random, pool=words.PLURALS)
    if random.random() < 0.2:
        item = ", ".join(words.variables(random, 2, (several,)))
    owner = random.choice(("", "", "self.", "self._", f"{words.variable(random, (item,))}."))
    over = random.choice(
        (
            f"{owner}{several}",
            f"{owner}{several}",
            f"{owner}{several}[{random.choice(('1:', ':-1', words.number(random)))}]",
            f"{random.choice(('sorted', 'list', 'reversed', 'iter'))}({owner}{several})",
            f"{owner}{random.choice(words.FUNCTIONS)}({words.variable(random, (item,))})",
        )
    )
    return Draft(
        f"{lead}for {item} in {over}:",
        f"{lead}{item} = {over}",
        lines.line_break(indent + 4),
        lines.line_break(indent),
    )


TASK = Task(
    name="indent_for",
    description="Indent the next line by four more after a for, and as before after a statement.",
    draw=_draw,
)
