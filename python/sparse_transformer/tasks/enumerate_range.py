"""enumerate_range: a loop with an index and an item is over `enumerate`, one with an index `range`.

    for i, line_no in       ->   enumerate
    for line_no in          ->   range

The fact is the second variable; loops of both kinds stand before it. A vocabulary of 2048 has
` range`, but begins `enumerate` with ` en`, which then is the answer.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="enumerate_range",
    description="Loop over enumerate with an index and an item, over range with an index alone.",
    draw=Template(
        text="for <fact><item> in",
        facts=(("<counter>, ", ""),),
        answers=(" enumerate", " range"),
        before=(
            (
                "for <counter2>, <name> in enumerate(<plural>):\n    <body>",
                "for <counter2> in range(<number>):\n    <body>",
            ),
            ("<name> = <counter2>, <name2>", "<name> = <name2>", "<call>"),
        ),
        where={
            "item": ("<counter3>", "<long>", "<long>", "<which>_<part>") + ("<triple>",) * 5,
        },
    ),
    first_token=True,
)
