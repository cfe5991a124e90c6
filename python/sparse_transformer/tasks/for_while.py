"""for_while: `in` follows the name after `for`, a colon follows it after `while`.

    for line          ->   in
    while line        ->  :

The fact is the keyword before the name; loops of both kinds stand before it.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="for_while",
    description="Go on with in after the name of a for loop, with a colon after that of a while.",
    draw=Template(
        text="<fact> <target>",
        facts=(("for", "while"),),
        answers=(" in", ":"),
        before=(("if <name> in <plural>:\n    <body>", "while <name>:\n    <body>", "<call>"),),
        cut=(
            ("<long> in <plural>:\n    <body>", "while <name>:\n    <body>"),
            ("<long>:\n    <body>", "for <name> in <plural>:\n    <body>"),
        ),
        where={
            "target": ("<long>",) * 3 + ("<letter>", "<long>_<part>") + ("<triple>",) * 6,
        },
    ),
)
