"""Every program, asked anything: one sentence and status 2 (or 0 where it can), nothing harmed.

`main` is called in this process, so an exception that it lets through, which would be a traceback,
fails the test by itself.
"""

import ast
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparse_transformer
from sparse_transformer import UserError, load_model
from sparse_transformer import __main__ as listing
from sparse_transformer.bridges import __main__ as bridges
from sparse_transformer.browse import __main__ as browse
from sparse_transformer.circuits import __main__ as circuits
from sparse_transformer.cli import evaluate, export, generate, steer, tasks, train
from sparse_transformer.run import corpus_sample
from sparse_transformer.train import checkpoint

SMALL_RUN = """
    --steps 6 --d-model 32 --n-layer 1 --context 32 --vocab-size 300 --batch-tokens 64
    --density 0.25 --embedding-density 0.25 --topology.period 2 --save-every 3
    --validate-every 6 --validation-tokens 64 --no-tensorboard
"""
TRAIN = SMALL_RUN.split()
PROGRAMS = {
    "train": train.main,
    "generate": generate.main,
    "evaluate": evaluate.main,
    "steer": steer.main,
    "tasks": tasks.main,
    "export": export.main,
    "circuits": circuits.main,
    "bridges": bridges.main,
    "browse": browse.main,
}


def test_all_programs_are_listed():
    assert set(PROGRAMS) == set(listing.PROGRAMS)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a corpus, a cache and a finished run of 6 steps, to be left as it is."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("programs")
    (folder / "corpus").mkdir()
    for file in Path(sparse_transformer.__file__).parent.glob("*.py"):
        shutil.copy(file, folder / "corpus")
    run = [*TRAIN, "--data", "corpus", "--cache-dir", "cache", "--out", "run"]
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train.main(run) == 0
    finally:
        os.chdir(before)
    return folder


def arguments_of(program, **changed):
    """Arguments with which the program does little and succeeds, but for those that are changed."""
    given = {
        "train": {"--resume": None, "--out": "run", "--cache-dir": "cache"},
        "generate": {"--checkpoint": "run", "--tokens": "2"},
        "evaluate": {"--checkpoint": "run", "--tasks": "for_while", "--pairs": "2"},
        "steer": {"--checkpoint": "run", "--prompt": "x = 1"},
        "tasks": {"": "for_while", "--out": "solved", "--pairs": "2"},
        "export": {"--checkpoint": "run", "--out": "exported"},
        # Which this model does not solve.
        "circuits": {
            "--checkpoint": "run", "--out": "circuits", "--task": "for_while",
            "--cache-dir": "cache",
        },
        # Of which it cannot be asked.
        "bridges": {
            "--checkpoint": "run", "--dense": "run", "--cache-dir": "cache", "--tokens": "16",
        },
        "browse": {"--checkpoint": "run", "--out": "run.html", "--cache-dir": "cache"},
    }[program]  # fmt: skip
    given = {**given, **changed}
    return [part for option in given.items() for part in option if part]


# What the small run cannot be asked.
REFUSED = ("circuits", "bridges")


def ask(program, arguments, capsys):
    """Status and stderr."""
    torch.set_num_threads(1)
    refusal = None
    try:
        status = PROGRAMS[program](arguments)
    except SystemExit as caught:
        refusal, status = caught, caught.code
    out, error = capsys.readouterr()
    assert "Traceback" not in out + error
    assert status in (0, 2)
    # Else it is tyro's, which prints a box.
    if status == 2 and refusal is None:
        sentence = error.splitlines()[-1]
        assert sentence.startswith("error: ")
        # What went wrong, and what to do.
        assert ":" in sentence.removeprefix("error: ") or " must be " in sentence
    return status, error


