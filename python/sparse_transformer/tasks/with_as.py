"""with_as: what a `with` opens gets its name by `as`, what an assignment opens has it already.

    with open(path)           ->   as
    file = open(path)         ->  the line ends

The fact is the beginning of the statement; files are opened both ways before it. The second answer
is the line break with the indentation of the next statement. (`:` is no answer here: after a call
it is part of the token `):`.)
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

_OPEN = (
    *("open(<path>)", "open(<path>, <mode>)", "open(<path>, <mode>)", "self.open(<path>)"),
    *("gzip.open(<path>)", "io.open(<path>, <mode>)", "tarfile.open(<path>)", "socket.socket()"),
    *("urlopen(<path>)", "os.scandir(<path>)", "subprocess.Popen(<path>)", "io.StringIO(<path>)"),
)

TASK = Task(
    name="with_as",
    description="Go on with as after a call in a with statement, end the line in an assignment.",
    draw=Template(
        text="<fact><open>",
        facts=(("with ", "<handle> = "),),
        answers=(" as", "<line>"),
        before=(
            (
                "with self.<long>:\n    <body>",
                "<handle2> = <open>",
                "try:\n    <body>\nexcept <error> as <name>:\n    raise",
                "<call>",
            ),
        ),
        cut=(
            ("<open> as <handle2>:\n    <body>", "<handle3> = <open2>"),
            ("<open>", "with <open2> as <handle3>:\n    <body>"),
        ),
        where={
            "open": _OPEN,
            "handle": ("f", "f", "f", "fp", "file", "stream", "<long>"),
            "path": ("<long2>", "<long2>", "filename", "self.<long2>", "<quoted>", "TESTFN"),
            "mode": ("'w'", '"w"', "'rb'", '"rb"', "'r'", "'wb'"),
        },
        indents=(4, 8),
    ),
)
