"""var_if: an `if` asks about the variable that was set just before.

    match = pattern.search(line)         result = pattern.search(line)
    if       ->   match                  if       ->   result

The fact is the name of the variable; it may be asked about with `not`, and a line may stand in
between.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task


def _draw(random: Random) -> Draft:
    pair = words.variables(random, 2, pool=words.SUBJECTS)
    indent = lines.indentation(random)
    lead = lines.lead(random, indent, pair)
    line = words.variable(random, pair)
    pattern = words.variable(random, (line, *pair))
    value = random.choice(
        (
            words.call(random, pair),
            words.call(random, pair),
            words.call(random, pair),
            f"self.{words.variable(random, pair)}",
            f"{pattern}.match({line})",
            f"re.match({pattern}, {line})",
            f"{pattern}.get({line})",
            f"{pattern}.get({words.quoted(random)})",
            f"getattr({line}, {words.quoted(random)}, None)",
            f"len({line})",
            f"{pattern}[{line}]",
        )
    )
    rest = ""
    if random.random() < 0.25:
        rest = "".join(f"\n{line}" for line in lines.lines(random, indent, 1, pair))
    rest += f"\n{' ' * indent}if{random.choice(('', '', ' not'))}"
    positive, negative = (f"{lead}{name} = {value}{rest}" for name in pair)
    return Draft(positive, negative, f" {pair[0]}", f" {pair[1]}")


TASK = Task(
    name="var_if",
    description="Ask in an if about the variable that was set just before.",
    draw=_draw,
)
