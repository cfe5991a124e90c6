"""`python -m sparse_transformer.tasks`: files to teach a model with, and what is refused."""

import ast
import re
from types import SimpleNamespace

import pytest

from sparse_transformer.cli import tasks as program
from sparse_transformer.tasks import TASKS
from sparse_transformer.tasks.task import _side


def written(folder):
    return [path.read_text() for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", ["bracket_counting", "single_double_quote", "var_if"])
def test_files_are_solved_prompts_for_training(name, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert program.main([name, "--out", str(out), "--pairs", "250", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"250 pairs in {out}\n"
    files = written(out)
    # 100 pairs a file, so that some are left for validation.
    assert [path.name for path in sorted(out.iterdir())] == [f"{name}_0000{i}.py" for i in range(3)]
    drafts = [draft for draft, _ in zip(TASKS[name].drafts("train", 3), range(250), strict=False)]
    texts = [
        text for d in drafts for text in (f"{d.positive}{d.right}\n", f"{d.negative}{d.wrong}\n")
    ]
    assert "".join(files) == "".join(texts)
    assert {_side(prompt) for d in drafts for prompt in (d.positive, d.negative)} == {"train"}


def test_all_tasks_are_written_as_each_alone(tmp_path):
    assert program.main(["--all", "--out", str(tmp_path / "all"), "--pairs", "3"]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == set(TASKS)
    assert program.main(["with_as", "--out", str(tmp_path / "one"), "--pairs", "3"]) == 0
    assert written(tmp_path / "all" / "with_as") == written(tmp_path / "one")


def test_the_right_bracket_closes_each_list(tmp_path):
    assert program.main(["bracket_counting", "--out", str(tmp_path), "--pairs", "50"]) == 0
    lines = [line.strip() for line in written(tmp_path)[0].splitlines() if line.endswith("]")]
    # Others are the ends of lists that the text begins in.
    lists = [line for line in lines if re.match(r"(return|\S+ \+?=) ", line)]
    assert sum(text.endswith("]]") for text in lists) >= 50
    for text in lists:
        ast.parse(text.removeprefix("return "))


def test_a_second_run_writes_the_same(tmp_path):
    for folder in ("a", "b"):
        assert program.main(["with_as", "--out", str(tmp_path / folder), "--pairs", "20"]) == 0
    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_tasks_are_listed_and_shown(capsys):
    assert program.main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(TASKS)
    assert all(TASKS[line.split()[0]].description in line for line in listed)
    assert program.main(["with_as"]) == 0
    shown = capsys.readouterr().out
    draft = next(iter(TASKS["with_as"].drafts("test")))
    assert draft.positive + draft.right in shown
    assert draft.negative + draft.wrong in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["bracket_countin"], "did you mean bracket_counting"),
        (["with_as", "--pairs", "0"], "--pairs must be at least 1"),
        ([], "give NAME --out DIR, --all --out DIR, or --shortcuts"),
        (["with_as", "--all"], "give NAME --out DIR, --all --out DIR, or --shortcuts"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(tmp_path, refused, words, sentence):
    refused(program.main([*words, "--out", str(tmp_path / "out")]), sentence)
    assert not (tmp_path / "out").exists()


def test_more_pairs_than_there_are_is_an_error(tmp_path, capsys, monkeypatch):
    few = iter(TASKS["with_as"].drafts("train"))
    monkeypatch.setattr(program, "islice", lambda drafts, count: [next(few) for _ in range(7)])
    assert program.main(["with_as", "--out", str(tmp_path), "--pairs", "8"]) == 2
    assert (
        "has only 7 different pairs for training: use a smaller --pairs" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert program.main(["with_as", "--out", str(taken), "--pairs", "2"]) == 2
    assert "cannot be written (File exists): choose another --out" in capsys.readouterr().err


def test_the_table_of_shortcuts_names_each_task_and_its_accuracies(capsys, monkeypatch):
    monkeypatch.setattr(program.shortcuts, "accuracies", lambda task, _: dict.fromkeys(
        program.shortcuts.FEATURES, 0.5
    ))  # fmt: skip
    monkeypatch.setattr(program.data, "prepare", lambda: SimpleNamespace(tokenizer=None))
    assert program.main(["--shortcuts"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "task"
    assert [row.split()[0] for row in rows] == list(TASKS)
    assert all(row.split()[1:5] == ["0.50"] * 4 for row in rows)
    assert [name for row, name in zip(rows, TASKS, strict=True) if row.split()[5:] != ["-"]] == [
        "else_elif"
    ]
    assert program.main(["for_while", "--shortcuts"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
