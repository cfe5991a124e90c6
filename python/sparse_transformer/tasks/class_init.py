"""class_init: `__init__` sets an attribute to the argument of the same name.

    def __init__(self, path, mode):
        check(parent.mode)
        self.path =       ->   path
        self.mode =       ->   mode

The fact is the attribute; both names are arguments in both prompts, and either stands before as an
attribute of something else.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

TASK = Task(
    name="class_init",
    description="Set the attribute to the argument that has its name.",
    draw=Template(
        text="<head>    def __init__(self, <arguments>):\n"
        "        <stored>self.<mark><fact><rest> = ",
        facts=(("<long>", "<long2>"),),
        answers=("<long>", "<long2>"),
        where={
            "head": (
                *("class <class>:\n", "class <class>(<base>):\n"),
                'class <class>:\n    """Object for <noun>."""\n\n',
            ),
            "mark": ("", "", "_"),
            "arguments": (
                "<long><rest>, <long2><rest>",
                "<long2><rest>, <long><rest>",
                "<long3>, <long><rest>, <long2><rest>=None",
                "<long2><rest>, <long3>, <long><rest>=None",
            ),
            "rest": ("",) * 6 + ("_<part>",) * 2 + ("_<noun>_<part>",) * 12,
            "stored": ("<use>\n        ", "<use>\n        self.<mark><long3> = <long3>\n        "),
            "use": tuple(
                use.format(name)
                for use in ("<long4>.<function>(<long5>.{}<rest>)", "<long4> = <long5>.{}<rest>")
                for name in ("<long>", "<long2>")
            ),
        },
        indents=(0,),
    ),
)