def content(folder):
    """A hash of every file, but for locks and what circuits keep in the cache."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and not path.name.startswith("means-")
    }


def test_arguments_are_good_by_themselves(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "place"))
    for program in PROGRAMS:
        status, error = ask(program, arguments_of(program), capsys)
        assert status == (2 if program in REFUSED else 0), error


def mostly_slow(cases, every):
    """The cases, of which one in `every` runs in the default tier."""
    return [
        pytest.param(*case, marks=[] if number % every == 0 else [pytest.mark.slow])
        for number, case in enumerate(cases)
    ]


NUMBERS = ("nan", "inf", "-1", "0", "1e-320", "1e21", str(10**21), str(2**64), "x", "")
OPTIONS = {
    "train": (
        "--steps", "--batch-tokens", "--task-pairs", "--accumulate", "--seed", "--max-rise",
        "--rank-timeout",
        "--keep", "--learning-rate", "--beta1", "--beta2", "--eps", "--weight-decay", "--density",
        "--d-model", "--n-layer", "--context", "--vocab-size", "--d-head", "--n-head", "--d-mlp",
        "--active", "--min-nonzeros", "--positions", "--topology.period", "--topology.seed",
        "--topology.start-multiple", "--topology.drop-share", "--backend", "--device", "--dtype",
        "--validation-tokens", "--embedding-density", "--from-step",
    ),
    "generate": (
        "--temperature", "--top-k", "--seed", "--batch", "--tokens", "--step", "--device",
    ),
    "evaluate": ("--pairs", "--seed", "--step", "--split", "--tasks", "--device"),
    "steer": ("--pairs", "--seed", "--step", "--set", "--ablate", "--show", "--device"),
    "tasks": ("--pairs", "--seed"),
    "export": ("--step",),
    "circuits": ("--target", "--solved", "--seed", "--step", "--task"),
    "bridges": (
        "--channels", "--steps", "--pairs", "--train-pairs", "--tokens", "--step", "--tasks",
    ),
    "browse": ("--step",),
}  # fmt: skip
# Asked for more than a moment's work, a program does it.
LONG = {("generate", "--tokens"), ("generate", "--batch"), ("tasks", "--pairs")}
VALUES = [
    (program, option, value)
    for program, options in OPTIONS.items()
    for option, value in itertools.product(options, NUMBERS)
    if not ((program, option) in LONG and value in (str(10**21), str(2**64)))
][::3]  # of the ten numbers each option gets three or four, in turn


def check_value(place, tmp_path, monkeypatch, capsys, program, option, value):
    monkeypatch.chdir(place)
    before = content(place)
    changed = {option: value}
    if program == "train" and option != "--from-step":
        # A new run; of one step where the value is good.
        out = str(tmp_path / "new" / "run")
        given = dict(zip(TRAIN[::2], TRAIN[1::2], strict=False))
        given |= {"--steps": "1", "--data": "corpus", "--cache-dir": "cache", "--out": out}
        given |= changed
        arguments = [f"{name}={text}" for name, text in given.items() if name != "--no-tensorboard"]
        status, error = ask(program, [*arguments, "--no-tensorboard"], capsys)
        begun = status == 0 or "no checkpoint yet: start again" in error
        assert (tmp_path / "new").exists() == begun, error
    else:
        if program == "tasks":
            changed["--out"] = str(tmp_path / "solved")
        if program in ("circuits", "export", "browse"):
            changed["--out"] = str(tmp_path / "out")
        del changed[option]
        given = arguments_of(program, **changed)
        ask(program, [*given, f"{option}={value}"], capsys)
    assert content(place) == before


@pytest.mark.parametrize(("program", "option", "value"), mostly_slow(VALUES, 24))
def test_values(place, tmp_path, monkeypatch, capsys, program, option, value):
    check_value(place, tmp_path, monkeypatch, capsys, program, option, value)


READERS = (
    "train", "generate", "evaluate", "steer", "circuits", "export", "bridges", "browse",
)  # fmt: skip
PATHS = {
    "absent": lambda folder: "absent",
    "a file": lambda folder: str(file_in(folder, "file", b"x\n")),
    "inside a file": lambda folder: str(file_in(folder, "file", b"x\n") / "run"),
    "empty": lambda folder: str(folder_in(folder, "empty")),
    "not UTF-8": lambda folder: os.fsdecode(b"caf\xe9"),
    "very long": lambda folder: "x" * 5000,
    "no permission": lambda folder: "/proc/1/root/run",
    "a device": lambda folder: os.devnull,
}


def file_in(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


def folder_in(folder, name):
    (folder / name).mkdir()
    return folder / name


@pytest.mark.parametrize(
    ("program", "kind"), mostly_slow(list(itertools.product(READERS, PATHS)), 3)
)
def test_paths(place, tmp_path, monkeypatch, capsys, program, kind):
    monkeypatch.chdir(tmp_path)
    path = PATHS[kind](tmp_path)
    option = "--data" if program == "train" else "--checkpoint"
    if program == "train":
        status, error = ask(program, [*TRAIN, "--data", path, "--out", "new"], capsys)
        assert not Path("new").exists()
    else:
        status, error = ask(program, arguments_of(program, **{option: path}), capsys)
    assert status == 2, error


UNWRITABLE = [kind for kind in PATHS if kind not in ("absent", "empty")]
WRITERS = ["train", "tasks", "evaluate", "steer", "circuits", "export", "bridges", "browse"]


@pytest.mark.parametrize(
    ("program", "kind"), mostly_slow(list(itertools.product(WRITERS, UNWRITABLE)), 4)
)
def test_paths_to_write(place, tmp_path, monkeypatch, capsys, program, kind):
    monkeypatch.chdir(place)
    path = PATHS[kind](tmp_path)
    option = "--json" if program in ("evaluate", "steer", "bridges") else "--out"
    if kind == "not UTF-8":
        path = str(tmp_path / path)
    if program == "train":
        given = [*TRAIN, "--steps", "1", "--data", "corpus", "--cache-dir", "cache", "--out", path]
    else:
        given = arguments_of(program, **{option: path})
    before = content(place)
    ask(program, given, capsys)
    assert content(place) == before


@pytest.mark.parametrize("program", ["evaluate", "steer", "bridges", "browse"])
@pytest.mark.parametrize("path", ["absent/file", "folder"])
def test_a_file_that_cannot_be_written_is_refused_first(
    tmp_path, monkeypatch, capsys, program, path
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    option = "--out" if program == "browse" else "--json"
    # There is no model: it is not even looked for.
    status, error = ask(program, [*arguments_of(program), option, path], capsys)
    assert status == 2
    assert option in error


# What a prompt or a name may be.
TEXTS = ("", "\0", os.fsdecode(b"caf\xe9"), "\ud800", "x" * 200_000, "\N{SNOWMAN}")


ASKED = [
    ("generate", "--prompt"), ("steer", "--prompt"), ("steer", "--task"), ("steer", "--patch"),
    ("steer", "--answers"), ("steer", "--set"), ("steer", "--means"), ("evaluate", "--tasks"),
    ("tasks", ""), ("circuits", "--task"), ("train", "--preset"), ("train", "--data"),
    ("browse", "--prompt"), ("bridges", "--tasks"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "option", "number"),
    mostly_slow([(*asked, number) for asked in ASKED for number in range(len(TEXTS))], 5),
)
def test_texts(place, tmp_path, monkeypatch, capsys, program, option, number):
    text = TEXTS[number]
    monkeypatch.chdir(place)
    before = content(place)
    if program == "train":
        cache = str(tmp_path / "cache") if option == "--data" else "cache"
        given = [*TRAIN, "--steps", "1", "--cache-dir", cache, "--out", str(tmp_path / "new")]
        given += ["--data", "corpus", f"{option}={text}"]
        status, _ = ask(program, given, capsys)
        assert (tmp_path / "new").exists() == (status == 0)
    else:
        writes = program in ("tasks", "circuits", "browse")
        changed = {"--out": str(tmp_path / "out")} if writes else {}
        given = arguments_of(program, **changed)
        if option:
            given = [*given, option, text, *([text] if option == "--answers" else [])]
        else:
            given[0] = text or "x"
        ask(program, given, capsys)
    assert content(place) == before


def damage(step_folder, change):
    """Changes tensors and meta of a checkpoint, and makes its sizes and hashes right again."""
    tensors = load_file(step_folder / "tensors.safetensors")
    record = json.loads((step_folder / "meta.json").read_text())
    change(tensors, record)
    save_file(tensors, step_folder / "tensors.safetensors")
    data = (step_folder / "tensors.safetensors").read_bytes()
    record["bytes"], record["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (step_folder / "meta.json").write_text(json.dumps(record))


QKV = "model.blocks.0.attn.qkv"
TENSORS = {
    "index too large": (f"{QKV}.indices", lambda t: t + 1000),
    "index negative": (f"{QKV}.indices", lambda t: t - 1000),
    "indices unsorted": (f"{QKV}.indices", lambda t: t.flip(1)),
    "indices equal": (f"{QKV}.indices", lambda t: t * 0),
    "indices of another rank": (f"{QKV}.indices", lambda t: t.flatten()),
    "indices of floats": (f"{QKV}.indices", lambda t: t.float()),
    "fewer indices": (f"{QKV}.indices", lambda t: t[:, :-1].contiguous()),
    "weight of another shape": (f"{QKV}.weight", lambda t: t[:-1].contiguous()),
    "weight of integers": (f"{QKV}.weight", lambda t: t.int()),
    "weight with NaN": (f"{QKV}.weight", lambda t: t * torch.nan),
    "weight with infinity": ("model.norm.weight", lambda t: t / 0),
    "empty weight": ("model.bigram", lambda t: t[:0].contiguous()),
    "weight missing": ("model.embed.weight", None),
    "indices missing": ("model.embed.indices", None),
}
STATE = {
    "moment of another shape": (f"optimizer.{QKV[6:]}.weight.exp_avg", lambda t: t[:1].clone()),
    "moment of integers": (f"optimizer.{QKV[6:]}.weight.exp_avg", lambda t: t.int()),
    "moment of doubles": (f"optimizer.{QKV[6:]}.weight.exp_avg_sq", lambda t: t.double()),
    "moment with NaN": ("optimizer.norm.weight.exp_avg", lambda t: t * torch.nan),
    "moment missing": ("optimizer.norm.weight.exp_avg_sq", None),
    "step missing": ("optimizer.norm.weight.step", None),
    "step of another run": ("optimizer.norm.weight.step", lambda t: t + 7),
    "step of three": ("optimizer.norm.weight.step", lambda t: t.expand(3).contiguous()),
    "generator missing": ("generator.cpu", None),
    "generator too short": ("generator.cpu", lambda t: t[:7].clone()),
    "generator of floats": ("generator.cpu", lambda t: t.float()),
}
META = {
    "format": (("format",), 99),
    "format of another type": (("format",), [1]),
    "step changed": (("step",), 5),
    "content missing": (("content",), None),
    "content a list": (("content",), []),
    "settings missing": (("content", "settings"), None),
    "settings a number": (("content", "settings"), 3),
    "model missing": (("content", "settings", "model"), None),
    "model of another release": (("content", "settings", "model", "colour"), "red"),
    "vocabulary of 10^21": (("content", "settings", "model", "vocab_size"), 10**21),
    "a width of 10^9": (("content", "settings", "model", "d_model"), 10**9),
    "layers of text": (("content", "settings", "model", "n_layer"), "two"),
    "layers of more": (("content", "settings", "model", "n_layer"), 2),
    "a negative context": (("content", "settings", "model", "context"), -1),
    "a truth for a size": (("content", "settings", "model", "n_layer"), True),
    "an unknown linear": (("content", "settings", "model", "linear"), "cubic"),
    "fans of text": (("content", "settings", "model", "fans"), {"embed": "x"}),
}
RESUMED = {
    "corpus missing": (("content", "corpus"), None),
    "corpus of numbers": (("content", "corpus"), [1, 2]),
    "position negative": (("content", "metrics_position"), -5),
    "position too large": (("content", "metrics_position"), 10**12),
    "position of text": (("content", "metrics_position"), "x"),
    "seconds NaN": (("content", "seconds"), float("nan")),
    "seconds of text": (("content", "seconds"), "long"),
    "scale missing": (("content", "loss_scale"), None),
    "scale of garbage": (("content", "loss_scale"), {"scale": "x", "good": []}),
    "scale infinite": (("content", "loss_scale", "scale"), float("inf")),
    "watch of garbage": (("content", "watch"), [1]),
    "watch of text": (("content", "watch", "mean"), "x"),
    "topology missing": (("content", "topology"), None),
    "topology of garbage": (("content", "topology"), 7),
    "another hash": (("content", "topology", "hash"), "0" * 64),
    "annealing of text": (("content", "anneal_steps"), "x"),
    "optimizer missing": (("content", "settings", "optimizer"), None),
    "learning rate NaN": (("content", "settings", "optimizer", "learning_rate"), float("nan")),
    "steps of text": (("content", "settings", "train", "steps"), "many"),
}


def of_tensor(name, change):
    def apply(tensors, record):
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])

    return apply


def of_meta(path, value):
    def apply(tensors, record):
        inside = record
        for key in path[:-1]:
            inside = inside[key]
        if value is None:
            del inside[path[-1]]
        else:
            inside[path[-1]] = value

    return apply


def everywhere(make, cases, programs):
    return [(program, name, make(*case)) for name, case in cases.items() for program in programs]


def check_damage(place, tmp_path, monkeypatch, capsys, program, change):
    shutil.copytree(place / "run", tmp_path / "run")
    for name in ("corpus", "cache"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    change(Path("run/step-00000006"))
    before = content(tmp_path / "run")
    status, error = ask(program, arguments_of(program), capsys)
    assert status == 2, error
    assert content(tmp_path / "run") == before
    return error


TAMPERED = [
    *everywhere(of_tensor, TENSORS, READERS),
    *everywhere(of_tensor, STATE, ("train",)),
    *everywhere(of_meta, META, READERS),
    *everywhere(of_meta, RESUMED, ("train",)),
]


@pytest.mark.parametrize(("program", "name", "change"), mostly_slow(TAMPERED, 7))
def test_tampered_checkpoints(place, tmp_path, monkeypatch, capsys, program, name, change):
    """Sizes and hashes are right, so somebody wrote this: the next older one is named."""
    error = check_damage(
        place, tmp_path, monkeypatch, capsys, program, lambda path: damage(path, change)
    )
    advice = "--from-step 3" if program == "train" else "--step 3"
    # These are about other files.
    others = "metrics.jsonl has", "has another model"
    assert advice in error or (program == "train" and any(other in error for other in others))


FILES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "nested": lambda data: b"[" * 100_000,
    "a number": lambda data: b"7",
    "null": lambda data: b"null",
    "zeros": lambda data: bytes(len(data)),
}


def rewrite(name, change):
    def apply(step_folder):
        path = step_folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


DAMAGED = [
    (program, name, kind)
    for program in READERS
    for name in ("meta.json", "tensors.safetensors", "../tokenizer.json")
    for kind in FILES
    # Which train writes again.
    if (program, name) != ("train", "../tokenizer.json")
]


@pytest.mark.parametrize(("program", "name", "kind"), mostly_slow(DAMAGED, 5))
def test_damaged_files(place, tmp_path, monkeypatch, capsys, program, name, kind):
    check_damage(place, tmp_path, monkeypatch, capsys, program, rewrite(name, FILES[kind]))


def moved(step_folder):
    step_folder.rename(step_folder.with_name("step-00000009"))


@pytest.mark.parametrize("program", READERS)
def test_a_renamed_checkpoint_is_refused(place, tmp_path, monkeypatch, capsys, program):
    error = check_damage(place, tmp_path, monkeypatch, capsys, program, moved)
    assert "it was saved as that of step 6" in error


def drop(place, folder, name):
    """An exported model among those that programs know by name."""
    given = {"--checkpoint": place / "run", "--out": folder / name, "--data": place / "corpus"}
    assert export.main([str(word) for pair in given.items() for word in pair]) == 0


@pytest.fixture
def models(place, tmp_path, monkeypatch):
    """The folder of models, with `python-small`; programs run elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drop(place, tmp_path / "models", "python-small")
    monkeypatch.setattr(checkpoint, "MODELS", [tmp_path / "none", tmp_path / "models"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "models"


@pytest.mark.parametrize("program", [name for name in READERS if name != "train"])
def test_programs_know_models_by_name(place, models, capsys, program):
    changed = {"--cache-dir": str(place / "cache")} if program == "circuits" else {}
    if program == "bridges":
        changed["--dense"] = "python-small"
    arguments = arguments_of(program, **{"--checkpoint": "python-small"}, **changed)
    status, error = ask(program, arguments, capsys)
    # It is found, and too small.
    refused = "cannot be asked of this tokenizer" in error
    assert refused if program in REFUSED else status == 0, error
    drop(place, models, "javascript")
    capsys.readouterr()
    arguments[arguments.index("python-small")] = "python-smal"
    status, error = ask(program, arguments, capsys)
    assert status == 2
    assert (
        "python-smal does not exist, and there is no model of that name: did you mean python-small"
        in error
    )
    arguments[arguments.index("python-smal")] = "x"
    assert "there are javascript, python-small" in ask(program, arguments, capsys)[1]


def test_an_exported_model_is_the_model_and_small(place, models, capsys):
    whole, named = load_model(place / "run"), load_model("python-small")
    assert named.tokenizer.to_str() == whole.tokenizer.to_str()
    kept = dict(named.named_parameters())
    for name, parameter in whole.named_parameters():
        wanted = parameter.half().float() if name == "bigram" else parameter
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], wanted), name
    bytes_of = {path.name: path.stat().st_size for path in (models / "python-small").rglob("*")}
    numbers = sum(p.numel() for p in whole.parameters()) - whole.bigram.numel()
    indices = sum(layer.layout.indices.numel() for layer in whole.sparse_layers().values())
    least = 2 * whole.bigram.numel() + 4 * numbers + 2 * indices
    assert least < bytes_of["tensors.safetensors"] < least + 10_000
    # Nothing of the machine that trained it.
    stored = [p.read_text() for p in (models / "python-small").rglob("*.json")]
    assert len(stored) == 3
    measured = (models / "python-small" / "metrics.jsonl").read_text()
    assert (json.loads(measured)["step"], measured.count("\n")) == (6, 1)
    assert "val_loss" in json.loads(measured)
    assert not [text for text in stored if str(place) in text]
    assert load_model(models / "python-small" / "step-00000006").tokenizer is not None
    # A folder of that name goes first, whatever is in it.
    Path("python-small").mkdir()
    with pytest.raises(UserError, match="there is no checkpoint in python-small"):
        load_model("python-small")


