"""single_double_quote: close a string with the quote that opened it.

    print("hello world        ->  ")
    print('hello world        ->  ')

The fact is the opening token, `("` or `('`; words without quotes stand in between.
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_CALLS = (
    *("print", "print", "print", "self.fail", "self.skipTest", "warnings.warn", "parser.error"),
    *("log.debug", "logger.info", "sys.exit", "self.write", "f.write", "self.log", "out.append"),
    *(f"raise {error}" for error in words.ERRORS),
)


def _draw(random: Random) -> Draft:
    lead = lines.lead(random, lines.indentation(random))
    call = random.choice(_CALLS)
    if random.random() < 0.3:
        call = f"{words.variable(random)} = {random.choice(('', 'self.'))}get"
    # Short ones mostly.
    text = words.phrase(random, 1, random.choice((1, 2, 2, 3, 3, 5, 5, 8, 12)))
    return Draft(f'{lead}{call}("{text}', f"{lead}{call}('{text}", '")', "')")


TASK = Task(
    name="single_double_quote",
    description="Close a string argument with the kind of quote that opened it.",
    draw=_draw,
)
