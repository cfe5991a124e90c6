"""with_open: a file is opened to read or to write, as the code around it says.

    # write the header                      # write the header
    data = encode(header)                   data = encode(header)
    # read the lines                        # write the lines
    with open(path, '       ->  r           with open(path, '       ->  w

The fact is one verb before, in a comment or in the function's name. Another one, of either kind,
stands before it.
"""

from __future__ import annotations

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

_READ, _WRITE = ("read", "read", "load", "parse"), ("write", "write", "save", "dump")

TASK = Task(
    name="with_open",
    description="Open the file for reading or for writing, as a word before it says.",
    draw=Template(
        text="<said><keyword>open(<path>, <q>",
        facts=tuple(zip(_READ, _WRITE, strict=True)),
        answers=("r", "w"),
        before=(
            (
                "# <verb> the <noun>\n<name> = <call>",
                "# <verb> the <noun>\n<call>",
                "def <verb>_<noun>(<params>):\n    return <simple>",
            ),
        ),
        where={
            "verb": _READ + _WRITE,
            "said": (
                *("# <fact> the <noun>\n", "# <fact> all <noun>\n", "# <fact> the <noun> again\n"),
                "def <fact>_<noun>(<params>):\n    ",
            ),
            "keyword": ("with ", "with ", "f = ", "fp = "),
            "path": ("path", "filename", "<long>", "self.<long>", "args.<long>", "TESTFN"),
            "q": ("'", "'", '"'),
        },
    ),
)
