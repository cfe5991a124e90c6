"""The twenty tasks of Table 1 of Gao et al. 2025 (arXiv 2511.13653), in its order.

Above each one stands an example: the two prompts of a pair, and what follows either.
"""

from __future__ import annotations

from dataclasses import replace

from sparse_transformer.tasks.task import Task
from sparse_transformer.tasks.template import Template

_STRINGS = (
    "<function>(<q><key><q>)",
    "<name> = <name2>.get(<q><key><q>)",
    "self.<long>(<q><key><q> % <name>)",
    "<name> = <function>(<q><key><q> + <name2>)",
    "<name> = re.compile(r<q><key><q>)",
    "self.<function>(b<q><key><q>)",
    "<name> = b<q><key><q>",
)
_DEFAULTS = ("=None",) * 6 + ("=False", "=False", "=True", "=0", "=1", "=()")
_BODY = ":\n    <call>\n    return <simple>\n\n"
_SET_OR_STRING = Template(
    text="<first>\n<middle>for <long2> in <plural>:\n    <inner><target>",
    facts=(("set()", "''"), ("set()", "''"), ("set()", '""')),
    answers=(".add", " +="),
    where={
        "target": ("<long>",) * 5 + ("self.<long>",),
        "empty": ("set()", "set()", "''", "''", '""'),
        "first": ("<target> = <fact>\n<long3> = <empty>", "<long3> = <empty>\n<target> = <fact>"),
        "middle": ("", "", "<long4> = <simple>\n", "# <phrase>\n"),
        "inner": (
            *("", "", "<long5> = <long2>.<function>(<number>)\n    ", "<call>\n    "),
            *("if <condition>:\n        ", "if not <long2>:\n        continue\n    "),
        ),
    },
)
_OPEN = (
    *("open(<path>)", "open(<path>, <mode>)", "open(<path>, <mode>)", "self.open(<path>)"),
    *("gzip.open(<path>)", "io.open(<path>, <mode>)", "tarfile.open(<path>)", "socket.socket()"),
    *("urlopen(<path>)", "os.scandir(<path>)", "subprocess.Popen(<path>)", "io.StringIO(<path>)"),
)
_READ, _WRITE = ("read", "read", "load", "parse"), ("write", "write", "save", "dump")

