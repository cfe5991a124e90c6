"""fstring_brace: inside the braces of an f-string close the brace, outside close the string.

    text = f"cannot open file={name       ->  }
    text = f"cannot open file=name        ->  "

The fact is an opening brace; whole `{expressions}` may stand in between. In a call the second
answer is `")`.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_CALLS = ("print", "print", "self.fail", "log.debug", "f.write", "self.log", "out.append")


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    name = words.variable(random)
    if random.random() < 0.5:
        start = random.choice((f"{words.variable(random)} = ", f"self.{name} = ", "return "))
        close = '"'
    else:
        error = f"raise {random.choice(words.ERRORS)}"
        start, close = f"{random.choice((*_CALLS, *(error,) * 5))}(", '")'
    pieces = []
    if random.random() < 0.2:
        pieces += [words.phrase(random, 1, 4), _shown(random)]
    pieces.append(words.phrase(random, 1, random.choice((1, 2, 3, 5))))
    # Without a space, so that the name is the same token after a brace as without one.
    text = " ".join(pieces) + random.choice(("=", "=", "/", "/", ":", ".", "-", "_"))
    return Draft(f'{lead}{start}f"{text}{{{name}', f'{lead}{start}f"{text}{name}', "}", close)


def _shown(random: Random) -> str:
    """An expression in braces."""
    owner = random.choice(("", "", "self."))
    return f"{{{owner}{words.variable(random)}{random.choice(('', '', '', '!r'))}}}"


TASK = Task(
    name="fstring_brace",
    description="Close the brace if one is open in the f-string, else the string.",
    draw=_draw,
)