def test_an_exported_model_has_a_sample_of_its_corpus(place, models, capsys):
    """Nothing but its folder is needed, and a damaged sample is not used."""
    whole = load_model(place / "run")
    corpus = [str(place / "corpus")]
    rows = corpus_sample(place / "run", whole, data=corpus)
    assert rows.shape[1] == whole.config.context
    assert rows.unique().numel() > 50
    stored = models / "python-small" / "sample.safetensors"
    assert {path.stat().st_mode & 0o777 for path in stored.parent.glob("*.*")} == {
        (models / "python-small" / "config.json").stat().st_mode & 0o777
    }
    assert torch.equal(corpus_sample("python-small", whole), rows)
    other = corpus_sample("python-small", whole, data=[str(place / "corpus" / "run.py")])
    assert not torch.equal(other[:1], rows[:1])
    for damage in (b"x", stored.read_bytes()[:-2]):
        stored.write_bytes(damage)
        with pytest.raises(UserError, match=r"sample.safetensors cannot be read .*: give files"):
            corpus_sample("python-small", whole)
    save_file({"tokens": rows[:, :-1].to(torch.uint16)}, stored)
    with pytest.raises(UserError, match="it is of another model"):
        corpus_sample("python-small", whole)


def test_an_exported_model_cannot_be_trained_on(place, models, capsys):
    arguments = [*TRAIN, "--resume", "--out", str(models / "python-small")]
    arguments += ["--data", str(place / "corpus"), "--cache-dir", str(place / "cache")]
    before = content(models)
    status, error = ask("train", arguments, capsys)
    assert status == 2
    assert "is an exported model, without the state of its training" in error
    assert content(models) == before


