"""else_elif: `else` ends with a colon, a condition follows `elif`.

    if node.type == 3:                  if node.type == 3:
        size = 1                            size = 1
    else       ->  :                    elif       ->   node

The fact is the last token itself. The condition begins as that of the `if` before it does.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="else_elif",
    description="Put a colon after else, and after elif a condition that begins as the if's does.",
    draw=Template(
        text="if <first><test>:\n    <name> = <simple>\n<fact>",
        facts=(("else", "elif"),),
        answers=(":", " <first>"),
        where={
            "first": ("<long>", "<long>", "<letter>", "self"),
            "test": (".<long2> == <number>", ".<long2> == <quoted>", ".<long2> is None"),
        },
        # At the margin `elif` would be two tokens.
        indents=(4, 8),
    ),
    shortcut="the published task asks what follows the last token",
)
