"""bracket_brace: after a string comes `:` in a dict and `,` in a list.

    sizes = {'max width       ->  ':
    sizes = ['max width       ->  ',

The fact is the bracket that opened the literal, which may be inside another one of either kind. The
closing quote belongs to the answers, which are single tokens with it.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="bracket_brace",
    description="After the first string of a literal put a colon in a dict and a comma in a list.",
    draw=Template(
        text="<start><outer><fact><string>",
        facts=(("{<q>", "[<q>"),),
        answers=("<q>:", "<q>,"),
        before=(
            (
                "<name> = {<q><key><q>, <q><key2><q>}",
                "<name> = {<q><key><q>: <name2>, <q><key2><q>: <name3>}",
                "<function>(<q><key><q>, <name>)",
                "if <name> == <q><key><q>:\n    <body>",
                "<call>",
            ),
        ),
        cut=(
            ("<key><q>: <name>}", "<name2> = [<q><key2><q>, <name3>]"),
            ("<key><q>, <name>]", "<name2> = {<q><key2><q>: <name3>}"),
        ),
        where={
            "q": ("'", "'", '"'),
            "start": ("<name> = ",) * 3 + ("self.<long> = ", "return ", "<function>(<name>, "),
            "outer": (
                *("", "", "{<q><key><q>: ", "{<q><key><q>: <number>, <q><key2><q>: "),
                *("[<q><key><q>, ", "[<q><key><q>, <q><key2><q>, "),
            ),
            "string": ("<key>",) * 3
            + ("<which>_<part>",)
            + ("<triple>", "<triple>", "<clause>", "<which> <noun> of <noun2>"),
        },
    ),
)
