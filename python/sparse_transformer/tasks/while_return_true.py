"""while_return_true: `while x is True` ends with a colon, `return x is True` ends the line.

    if not line:                               if not line:
        while self.open is True   ->  :            return self.open is True   ->  the line ends

The fact is the keyword. Both stand in the block of an `if`, which a return ends, so that the second
answer is a line break with the indentation of the `if`. A third of the prompts has the published
`while True` and `return True`; in the others more stands between the keyword and `True`.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="while_return_true",
    description="Put a colon after while and a condition, and end the line after return.",
    draw=Template(
        text="if <condition>:\n    <fact> <test>True",
        facts=(("while", "return"),),
        answers=(":", "<line>"),
        before=(
            (
                "if <condition>:\n    <body>",
                "if <condition>:\n    return <simple>",
                "while <condition>:\n    <body>",
                "<call>",
            ),
        ),
        cut=(
            ("<test>True:\n        <step>", "if <condition>:\n    return <test2>True"),
            ("<test>True", "if <condition>:\n    while <test2>True:\n        <step>"),
        ),
        where={
            "test": ("",) * 4
            + ("self.<long> is ",) * 3
            + ("<long>.<long2> is ", "self.<long> == ", "self.<function>() is ")
            + ("not self.<long> is ", "<dotted> is "),
        },
        indents=(4, 8),
    ),
)
