"""with_as: what a `with` opens gets its name by `as`, what an assignment opens has it already.

    with open(path)           ->   as
    file = open(path)         ->  the line ends

The fact is the beginning of the statement. The second answer is the line break with the indentation
of the next statement. (`:` is no answer here: after a call it is part of the token `):`.)
"""

from __future__ import annotations

from random import Random

from sparse_transformer.tasks import lines, words
from sparse_transformer.tasks.task import Draft, Task

_OPENED = {
    "f": ("open({path})", "open({path})", "open({path}, {mode})", "self.open({path})"),
    "file": ("open({path})", "open({path}, {mode})", "gzip.open({path})", "io.open({path})"),
    "fp": ("open({path}, {mode})", "open({path})", "io.BytesIO({name})"),
    "stream": ("io.StringIO({name})", "open({path}, {mode})", "self.open_stream({name})"),
    "archive": ("zipfile.ZipFile({path})", "tarfile.open({path})", "tarfile.open({path}, {mode})"),
    "sock": ("socket.socket()", "socket.create_connection({name})", "self.connect({name})"),
    "conn": ("self.connect({name})", "sqlite3.connect({path})", "closing({name})"),
    "server": ("self.make_server({name})", "socket.create_server({name})"),
    "response": ("urlopen({name})", "urllib.request.urlopen({name})"),
    "entries": ("os.scandir({path})", "os.scandir()"),
    "proc": ("subprocess.Popen({name})", "self.start_process({name})"),
    "pool": ("ThreadPoolExecutor({number})", "self.Pool({number})", "multiprocessing.Pool()"),
    "tmp": (
        "tempfile.TemporaryDirectory()",
        "tempfile.NamedTemporaryFile()",
        "os_helper.temp_dir()",
    ),
    "out": ("captured_stdout()", "support.captured_output({text})", "open({path}, {mode})"),
    "mock": ("patch({text})", "mock.patch({text})", "mock.patch.object({name}, {text})"),
}


def _draw(random: Random) -> Draft:
    indent = random.choice((4, 4, 8, 8, 8))
    lead = lines.lead(random, indent)
    name = random.choice(tuple(_OPENED))
    quote = random.choice("'\"")
    path = random.choice(
        (
            words.variable(random),
            random.choice(("filename", "path", "fn", "TESTFN", "os_helper.TESTFN", "name")),
            f"self.{words.variable(random)}",
            f"{quote}{random.choice(words.KEYS)}.{random.choice(('txt', 'py', 'log'))}{quote}",
            f"os.path.join({words.variable(random)}, {words.quoted(random)})",
        )
    )
    call = random.choice(_OPENED[name]).format(
        path=path,
        mode=random.choice(("'w'", '"w"', "'rb'", '"rb"', "'r'", "'wb'")),
        name=words.compound(random),
        number=words.number(random),
        text=words.quoted(random),
    )
    return Draft(f"{lead}with {call}", f"{lead}{name} = {call}", " as", lines.line_break(indent))


TASK = Task(
    name="with_as",
    description="Go on with as after a call in a with statement, end the line in an assignment.",
    draw=_draw,
)
