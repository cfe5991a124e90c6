"""The words that the tasks' code is made of, and the small pieces that they make up.

`VOCABULARY` has the choices for each hole `<kind>` of a template; they may have holes themselves.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Most variables are one token of a vocabulary of 2048, also after a space.
_NAMES = _words(
    """
    address args attr attrs base block body buf buffer bytes callback case char child chunk cls cmd
    code col command conn content context count current data default depth description dest dir doc
    elem encoding end entry err errors event expected exc extra factory field file filename first
    flags flag format frame func function group handle handler hash header headers host index info
    input instance interval item iterable key kind label last left length level limit line lines
    lineno loop mapping mask match message method mode module msg name names new node number obj
    offset old op option options order origin other out output owner param parent parser part parts
    password path pattern pos prefix process queue reader reason record request res response result
    results right root row rest sample script section sender seq server signature size
    sock socket source spec start state status step stop stream string sub suffix symbol tag target
    task template test text thread timeout title token total tree tb type unit url user val value
    values var version widget width word writer
    """
)
_LETTERS = _words("a b c d e f g h i j k l m n o p q r s t u v w x y z")
_PLURALS = _words(
    """
    args attrs blocks bytes calls cases children chunks classes columns commands data entries errors
    events fields files flags functions groups handlers headers items keys lines list methods
    modules names nodes objects options paths parts pairs params patterns pending queue records
    results rows samples sections sources stack strings tags targets tasks tests threads tokens
    types values words widgets
    """
)
_NOUNS = _words(
    """
    argument arguments attribute base block byte bytes call character characters class code command
    connection context data default directory element encoding end error event field file format
    function header index input instance integer item key keyword length level line list message
    method mode module name number object offset option output parent path position process result
    sequence server set size socket start state stream string test text thread time token type value
    version
    """
)

VOCABULARY: dict[str, tuple[str, ...]] = {
    # Single names.
    "name": _NAMES * 6 + _LETTERS * 3,
    "long": _NAMES,
    "letter": _LETTERS,
    # What conditions are about: results of calls, arguments.
    "subject": _words(
        """
        action arg args attr attrs c ch char chunk cls code d data dir end err f file first func i
        index info item k key kind last left length line m match method mode module msg n name new
        node obj p path pos prefix r result right root s size source start state status t target
        text token type v val value x
        """
    ),
    "counter": _words("i i i i i j j k n x index idx row col pos num"),
    "plural": _PLURALS,
    "function": _words(
        """
        add append build call check clean clear close code compare compile connect convert copy
        count create decode delete dispatch dump encode escape execute expand extend fail fetch
        filter find finish flush format get get_data get_name handle init insert iter join keys len
        list load lookup make make_node match merge move next normalize open pack parse pop process
        push put quote read read_line register remove repr reset resolve run save seek select send
        set_value setup skip sort split start stop strip test update validate visit wait walk write
        """
    ),
    "class": _words(
        """
        Action Block Buffer Cache Client Command Config Connection Context Counter Decoder Encoder
        Entry Event Field File Filter Form Formatter Frame Group Handler Header Info Item Iterator
        Key Loader Lock Manager Message Method Model Module Node Option Parser Path Pattern Pool
        Process Proxy Queue Reader Record Request Response Result Runner Scanner Section Server
        Session Socket Source Spec State Stream Symbol Task Test Thread Token Tree Type Value View
        Widget Word Writer
        """
    ),
    "base": _words("object Exception Base dict list Node Handler Thread TestCase"),
    "error": _words(
        """
        AttributeError ImportError IndexError KeyError LookupError NotImplementedError OSError
        RuntimeError TypeError ValueError
        """
    ),
    "module": _words(
        """
        abc ast asyncio codecs collections copy errno functools io inspect itertools json logging
        math operator os pickle random re select shutil signal socket string struct subprocess sys
        tempfile threading time traceback types unittest warnings weakref
        """
    ),
    "key": _words(
        """
        name type value key path id size mode data text file code version encoding errors format
        level host port user status title start end count default flags args kwargs message method
        module line lines class object first last prefix suffix date url root index label max min
        color width height header body parent options description content-type content_length x y a
        b c foo bar spam eggs one two three red green blue utf-8 ascii latin-1 test tests
        """
    ),
    "noun": _NOUNS,
    "verb": _words(
        """
        call change close connect convert create decode delete encode find get handle load open
        parse process read remove return run send set start stop support test update use write
        """
    ),
    "which": _words("base current default end first last max min new next old other start"),
    "part": _words("class code count data field file id index key line list name path size type"),
    "number": _words("0 1 1 2 3 4 5 8 10 16 20 32 42 64 100 256 1024"),
    "digit": _words("0 1 2 3 4 5 6 7 8 9"),
    # Names of several words, and what code does with names.
    "compound": ("<name>",) * 3 + ("<long>_<part>",),
    "triple": ("<which>_<noun>_<part>",),
    "dotted": ("self.<long>.<long2>", "self.<long>.<long2>", "self.<long>.<long2>.<long3>"),
    "quoted": ("'<key>'", '"<key>"'),
    "simple": ("<name>",) * 5
    + ("self.<long>",) * 2
    + ("None", "True", "False", "[]", "<number>", "<quoted>"),
    "args": ("", "<simple>", "<simple>", "<simple>", "<simple>, <simple2>"),
    "owner": ("", "", "self.", "self.", "<name>."),
    "call": ("<owner><function>(<args>)",),
    "params": ("self", "self, <name>", "self, <name>", "self, <name>, <name2>"),
    "condition": (
        "<name>",
        "not <name>",
        "not self.<long>",
        "<name> is None",
        "<name> is not None",
        "self.<long> is None",
        "<name> > <number>",
        "<name> == <number>",
        "<name> == <name2>",
        "<name> in self.<plural>",
        "<name> not in <plural>",
    ),
    # Messages and comments, without quotes, brackets and full stop.
    "clause": (
        "invalid <noun>",
        "unknown <noun>",
        "unexpected <noun>",
        "no such <noun>",
        "<noun> not found",
        "<noun> is empty",
        "<noun> too long",
        "<noun> must be <noun2>",
        "<noun> is not a <noun2>",
        "<noun> has no <noun2>",
        "cannot <verb> <noun>",
        "could not <verb> the <noun>",
        "unable to <verb> <noun>",
        "expected <noun> but got <noun2>",
        "<verb> the <noun>",
        "the <noun> of the <noun2>",
        "only one <noun> can be used",
        "this <noun> should not <verb>",
        "<noun> does not support <noun2>",
    ),
    "joint": (" for ", " in ", " and ", ", ", " with ", " from ", ": ", " when "),
    "phrase": ("<clause>", "<clause>", "<clause><joint><clause2>"),
    # Neutral code: lines of a function, of a module, and what stands before them.
    "step": ("<name> = <simple>", "<name> = <call>", "<call>", "<call>"),
    "body": ("<step>", "<step>", "<step>\n    <step2>"),
    "statement": (
        "<name> = <name2>",
        "<name> = <simple>",
        "<name> = <simple>",
        "<name> = <call>",
        "<name> = <call>",
        "<name> = <name2>.<function>(<simple>)",
        "<name> = <name2>[<number>]",
        "<name> = <name2> + <number>",
        "<name> = <name2> or <name3>",
        "<name> = [<name2>, <name3>]",
        "<name> = {}",
        "<name>, <name2> = <function>(<name3>)",
        "<name> += <number>",
        "<name>[<name2>] = <name3>",
        "<name>.append(<name2>)",
        "assert <name> is not None",
        "print(<name>, <name2>)",
        "# <phrase>",
        "# <phrase>",
        "<name> = self.<long>",
        "self.<long> = <name>",
        "self.<long> = <simple>",
        "self.<long>.<function>(<args>)",
        "self.assertEqual(<name>, <simple>)",
        "self.assertRaises(<error>, <function>, <name>)",
        "<call>",
        "<call>",
        "if <name> is None:\n    <body>",
        "if <condition>:\n    <body>",
        "if <condition>:\n    raise <error>(<quoted>)",
        "if isinstance(<name>, <class>):\n    <body>",
        "for <name> in <plural>:\n    <body>",
        "while <name> < <number>:\n    <body>",
        "with self.<long>:\n    <body>",
        "try:\n    <body>\nexcept <error>:\n    <name> = None",
    ),
    "import": ("import <module>",) * 2 + ("from <module> import <function>",),
    "header": ("def <function>(<params>):",) * 2
    + ("class <class>(<base>):\n    def <function>(<params>):",),
}
# Within a piece of code each of these is another one.
DISTINCT = frozenset(
    {"name", "long", "subject", "letter", "counter", "plural", "noun", "which", "verb"}
)
