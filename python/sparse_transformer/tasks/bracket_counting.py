"""bracket_counting: close one list, or two at once.

    rows = [[1, 2, 3        ->  ]]
    rows = [1, 2, 3         ->  ]

The fact is a second opening bracket; lists may stand in between. Before it stand whole lists, up to
three deep, and ends of cut ones.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="bracket_counting",
    description="Close two lists if a list of lists was opened, one if a list was.",
    draw=Template(
        text="<start><fact><rows>",
        facts=(("[[", "["),),
        answers=("]]", "]"),
        before=(
            (
                "<name> = [[[<digit>], [<digit2>]]]",
                "<name> = [[<digit>], [<digit2>]]",
                "<name> = <name2>[<digit>]",
                "<call>",
            ),
        ),
        cut=(
            ("<row>]]", "<name> = [<row2>]"),
            ("<row>]", "<name> = [[<row2>]]"),
        ),
        where={
            "start": ("<compound> = ",) * 3 + ("self.<long> = ", "return ", "<compound> += "),
            "rows": (
                "<row>",
                "<row>",
                "<row>], [<row2>",
                "<row>], [<row2>",
                "<row>], [<row2>], [<row3>",
            ),
            "row": (
                *("<digit>, <digit2>", "<digit>, <digit2>, <digit3>", "<number>, <number2>"),
                *("<digit>, <digit2>, <digit3>, <digit4>", "<number>, <number2>, <number3>"),
                *("<letter>, <letter2>", "<letter>, <letter2>, <letter3>", "<name>, <name2>"),
            ),
        },
    ),
)
