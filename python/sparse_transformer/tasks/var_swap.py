"""var_swap: the second value of a swap is the variable that was named first.

    left, right = right,       ->   left
    right, left = left,        ->   right

The fact is the order of the two, which may be attributes or places in a list. Either of them stands
before in another line.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="var_swap",
    description="End a swap of two variables with the one that was named first.",
    draw=Template(
        text="<swap>",
        facts=(("<name>", "<name2>"),),
        answers=("<name>", "<name2>"),
        before=(
            ("if <name> > <name2>:\n    <body>", "<name3> = <name>", "<name3> = <name2>"),
            ("<function>(<name>)", "<function>(<name2>)"),
        ),
        where={
            "swap": ("<fact>, <other> = <other>, ",) * 4
            + ("self.<fact>, self.<other> = self.<other>, self.",)
            + ("self.<list>.<fact>, self.<list>.<other> = self.<list>.<other>, self.<list>.",) * 3
            + ("<list>[self.<fact>], <list>[self.<other>] = <list>[self.<other>], <list>[self.",)
            * 3,
            "list": ("<long3>",),
        },
    ),
)