def test_an_export_is_not_written_over_anything(place, models, capsys):
    before = content(models)
    given = ["--checkpoint", "python-small", "--out", str(models / "python-small")]
    assert "python-small is not empty: choose another --out" in ask("export", given, capsys)[1]
    assert content(models) == before


MISSING = {
    "train": "tokenizers", "generate": "tokenizers", "evaluate": "safetensors",
    "steer": "safetensors", "export": "filelock", "circuits": "optuna", "tasks": "tyro",
}  # fmt: skip


@pytest.mark.parametrize(("program", "package"), mostly_slow(list(MISSING.items()), 3))
def test_a_missing_package_is_a_sentence(tmp_path, program, package):
    """As if it were not installed."""
    text = f"raise ModuleNotFoundError('not installed', name={package!r})\n"
    (tmp_path / f"{package}.py").write_text(text)
    ran = subprocess.run(
        [sys.executable, "-m", f"sparse_transformer.{program}", "--help"],
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr == (
        f"error: {package} is not installed: pip install '.[transformer]' in the checkout\n"
    )


def test_a_missing_extension_is_a_sentence(place, tmp_path):
    """As in a checkout that was not built."""
    (tmp_path / "_sparse_kernels_cpu.py").write_text("raise ImportError('not built')\n")
    ran = subprocess.run(
        [sys.executable, "-m", "sparse_transformer.generate", "--checkpoint", "run"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no backend can run ")
    assert "(not built); build it with `pip install .`" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_there_are_at_least_400_cases():
    cases = (VALUES, TAMPERED, DAMAGED, ASKED * len(TEXTS), READERS * len(PATHS))
    assert sum(map(len, cases)) >= 400


def test_the_help_of_an_option_is_one_line_of_source():
    """Line breaks in it would stay where they are in a terminal of any width."""
    for path in Path(sparse_transformer.__file__).parent.rglob("*.py"):
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.ClassDef):
                for name, help in itertools.pairwise(found.body):
                    if isinstance(name, ast.AnnAssign) and isinstance(help, ast.Expr):
                        assert "\n" not in ast.literal_eval(help.value), (path, help.lineno)


def test_choices_are_those_of_the_settings():
    """Every number that a run can be given is in the table, so that a new one is not forgotten."""
    known = {option.split(".")[-1].lstrip("-").replace("-", "_") for option in OPTIONS["train"]}
    left = {"validate_every", "save_every", "anneal_share", "stop_share", "candidates"}
    left |= {"sample_tokens"}
    sections = train.TrainConfig, train.ModelConfig, train.OptimizerConfig, train.TopologyConfig
    for section in sections:
        for field in dataclasses.fields(section):
            if field.type.split(" ")[0] in ("int", "float"):
                assert field.name in known | left, field.name
