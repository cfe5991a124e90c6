"""The tasks: what every pair promises, what tells its prompts apart, and what is refused."""

import ast
import re
import statistics
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sparse_transformer import data, load_model, tasks
from sparse_transformer.errors import UserError
from sparse_transformer.tasks import TASKS, Draft, Task, collate, shortcuts
from sparse_transformer.tasks.task import _side
from sparse_transformer.tasks.template import Template

NAMES = list(TASKS)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A real vocabulary of 2048, of the beginning of the standard library."""
    files, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        size += path.stat().st_size
        if size > 1_000_000:
            break
        files.append(path)
    cache_dir = tmp_path_factory.mktemp("cache")
    return data.prepare(files, vocab_size=2048, cache_dir=cache_dir, progress=False).tokenizer


@pytest.fixture(scope="session")
def corpus_tokenizer():
    """That of the default corpus, which a model was trained with."""
    return load_model("python-small").tokenizer


@pytest.fixture(scope="session")
def drawn(tokenizer):
    """The same pairs for all tests that look at many."""

    @cache
    def pairs(name):
        return TASKS[name].pairs(tokenizer, 256, split="test")

    return pairs


def byte_tokenizer(*merges):
    """A token for each byte, and what the merges join."""
    vocab = {byte: place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for first, second in merges:
        vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def prompts(pairs):
    return [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]


def apart(draft):
    """The two prompts without what both begin with and what both end with."""
    positive, negative = draft.positive, draft.negative
    shorter = min(len(positive), len(negative))
    start = next((i for i in range(shorter) if positive[i] != negative[i]), shorter)
    rest = shorter - start
    end = next((i for i in range(rest) if positive[-1 - i] != negative[-1 - i]), rest)
    return [text[start : len(text) - end] for text in (positive, negative)]


def whole(text):
    """A text that begins in the middle of a function, with heads of blocks before it."""
    if not text.startswith("\n "):
        return text
    depth = len(text) - len(text.lstrip()) - 1
    return "".join(f"{' ' * level}class C:\n" for level in range(0, depth, 4)) + text[1:]


def test_the_registry_has_the_twenty_in_order():
    assert " ".join(NAMES) == (
        "single_double_quote final_kwarg set_or_string set_or_string_fixedvarname class_init "
        "with_as bracket_brace with_open bracket_counting for_while else_elif fstring_brace "
        "if_ternary var_swap indent_for lambda_func if_equals enumerate_range var_if "
        "while_return_true"
    )
    for name, task in TASKS.items():
        assert tasks.get(name) is task
        assert task.name == name
        assert task.description.endswith(".")
        assert "\n" not in task.description


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="no task 'for_wile': did you mean for_while"):
        tasks.get("for_wile")
    with pytest.raises(UserError, match="no task 'zzz': there are single_double_quote, final"):
        tasks.get("zzz")


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_single_tokens_and_swapped(name, tokenizer, drawn):
    for pair in drawn(name)[:64]:
        assert (pair.positive.right, pair.positive.wrong) == (
            pair.negative.wrong,
            pair.negative.right,
        )
        assert pair.positive.right != pair.positive.wrong
        assert pair.positive.tokens != pair.negative.tokens
        for prompt in (pair.positive, pair.negative):
            assert tokenizer.encode(prompt.text).ids == list(prompt.tokens)
            for answer in (prompt.right, prompt.wrong):
                text = prompt.text + tokenizer.decode([answer])
                assert tokenizer.encode(text).ids == [*prompt.tokens, answer]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_varied_and_of_many_lengths(name, drawn):
    pairs = drawn(name)
    texts = [prompt.text for prompt in prompts(pairs)]
    assert len(set(texts)) == 512
    lengths = [len(prompt.tokens) for prompt in prompts(pairs)]
    assert 12 <= statistics.median(lengths) <= 80
    assert len(set(lengths)) >= 40
    assert max(lengths) <= 128
    # The same endings do not come again and again.
    assert len({pair.positive.text[-60:] for pair in pairs}) >= 200


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_one_short_place_tells_the_prompts_apart(name, seed):
    """What stands before and after is the same in both, so that nothing else can."""
    draft = TASKS[name].draw(Random(seed))
    middles = apart(draft)
    assert middles[0] != middles[1]
    assert all(len(middle) <= 80 for middle in middles)
    assert draft == TASKS[name].draw(Random(seed))


def test_only_the_published_shortcut_is_declared():
    assert [name for name, task in TASKS.items() if task.shortcut] == ["else_elif"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_linear_classifier_solves_a_task(name, corpus_tokenizer):
    """All tokens without their order, and the last ones, tell too little of the answer."""
    found = shortcuts.accuracies(TASKS[name], corpus_tokenizer, kinds=shortcuts.LIMITS)
    over = {kind for kind, limit in shortcuts.LIMITS.items() if found[kind] > limit}
    assert bool(over) == bool(TASKS[name].shortcut), found


def test_the_classifier_finds_what_the_tokens_tell(tokenizer):
    """A token anywhere is in the bag, and one of the last three is in the last four."""

    def near(random):
        text = f"{random.random()} = size, name"
        return Draft(f"for {text}", f"while {text}", " in", ":")

    def nearer(random):
        return Draft(f"{random.random()} for x", f"{random.random()} while x", " in", ":")

    def order(random):
        text = random.random()
        return Draft(f"{text} for while x", f"{text} while for x", " in", ":")

    expected = {near: (0.5, 0.5, 0.5, 1), nearer: (0.5, 1, 1, 1), order: (0.5, 1, 1, 0.5)}
    for draw, accuracies in expected.items():
        task = Task("planted", "Planted.", draw)
        found = shortcuts.accuracies(task, tokenizer, train_pairs=60, test_pairs=40)
        assert tuple(found.values()) == pytest.approx(accuracies, abs=0.05)


def last_line(text):
    return text[text.rfind("\n") + 1 :].lstrip()


def begins(*words):
    """An oracle: the first answer if the last line begins with one of the words."""
    return lambda text, first, second: first if last_line(text).startswith(words) else second


def oracle_quote(text, first, second):
    opened = text[text.rindex("(") + 1]
    return first if first.startswith(opened) else second


def oracle_set_or_string(text, first, second):
    name = last_line(text)
    (set_to,) = re.findall(rf"(?m)^ *{re.escape(name)} = (set\(\)|''|\"\")$", text)
    return first if set_to == "set()" else second


def oracle_bracket_brace(text, first, second):
    quote = text.rindex(first[0])
    return first if text[:quote].rstrip()[-1] == "{" else second


def oracle_class_init(text, first, second):
    attribute = last_line(text).removeprefix("self.").removeprefix("_").removesuffix(" =")
    return first if f"{attribute}_".startswith(f"{first[1:]}_") else second


READING, WRITING = ("read", "load", "parse"), ("write", "save", "dump")


def oracle_with_open(text, first, second):
    verbs = "|".join(READING + WRITING)
    *_, said = re.findall(rf"(?:def |# )({verbs})(?:_| the | all )", text)
    return first if said in READING else second


def oracle_swap(text, first, second):
    (name,) = re.findall(r"^(?:[\w.\[]*[.\[])?(\w+)\]?, ", last_line(text))
    return first if first.strip() == name.removeprefix("_") or first == f" {name}" else second


def oracle_indent(text, first, second):
    line = text[text.rfind("\n") + 1 :]
    deeper = 4 * line.lstrip().startswith("for ")
    indent = len(line) - len(line.lstrip()) + deeper
    return next(a for a in (first, second) if a == "\n" + " " * max(indent - 1, 0))


def oracle_var_if(text, first, second):
    *_, name = re.findall(rf"(?m)^ *({first[1:]}|{second[1:]}) = ", text)
    return first if first[1:] == name else second


# Each reads the text alone and takes the answer that Python, or its author, needs there.
ORACLES = {
    "single_double_quote": oracle_quote,
    "final_kwarg": lambda text, a, b: a if "=" in last_line(text) else b,
    "set_or_string": oracle_set_or_string,
    "set_or_string_fixedvarname": oracle_set_or_string,
    "class_init": oracle_class_init,
    "with_as": begins("with "),
    "bracket_brace": oracle_bracket_brace,
    "with_open": oracle_with_open,
    "bracket_counting": lambda text, a, b: a if "[[" in last_line(text) else b,
    "for_while": begins("for "),
    "else_elif": begins("else"),
    "fstring_brace": lambda text, a, b: a if text.rfind("{") > text.rfind("}") else b,
    "if_ternary": lambda text, a, b: b if last_line(text).startswith("if ") else a,
    "var_swap": oracle_swap,
    "indent_for": oracle_indent,
    "lambda_func": lambda text, a, b: a if "lambda " in last_line(text) else b,
    "if_equals": begins("if ", "while "),
    "enumerate_range": lambda text, a, b: a if ", " in text[text.rindex("for ") :] else b,
    "var_if": oracle_var_if,
    "while_return_true": begins("while "),
}


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_one_fact_in_the_text_decides(name, seed):
    draft = TASKS[name].draw(Random(seed))
    oracle = ORACLES[name]
    assert oracle(draft.positive, draft.right, draft.wrong) == draft.right
    assert oracle(draft.negative, draft.right, draft.wrong) == draft.wrong


# What may follow an answer, and close what is open.
MIDDLES = ("", " x", "x", " pass", "(x)", ": pass", " x: pass", "None): pass", "(x): pass")
CLOSERS = ["".join(closer) for size in range(4) for closer in product(")]}", repeat=size)]
CLOSERS += [quote + closer for quote in "'\"" for closer in ("", ")", "))", "): pass")]
ENDINGS = [f"{middle}{closer}" for closer in CLOSERS for middle in MIDDLES]


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_a_prompt_and_its_right_answer_are_the_beginning_of_python(name, seed):
    template = TASKS[name].draw
    # Whole statements alone: what a cut one begins with is not Python by itself.
    wholes = tuple(statement for _, statement in template.cut)
    before = (*template.before, wholes) if wholes else template.before
    draft = replace(template, before=before, cut=())(Random(seed))
    for text, answer in ((draft.positive, draft.right), (draft.negative, draft.wrong)):
        assert any(parses(whole(text + answer + ending)) for ending in ENDINGS), text + answer


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@given(seed=SEEDS, indent=st.sampled_from([0, 4, 8]))
def test_neutral_lines_are_python_and_keep_off_the_names_of_the_task(seed, indent):
    template = Template(
        text="value<fact>", facts=((" + name", " - data"),), answers=("", ""), indents=(indent,)
    )
    draft = template(Random(seed))
    text = draft.positive.removesuffix("value + name")
    assert draft.negative == f"{text}value - data"
    assert text.endswith("\n" + " " * indent) or (indent == 0 and text == "")
    module = ast.parse(whole(text + "pass"))
    used = {node.id for node in ast.walk(module) if isinstance(node, ast.Name)}
    assert not used & {"value", "name", "data"}


def test_a_hole_is_the_same_throughout_a_prompt_and_others_differ():
    template = Template(
        text="<name> <name2> <both> <fact>",
        facts=(("<name>", "<name2>"),),
        answers=("<name>", "<other>"),
        before=(("<name> <name3>",),),
        where={"both": ("<name>_<name2>",)},
        indents=(0,),
    )
    for seed in range(50):
        draft = template(Random(seed))
        *_, last = draft.positive.splitlines()
        first, second, both, fact = last.split()
        assert (both, fact, draft.right) == (f"{first}_{second}", first, first)
        assert first != second
        assert draft.negative.endswith(f" {second}")
        (line,) = re.findall(rf"(?m)^{first} (\w+)$", draft.positive)
        assert line not in (first, second)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_pairs(name, tokenizer, drawn):
    task = TASKS[name]
    assert task.pairs(tokenizer, 20, split="test") == drawn(name)[:20]
    others = task.pairs(tokenizer, 20, split="test", seed=1)
    assert others != drawn(name)[:20]


LETTERS = byte_tokenizer()


@pytest.mark.parametrize("name", NAMES)
@given(seed=SEEDS)
def test_the_splits_share_no_prompt_whatever_the_seeds(name, seed, tokenizer):
    train = TASKS[name].pairs(tokenizer, 8, split="train", seed=seed)
    test = TASKS[name].pairs(tokenizer, 8, split="test", seed=seed + 1)
    assert not {p.text for p in prompts(train)} & {p.text for p in prompts(test)}


def test_the_splits_share_no_prompt_where_there_are_few():
    def draw(random):
        name = random.choice("abcdefghijklmnopqrstuvwxyz")
        return Draft(f"for {name}", f"while {name}", " in", ":")

    task = Task("few", "Few.", draw, first_token=True)
    found = {}
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"has only \d+ different pairs of at most 128") as no:
            task.pairs(LETTERS, 26, split=split)
        count = int(str(no.value).split("only ")[1].split()[0])
        found[split] = {p.text for p in prompts(task.pairs(LETTERS, count, split=split, seed=3))}
        assert len(found[split]) == 2 * count
    assert not found["train"] & found["test"]


@pytest.mark.slow
def test_another_process_draws_the_same_pairs():
    program = (
        "from random import Random; from sparse_transformer.tasks import TASKS;"
        "print([t.draw(Random(f'{n} {s}')) for n, t in TASKS.items() for s in range(20)])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "PYTHONHASHSEED": "1"},
    )
    here = [task.draw(Random(f"{name} {s}")) for name, task in TASKS.items() for s in range(20)]
    assert ran.stdout == f"{here}\n"


@pytest.mark.parametrize("bounds", [{"max_tokens": 64}, {"context": 64}])
def test_no_prompt_is_longer_than_asked(bounds, tokenizer):
    pairs = TASKS["for_while"].pairs(tokenizer, 30, split="train", **bounds)
    assert max(len(prompt.tokens) for prompt in prompts(pairs)) <= 64
    both = TASKS["for_while"].pairs(tokenizer, 30, split="train", context=64, max_tokens=99)
    assert max(len(prompt.tokens) for prompt in prompts(both)) <= 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bracket_counting", {}, r"because the answer '\]\]' is not a single token after"),
        ("single_double_quote", {}, r"because the answer '\"\)' is not a single token"),
        ("class_init", {"max_tokens": 5}, "because no prompt is as short as 5 tokens"),
        ("for_while", {"count": 0}, "the number of pairs must be at least 1, got 0"),
        ("for_while", {"split": "validation"}, "must be train or test, got 'validation'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_sentence(name, options, message):
    options = {"count": 4, "split": "test", **options}
    count = options.pop("count")
    with pytest.raises(UserError, match=message) as refusal:
        TASKS[name].pairs(LETTERS, count, **options)
    assert "\n" not in str(refusal.value)


def test_a_quarter_of_all_pairs_is_for_each_split():
    task, random = TASKS["for_while"], Random(0)
    sides = []
    for _ in range(2000):
        draft = task.draw(random)
        sides.append({_side(draft.positive), _side(draft.negative)})
    for split in ("train", "test"):
        assert sides.count({split}) == pytest.approx(500, abs=80)


def test_answers_that_begin_alike_are_refused():
    task = Task("alike", "Alike.", lambda random: Draft(
        f"a{random.random()}", f"b{random.random()}", "xy", "xz"
    ), first_token=True)  # fmt: skip
    with pytest.raises(UserError, match="the answers 'xy' and 'xz' begin with the same token"):
        task.pairs(LETTERS, 1, split="train")


def test_a_draft_whose_answer_joins_its_prompt_is_skipped():
    """`]` after `]` would be one token, so that only prompts that end otherwise are asked."""

    def draw(random):
        text = f"{random.random()}{random.choice(']x')}"
        return Draft(f"a{text}", f"b{text}", "]", "}")

    task = Task("joins", "Joins.", draw)
    pairs = task.pairs(byte_tokenizer(("]", "]")), 50, split="train")
    assert all(prompt.text.endswith("x") for prompt in prompts(pairs))


def test_collate_pads_on_the_right():
    pairs = TASKS["for_while"].pairs(byte_tokenizer(("Ġ", "i"), ("Ġi", "n")), 5, split="train")
    batch = collate(pairs, pad=255)
    rows = prompts(pairs)
    assert batch.tokens.shape == (10, max(len(prompt.tokens) for prompt in rows))
    assert batch.tokens.dtype == batch.last.dtype == batch.right.dtype == torch.int64
    assert batch.positive.tolist() == [True, False] * 5
    for row, prompt in enumerate(rows):
        end = int(batch.last[row]) + 1
        assert tuple(batch.tokens[row, :end].tolist()) == prompt.tokens
        assert (batch.tokens[row, end:] == 255).all()
        assert (int(batch.right[row]), int(batch.wrong[row])) == (prompt.right, prompt.wrong)
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    with pytest.raises(ValueError, match="at least one pair"):
        collate([], pad=0)