_ALL = (
    #     name = get('key')                  name = get('key')
    #     print("hello world     ->  ")      print('hello world     ->  ')
    #
    # The fact is the opening token, `("` or `('`. Strings of both kinds stand before it, whole ones
    # and ends of cut ones, and those that end in another token.
    Task(
        "single_double_quote",
        "Close a string argument with the kind of quote that opened it.",
        Template(
            text="<start><fact><message>",
            facts=(('("', "('"),),
            answers=('")', "')"),
            before=(_STRINGS,),
            cut=(
                ('<noun>")', "<function>('<key>')"),
                ("<noun>')", '<function>("<key>")'),
            ),
            where={
                "q": ("'", '"'),
                "start": ("print",) * 3
                + ("raise <error>",) * 3
                + ("self.fail", "warnings.warn", "parser.error", "log.debug", "sys.exit", "f.write")
                + ("<name> = get", "<name> = self.get", "<name>.append"),
                "message": ("<noun>", "<noun> <noun2>", "<phrase>", "<phrase>", "<phrase>"),
            },
        ),
    ),
    #     def read(self, size, mode=None, encoding    ->  =None
    #     def read(self, size, mode, encoding         ->  ):
    #
    # The fact is whether the parameter before the last one has a default. A whole function with or
    # without defaults stands before. The usual byte-level pre-tokenizer splits `=None`; then its
    # first token, `=`, is the answer.
    Task(
        "final_kwarg",
        "Give the last parameter a default if the one before it has one, else close.",
        Template(
            text="<earlier>def <function>(self, <first><long><fact>, <last>",
            facts=tuple((default, "") for default in _DEFAULTS),
            answers=("=None", "):"),
            where={
                "earlier": (
                    f"def <function2>(self, <long2>, <long3>){_BODY}",
                    f"def <function2>(self, <long2>, <long3><default>){_BODY}",
                    f"def <function2>(self, <long2><default>, <long3><default2>){_BODY}",
                ),
                "default": _DEFAULTS,
                "first": ("", "", "<long4>, "),
                "last": ("<long5>",) * 3 + ("<long5>_<part>",) + ("<triple>",) * 5,
            },
            indents=(4,),
        ),
        first_token=True,
    ),
    #     path = ''                       path = ''
    #     seen = set()                    seen = ''
    #     for name in names:              for name in names:
    #         seen         ->  .add           seen          ->   +=
    #
    # The fact is what the variable was set to; another one is set to either of them before or after
    # it. The usual byte-level pre-tokenizer splits `.add`; then its first token, `.`, is the
    # answer.
    Task(
        "set_or_string",
        "Go on with .add if the variable was set to set(), with += if to an empty string.",
        _SET_OR_STRING,
        first_token=True,
    ),
    #     result = set()                  result = ''
    #     for name in names:              for name in names:
    #         result       ->  .add           result        ->   +=
    Task(
        "set_or_string_fixedvarname",
        "As set_or_string, and the variable is always called result.",
        replace(_SET_OR_STRING, where={**_SET_OR_STRING.where, "target": ("result",)}),
        first_token=True,
    ),
    #     def __init__(self, path, mode):
    #         check(parent.mode)
    #         self.path =       ->   path
    #         self.mode =       ->   mode
    #
    # The fact is the attribute; both names are arguments in both prompts, and either stands before
    # as an attribute of something else.
    Task(
        "class_init",
        "Set the attribute to the argument that has its name.",
        Template(
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
                "stored": (
                    "<use>\n        ",
                    "<use>\n        self.<mark><long3> = <long3>\n        ",
                ),
                "use": tuple(
                    use.format(name)
                    for use in (
                        "<long4>.<function>(<long5>.{}<rest>)",
                        "<long4> = <long5>.{}<rest>",
                    )
                    for name in ("<long>", "<long2>")
                ),
            },
            indents=(0,),
        ),
    ),
    #     with open(path)           ->   as
    #     file = open(path)         ->  the line ends
    #
    # The fact is the beginning of the statement; files are opened both ways before it. The second
    # answer is the line break with the indentation of the next statement. (`:` is no answer here:
    # after a call it is part of the token `):`.)
    Task(
        "with_as",
        "Go on with as after a call in a with statement, end the line in an assignment.",
        Template(
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
    ),
    #     sizes = {'max width       ->  ':
    #     sizes = ['max width       ->  ',
    #
    # The fact is the bracket that opened the literal, which may be inside another one of either
    # kind. The closing quote belongs to the answers, which are single tokens with it.
    Task(
        "bracket_brace",
        "After the first string of a literal put a colon in a dict and a comma in a list.",
        Template(
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
    ),
    #     # write the header                      # write the header
    #     data = encode(header)                   data = encode(header)
    #     # read the lines                        # write the lines
    #     with open(path, '       ->  r           with open(path, '       ->  w
    #
    # The fact is one verb before, in a comment or in the function's name. Another one, of either
    # kind, stands before it.
    Task(
        "with_open",
        "Open the file for reading or for writing, as a word before it says.",
        Template(
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
                    *(
                        "# <fact> the <noun>\n",
                        "# <fact> all <noun>\n",
                        "# <fact> the <noun> again\n",
                    ),
                    "def <fact>_<noun>(<params>):\n    ",
                ),
                "keyword": ("with ", "with ", "f = ", "fp = "),
                "path": ("path", "filename", "<long>", "self.<long>", "args.<long>", "TESTFN"),
                "q": ("'", "'", '"'),
            },
        ),
    ),
    #     rows = [[1, 2, 3        ->  ]]
    #     rows = [1, 2, 3         ->  ]
    #
    # The fact is a second opening bracket; lists may stand in between. Before it stand whole lists,
    # up to three deep, and ends of cut ones.
    Task(
        "bracket_counting",
        "Close two lists if a list of lists was opened, one if a list was.",
        Template(
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
    ),
    #     for line          ->   in
    #     while line        ->  :
    #
    # The fact is the keyword before the name; loops of both kinds stand before it.
    Task(
        "for_while",
        "Go on with in after the name of a for loop, with a colon after that of a while.",
        Template(
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
    ),
    #     if node.type == 3:                  if node.type == 3:
    #         size = 1                            size = 1
    #     else       ->  :                    elif       ->   node
    #
    # The fact is the last token itself. The condition begins as that of the `if` before it does.
    Task(
        "else_elif",
        "Put a colon after else, and after elif a condition that begins as the if's does.",
        Template(
            text="if <first><test>:\n    <name> = <simple>\n<fact>",
            facts=(("else", "elif"),),
            answers=(":", " <first>"),
            where={
                "first": ("<long>", "<long>", "<letter>", "self"),
                "test": (".<long2> == <number>", ".<long2> == <quoted>", ".<long2> is None"),
            },
            # At the margin `elif` would be two tokens.
            indents=(4, 8),
        ),
        shortcut="the published task asks what follows the last token",
    ),
    #     print(f"cannot open path={self.path.name       ->  }
    #     print(f"cannot open path=self.path.name        ->  ")
    #
    # The fact is an opening brace. Whole `{expressions}` and dicts, and ends of cut ones, stand
    # before.
    Task(
        "fstring_brace",
        "Close the brace if one is open in the f-string, else the string.",
        Template(
            # Without a space before it, a name is the same token after a brace as without one.
            text='<caller>(f"<message><sign><fact><shown>',
            facts=(("{", ""),),
            answers=("}", '")'),
            before=(
                (
                    '<name> = f"{<name2>}"',
                    "<name> = {<quoted>: <simple>}",
                    '<caller>(f"<noun> {<name>}")',
                    "<call>",
                ),
            ),
            cut=(
                ('<shown>}")', '<caller>(f"<noun><sign><shown2>")'),
                ('<shown>")', '<caller>(f"<noun><sign>{<shown2>}")'),
            ),
            where={
                "caller": (
                    "print",
                    "print",
                    "raise <error>",
                    "raise <error>",
                    "self.fail",
                    "log.debug",
                    "f.write",
                    "<name>.append",
                    "warnings.warn",
                ),
                "message": ("<noun>", "<clause>", "<noun> {<name2>} <noun2>"),
                "sign": ("=", "=", "/", ":", "-"),
                "shown": ("<long>",) * 4 + ("<dotted>",) * 6,
            },
        ),
    ),
    #     size = 1 if mode is None       ->   else
    #     if mode is None                ->  :
    #
    # The fact is whether an expression stands before the `if`. Both kinds stand before it.
    Task(
        "if_ternary",
        "Go on with else in a conditional expression, with a colon in an if statement.",
        Template(
            text="<fact>if <condition>",
            facts=(("<into><value> ", ""),),
            answers=(" else", ":"),
            before=(("<name> = <simple>", "return <simple>", "if <condition>:\n    <body>"),),
            cut=(
                ("<condition> else <simple>", "if <condition2>:\n    <body>"),
                ("<condition>:\n    <body>", "<into><value> if <condition2> else <simple>"),
            ),
            where={
                "into": ("<compound> = ", "<compound> = ", "self.<long> = ", "return "),
                "value": ("<simple>", "<simple>", "<call>"),
            },
            # At the margin `if` would be another token at the beginning of the line than in it.
            indents=(4, 8),
        ),
    ),
    #     left, right = right,       ->   left
    #     right, left = left,        ->   right
    #
    # The fact is the order of the two, which may be attributes or places in a list. Either of them
    # stands before in another line.
    Task(
        "var_swap",
        "End a swap of two variables with the one that was named first.",
        Template(
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
                + ("self.<list>.<fact>, self.<list>.<other> = self.<list>.<other>, self.<list>.",)
                * 3
                + (
                    "<list>[self.<fact>], <list>[self.<other>] = "
                    "<list>[self.<other>], <list>[self.",
                )
                * 3,
                "list": ("<long3>",),
            },
        ),
    ),
    #     for item in self.items:  # the items       ->  a line break and 8 spaces
    #     item = self.items  # the items             ->  a line break and 4 spaces
    #
    # (here both stand at 4 spaces). The fact is the kind of statement, before a comment mostly;
    # both kinds stand before it. The last space belongs to the token that follows and is not part
    # of the answers.
    Task(
        "indent_for",
        "Indent the next line by four more after a for, and as before after a statement.",
        Template(
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
                "over": (
                    "<plural>",
                    "self.<plural>",
                    "<long3>.<plural>",
                    "self.<function>(<long3>)",
                ),
                "comment": ("",) * 4 + ("  # <clause>",) * 7,
            },
        ),
    ),
    #     merge = lambda x, y, z       ->  :
    #     def merge(x, y, z            ->  ):
    #
    # The fact is the keyword before them; both kinds stand before it.
    Task(
        "lambda_func",
        "End the arguments of a lambda with a colon, those of a function with a bracket.",
        Template(
            text="<fact><arguments>",
            facts=(("<into>lambda ", "def <function>("),),
            answers=(":", "):"),
            before=(
                ("<name> = <simple>", "return <simple>", "<call>", "if <condition>:\n    <body>"),
            ),
            cut=(
                ("<arguments>: <simple>", "def <function2>(<arguments2>):\n    <body>"),
                ("<arguments>):\n    <body>", "<into2>lambda <arguments2>: <simple>"),
            ),
            where={
                "into": ("<long4> = ", "<long4> = ", "self.<long4> = ", "return "),
                "arguments": (
                    *("<letter>, <letter2>", "self, <name>", "<long>, <long2>"),
                    *("<letter>, <letter2>, <letter3>", "self, <letter>, <letter2>"),
                    *(
                        "<long>, <long2>, <long3>",
                        "self, <long>, <long2>",
                        "<letter>, *args, <long>",
                    ),
                ),
            },
        ),
    ),
    #     if self.state.mode       ->   ==
    #     self.state.mode          ->   =
    #
    # The fact is whether `if` stands before the name.
    Task(
        "if_equals",
        "After a name, compare in a condition and assign in a statement.",
        Template(
            text="<fact><target>",
            facts=(("if ", ""),),
            answers=(" ==", " ="),
            before=(
                (
                    "if <condition>:\n    <body>",
                    "while <condition>:\n    <body>",
                    "<name> = <simple>",
                    "<call>",
                ),
            ),
            cut=(
                ("<target2> == <simple>:\n    <body>", "<target3> = <simple>"),
                ("<target2> = <simple>", "if <target3> == <simple>:\n    <body>"),
            ),
            where={
                "target": (
                    "<long>",
                    "<letter>",
                    "self.<long>",
                    "self.<long>",
                    "<dotted>",
                    "<dotted>",
                    "<long>.<long2>.<long3>",
                    "<triple>",
                    "<triple>",
                ),
            },
            # At the margin the name would be another token at the beginning of the line than in it.
            indents=(4, 8),
        ),
    ),
    #     for i, line_no in       ->   enumerate
    #     for line_no in          ->   range
    #
    # The fact is the second variable; loops of both kinds stand before it. A vocabulary of 2048 has
    # ` range`, but begins `enumerate` with ` en`, which then is the answer.
    Task(
        "enumerate_range",
        "Loop over enumerate with an index and an item, over range with an index alone.",
        Template(
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
    ),
    #     result = self.lines                  match = self.lines
    #     match = pattern.search(line)         result = pattern.search(line)
    #     if       ->   match                  if       ->   result
    #
    # The fact is which of the two was set last; it may be asked about with `not`, and a line may
    # stand in between.
    Task(
        "var_if",
        "Ask in an if about the variable that was set just before.",
        Template(
            text="<other> = <value>\n<fact> = <value2>\n<between>if<sign>",
            facts=(("<subject>", "<subject2>"),),
            answers=(" <subject>", " <subject2>"),
            where={
                "value": (
                    *("<call>", "<call>", "self.<long>", "<long2>.match(<long3>)", "len(<plural>)"),
                    *("re.match(<long2>, <long3>)", "<long2>.get(<quoted>)", "<plural>[<long3>]"),
                    "getattr(<long2>, <quoted>, None)",
                ),
                "between": ("", "", "", "<long4> = <simple>\n", "# <phrase>\n"),
                "sign": ("", "", " not"),
            },
        ),
    ),
    #     if not line:                            if not line:
    #         while self.open is True   ->  :         return self.open is True   ->  the line ends
    #
    # The fact is the keyword. Both stand in the block of an `if`, which a return ends, so that the
    # second answer is a line break with the indentation of the `if`. A third of the prompts has the
    # published `while True` and `return True`; in the others more stands between the keyword and
    # `True`.
    Task(
        "while_return_true",
        "Put a colon after while and a condition, and end the line after return.",
        Template(
            text="if <condition>:\n    <fact> <test>True",
            facts=(("while", "return"),),
            answers=(":", "<line>"),
            before=(
                (
                    "if <condition>:\n    <body>",
                    "if <condition>:\n    return <simple>",
                    "while <condition>:\n    <body>",
                    "<call>",
                ),
            ),
            cut=(
                ("<test>True:\n        <step>", "if <condition>:\n    return <test2>True"),
                ("<test>True", "if <condition>:\n    while <test2>True:\n        <step>"),
            ),
            where={
                "test": ("",) * 4
                + ("self.<long> is ",) * 3
                + ("<long>.<long2> is ", "self.<long> == ", "self.<function>() is ")
                + ("not self.<long> is ", "<dotted> is "),
            },
            indents=(4, 8),
        ),
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
