"""indent_for: the line after a `for` is indented by four more spaces, after a statement it is not.

    for item in self.items:  # the items       ->  a line break and 8 spaces
    item = self.items  # the items             ->  a line break and 4 spaces

(here both stand at 4 spaces). The fact is the kind of statement, before a comment mostly; both
kinds stand before it. The last space belongs to the token that follows and is not part of the
answers.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="indent_for",
    description="Indent the next line by four more after a for, and as before after a statement.",
    draw=Template(
        text="<fact><comment>",
        facts=(("for <item> in <over>:", "<item> = <over>"),),
        answers=("<deeper>", "<line>"),
        before=(
            (
                "if <condition>:\n    <body>",
                "for <long> in <plural>:\n    <body>",
                "<name> = <simple>",
                "<call>",
            ),
        ),
        cut=(
            ("<clause>\n    <body>", "<item2> = <over2><comment2>"),
            ("<clause>", "for <item2> in <over2>:<comment2>\n    <body>"),
        ),
        where={
            "item": ("<compound>", "<compound>", "<letter>", "<long>, <long2>"),
            "over": ("<plural>", "self.<plural>", "<long3>.<plural>", "self.<function>(<long3>)"),
            "comment": ("",) * 4 + ("  # <clause>",) * 7,
        },
    ),
)
