"""final_kwarg: after a parameter with a default the next one must have a default too.

    def read(self, size, mode=None, encoding    ->  =
    def read(self, size, mode, encoding         ->  ):

The fact is whether the parameter before the last one has a default.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_DEFAULTS = (
    *("None", "None", "None", "None", "False", "False", "True", "0", "1", "-1"),
    *("''", '""', "()", "10"),
)

# Last parameters: the standard library has them both with and without a default.
_LAST = (
    *(
        "args",
        "b",
        "c",
        "callback",
        "code",
        "config",
        "context",
        "count",
        "d",
        "data",
        "dir",
        "event",
    ),
    *("f", "fd", "file", "filename", "flags", "format", "frame", "func", "kwargs", "level", "line"),
    *("lineno", "loop", "message", "module", "msg", "name", "object", "parent", "parser", "path"),
    *("pattern", "prefix", "root", "size", "source", "start", "step", "tb", "traceback", "type"),
    *("value", "values", "version", "width", "x", "y"),
)


def _draw(random: Random) -> Draft:
    indent = random.choice((0, 4, 4, 4))
    lead = lines.before_function(random, indent)
    last = random.choice(_LAST)
    *first, before = words.variables(random, 1 + random.choice((0, 0, 1, 1, 2, 3)), (last,))
    own = ["self"] if indent else []
    start = f"{lead}def {random.choice(words.FUNCTIONS)}({', '.join([*own, *first, before])}"
    return Draft(f"{start}={random.choice(_DEFAULTS)}, {last}", f"{start}, {last}", "=", "):")


TASK = Task(
    name="final_kwarg",
    description="Give the last parameter a default if the one before it has one, else close.",
    draw=_draw,
)
