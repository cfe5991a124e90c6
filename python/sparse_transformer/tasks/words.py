"""The names and words that the tasks' code is made of, as the standard library chooses them."""

from __future__ import annotations

from collections.abc import Collection
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Variables and parameters. Most are one token of a vocabulary of 2048, also after a space.
NAMES = _words(
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
# Single letters, where the standard library takes them: numbers, indices, keys, short loops.
LETTERS = _words("a b c d e f g h i j k l m n o p q r s t u v w x y z")
# What code asks about: results of calls, arguments.
SUBJECTS = _words(
    """
    action arg args attr c ch char chunk cls code d data dir end err f file filename first func i
    index info item k key kind last left length limit line m match method mode module msg n name new
    node obj op p path pos prefix r res result right root rv s size source start state status t
    target text token type v val value values version x
    """
)
# What a loop counts with.
COUNTERS = _words("i i i i i j j k n x index idx row col pos lineno num")
# What one turns over, one by one.
PLURALS = _words(
    """
    args attrs blocks bytes calls cases children chunks classes columns commands data entries errors
    events fields files flags functions groups handlers headers items keys lines list methods
    modules names nodes objects options paths parts pairs params patterns pending queue records
    results rows samples sections sources stack strings tags targets tasks tests threads tokens
    types values words widgets
    """
)
FUNCTIONS = _words(
    """
    add append build call check clean clear close code compare compile connect convert copy count
    create decode delete dispatch dump encode escape execute expand extend fail fetch filter find
    finish flush format get get_data get_name handle init insert iter join keys len list load lookup
    make make_node match merge move next normalize open pack parse pop process push put quote read
    read_line register remove repr reset resolve run save seek select send set set_value setup skip
    sort split start stop strip test update validate visit wait walk wrap write
    """
)
CLASSES = _words(
    """
    Action Block Buffer Cache Client Command Config Connection Context Counter Decoder Encoder Entry
    Event Field File Filter Form Formatter Frame Group Handler Header Info Item Iterator Key Loader
    Lock Manager Message Method Model Module Node Option Parser Path Pattern Pool Process Proxy
    Queue Reader Record Request Response Result Runner Scanner Section Server Session Socket Source
    Spec State Stream Symbol Task Test Thread Token Tree Type Value View Widget Word Writer
    """
)
BASES = _words("object Exception Base dict list Node Handler Thread TestCase unittest.TestCase")
ERRORS = _words(
    """
    AttributeError ImportError IndexError KeyError LookupError NotImplementedError OSError
    RuntimeError TypeError ValueError
    """
)
MODULES = _words(
    """
    abc ast asyncio codecs collections copy errno functools io inspect itertools json logging math
    operator os pickle random re select shutil signal socket string struct subprocess sys tempfile
    threading time traceback types unittest warnings weakref
    """
)
# Templates for messages, comments and docstrings, filled with nouns and verbs.
_CLAUSES = (
    "invalid {n}",
    "unknown {n}",
    "missing {n}",
    "unexpected {n}",
    "no such {n}",
    "bad {n} {n}",
    "{n} not found",
    "{n} is empty",
    "{n} too long",
    "{n} failed",
    "{n} expected",
    "{n} must be {n}",
    "{n} is not a {n}",
    "{n} has no {n}",
    "cannot {v} {n}",
    "could not {v} the {n}",
    "failed to {v} {n}",
    "unable to {v} {n}",
    "expected {n} but got {n}",
    "{v} the {n}",
    "the {n} of the {n}",
    "only one {n} can be used",
    "this {n} should not {v}",
    "{n} does not support {n}",
)
_JOINTS = (" for ", " in ", " and ", ", ", " with ", " from ", ": ", " when ")
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
_VERBS = _words(
    """
    call change close connect convert create decode delete encode find get handle load open parse
    process read remove return run send set start stop support test update use write
    """
)
# Short strings that name something, for literals.
KEYS = _words(
    """
    name type value key path id size mode data text file code version encoding errors format level
    host port user status title start end count default flags args kwargs message method module
    line lines class object first last prefix suffix date url root index label max min color width
    height header body parent options description content-type content_length user-agent x y a b c
    foo bar spam eggs one two three red green blue utf-8 ascii latin-1 test tests
    """
)


def variable(random: Random, avoid: Collection[str] = (), pool: tuple[str, ...] = NAMES) -> str:
    """A name of `pool` that is not in `avoid`."""
    while True:
        name = random.choice(pool)
        if name not in avoid:
            return name


def variables(
    random: Random, count: int, avoid: Collection[str] = (), pool: tuple[str, ...] = ()
) -> list[str]:
    """`count` different names of `pool`, none in `avoid`.

    Without a pool they are names, now and then all of them single letters.
    """
    pool = pool or (LETTERS if random.random() < 0.2 else NAMES)
    found: list[str] = []
    while len(found) < count:
        found.append(variable(random, [*found, *avoid], pool))
    return found


def compound(random: Random, avoid: Collection[str] = ()) -> str:
    """A name, one in four times of two words."""
    name = variable(random, avoid)
    return name if random.random() < 0.75 else f"{name}_{random.choice(NAMES)}"


def phrase(random: Random, least: int = 1, most: int = 8) -> str:
    """About `least` to `most` words, the last of them a word: no quotes, brackets, full stop."""
    wanted = random.randint(least, most)
    if wanted == 1:
        return random.choice(_NOUNS)
    text = _clause(random)
    while len(text.split()) < wanted:
        text += random.choice(_JOINTS) + _clause(random)
    return text


def _clause(random: Random) -> str:
    # Each noun is another one.
    clause = random.choice(_CLAUSES).replace("{v}", random.choice(_VERBS))
    for noun in random.sample(_NOUNS, clause.count("{n}")):
        clause = clause.replace("{n}", noun, 1)
    return clause


def number(random: Random) -> str:
    """A literal as code has it: small ones mostly."""
    return str(random.choice((0, 1, 1, 2, 3, 4, 5, 8, 10, 16, 20, 32, 42, 64, 100, 256, 1024)))


def quoted(random: Random) -> str:
    """A short string literal, in either kind of quotes."""
    quote = random.choice("'\"")
    return f"{quote}{random.choice(KEYS)}{quote}"


def simple(random: Random, avoid: Collection[str] = ()) -> str:
    """An expression without operators: a name, an attribute, a literal."""
    kind = random.random()
    if kind < 0.5:
        return variable(random, avoid)
    if kind < 0.7:
        return f"self.{variable(random, avoid)}"
    return random.choice(("None", "True", "False", "[]", number(random), quoted(random)))


def call(random: Random, avoid: Collection[str] = ()) -> str:
    """A call of a function or a method, with up to two arguments."""
    function = random.choice(FUNCTIONS)
    arguments = ", ".join(simple(random, avoid) for _ in range(random.choice((0, 1, 1, 1, 2))))
    owner = random.choice(("", "", "self.", "self.", f"{variable(random, avoid)}."))
    return f"{owner}{function}({arguments})"


def condition(random: Random, subject: str, avoid: Collection[str] = ()) -> str:
    """A test of `subject` that ends in a word or a number, so that `:` after it is a token."""
    return random.choice(
        (
            subject,
            subject,
            f"not {subject}",
            f"{subject} is None",
            f"{subject} is not None",
            f"{subject} > {number(random)}",
            f"{subject} == {number(random)}",
            f"{subject} == {variable(random, (subject, *avoid))}",
            f"{subject} in self.{random.choice(PLURALS)}",
            f"{subject} not in {variable(random, (subject, *avoid), PLURALS)}",
        )
    )
