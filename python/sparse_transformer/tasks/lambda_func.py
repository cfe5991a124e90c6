"""lambda_func: the arguments of a `lambda` end with a colon, those of a function with `):`.

    merge = lambda x, y       ->  :
    def merge(x, y            ->  ):

The fact is the keyword before them.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_ARGUMENTS = (
    *("a, b", "x, y", "x, y", "k, v", "i, j", "s, t", "u, v", "m, n", "self, x", "self, other"),
    *("self, key", "x, y, z", "a, b, c", "name, value", "key, value", "self, name", "obj, name"),
    *("ctx, x", "loop, ctx", "a, k", "p, q", "x, n", "s, n", "m, x", "f, x", "i, x", "n, k"),
)


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    name = random.choice((random.choice(words.FUNCTIONS), "f", "g", words.variable(random)))
    arguments = random.choice(_ARGUMENTS)
    if random.random() < 0.4:
        # At least two, so that the last one follows a comma in both.
        arguments = ", ".join(words.variables(random, random.choice((2, 2, 3, 4))))
    start = random.choice(
        (
            *(f"{name} = ", f"{name} = ", f"self.{name} = ", f"{name}(", f"self.{name}("),
            *(f"{words.variable(random)}.sort(key=", f"return {name}(", "return "),
            f"self.assertRaises({random.choice(words.ERRORS)}, ",
            f"{words.variable(random)} = {name}({words.variable(random)}, ",
        )
    )
    return Draft(f"{lead}{start}lambda {arguments}", f"{lead}def {name}({arguments}", ":", "):")


TASK = Task(
    name="lambda_func",
    description="End the arguments of a lambda with a colon, those of a function with a bracket.",
    draw=_draw,
)
