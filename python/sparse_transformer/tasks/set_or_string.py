"""set_or_string: a set is added to with `.add`, a string with `+=`.

    seen = set()                    seen = ''
    for name in names:              for name in names:
        seen         ->  .              seen          ->   +=

The fact is what the variable was set to. `.` is the first token of `.add`, which the usual
byte-level pre-tokenizer splits. The variable's name is another one in each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_NAMES = (
    *("buf", "chars", "codes", "content", "current", "data", "expected", "found", "info", "line"),
    *("lines", "msg", "name", "names", "new", "out", "output", "parts", "path", "prefix", "r"),
    *("res", "rest", "result", "results", "ret", "s", "seen", "source", "t", "text", "title"),
    *("total", "value", "values", "words", "x"),
)


def draft(random: Random, names: Sequence[str]) -> Draft:
    """A pair about a variable of one of these names."""
    name = random.choice(names)
    indent = lines.indentation(random)
    lead = lines.lead(random, indent, (name,), lines.how_many(random) // random.choice((1, 2, 2)))
    if indent and len(names) > 1 and random.random() < 0.15:
        name = f"self.{random.choice(('', '_'))}{name}"
    rest = ""
    if random.random() < 0.4:
        rest += _body(random, indent, name)
    loop = random.random() < 0.85
    if loop:
        rest += f"\n{' ' * indent}{_loop(random, name)}"
        indent += 4
    if not loop or random.random() < 0.4:
        rest += _body(random, indent, name)
    if random.random() < 0.25:
        other = words.variable(random, (name,))
        rest += f"\n{' ' * indent}if {words.condition(random, other, (name,))}:"
        indent += 4
    rest += f"\n{' ' * indent}{name}"
    empty = random.choice(("''", '""'))
    return Draft(f"{lead}{name} = set(){rest}", f"{lead}{name} = {empty}{rest}", ".add", " +=")


def _body(random: Random, indent: int, avoid: str) -> str:
    count = random.choice((1, 1, 1, 2, 2, 3, 5))
    return "".join(f"\n{line}" for line in lines.lines(random, indent, count, (avoid,)))


def _loop(random: Random, avoid: str) -> str:
    item = words.variable(random, (avoid,))
    owner = random.choice(("", "", "self."))
    several = words.variable(random, (avoid, item), words.PLURALS)
    if random.random() < 0.15:
        return f"while {several}:"
    return f"for {item} in {owner}{several}:"


def _draw(random: Random) -> Draft:
    return draft(random, _NAMES)


TASK = Task(
    name="set_or_string",
    description="Go on with .add if the variable was set to set(), with += if to an empty string.",
    draw=_draw,
    first_token=True,
)
