"""if_equals: after a name a condition compares with `==`, a statement assigns with `=`.

    if self.state.mode       ->   ==
    self.state.mode          ->   =

The fact is whether `if` stands before the name.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="if_equals",
    description="After a name, compare in a condition and assign in a statement.",
    draw=Template(
        text="<fact><target>",
        facts=(("if ", ""),),
        answers=(" ==", " ="),
        before=(
            (
                "if <condition>:\n    <body>",
                "while <condition>:\n    <body>",
                "<name> = <simple>",
                "<call>",
            ),
        ),
        cut=(
            ("<target2> == <simple>:\n    <body>", "<target3> = <simple>"),
            ("<target2> = <simple>", "if <target3> == <simple>:\n    <body>"),
        ),
        where={
            "target": (
                "<long>",
                "<letter>",
                "self.<long>",
                "self.<long>",
                "<dotted>",
                "<dotted>",
                "<long>.<long2>.<long3>",
                "<triple>",
                "<triple>",
            ),
        },
        # At the margin the name would be another token at the beginning of the line than in it.
        indents=(4, 8),
    ),
)
