"""if_ternary: a conditional expression continues with `else`, an `if` statement ends with a colon.

    size = 1 if mode is None       ->   else
    if mode is None                ->  :

The fact is whether an expression stands before the `if`. Both kinds stand before it.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="if_ternary",
    description="Go on with else in a conditional expression, with a colon in an if statement.",
    draw=Template(
        text="<fact>if <condition>",
        facts=(("<into><value> ", ""),),
        answers=(" else", ":"),
        before=(("<name> = <simple>", "return <simple>", "if <condition>:\n    <body>"),),
        cut=(
            ("<condition> else <simple>", "if <condition2>:\n    <body>"),
            ("<condition>:\n    <body>", "<into><value> if <condition2> else <simple>"),
        ),
        where={
            "into": ("<compound> = ", "<compound> = ", "self.<long> = ", "return "),
            "value": ("<simple>", "<simple>", "<call>"),
        },
        # At the margin `if` would be another token at the beginning of the line than in it.
        indents=(4, 8),
    ),
)
