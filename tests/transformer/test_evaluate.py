"""The evaluation: scores of known models, intervals that cover, a program that explains itself."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import make

from sparse_transformer import ModelConfig, Transformer, UserError, data
from sparse_transformer.cli import evaluate
from sparse_transformer.cli.evaluate import main
from sparse_transformer.evaluation import evaluate_task, score
from sparse_transformer.run import load_run
from sparse_transformer.tasks import TASKS, Pair, Prompt
from sparse_transformer.train import checkpoint

V = 50


def pairs_of(count, seed=0, longest=60):
    """Pairs of random tokens, all prompts different; 1 is right in the positive ones, 2 else."""
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for _ in range(count):
        length = int(torch.randint(5, longest, (), generator=draw))
        one, other = torch.randint(3, V, (2, length), generator=draw).tolist()
        pairs.append(Pair(Prompt("", tuple(one), 1, 2), Prompt("", tuple(other), 2, 1)))
    return pairs


class Known:
    """Answers each prompt with the margin that it is told; remembers what it was asked."""

    def __init__(self, pairs, margin):
        self.margins = {}
        for place, pair in enumerate(pairs):
            for side, prompt in enumerate((pair.positive, pair.negative)):
                self.margins[prompt.tokens] = (prompt.right, margin(place, side))
        self.shapes, self.seen = [], []

    def __call__(self, tokens, *, at):
        self.shapes.append(tuple(tokens.shape))
        logits = torch.zeros(len(tokens), 1, V)
        for row, (line, last) in enumerate(zip(tokens.tolist(), at.tolist(), strict=True)):
            prompt = tuple(line[: last + 1])
            self.seen.append(prompt)
            right, margin = self.margins[prompt]
            logits[row, 0, right] += margin
        return logits


@pytest.mark.parametrize(
    ("margin", "accuracy", "both", "loss"),
    [
        (lambda place, side: 2.0, 1.0, 1.0, math.log1p(math.exp(-2))),
        (lambda place, side: -2.0, 0.0, 0.0, math.log1p(math.exp(2))),
        # Always the answer of the positive prompts.
        (lambda place, side: 2.0 - 4.0 * side, 0.5, 0.0, math.log1p(math.exp(2)) - 1),
        # Right in three pairs of four.
        (lambda place, side: 1.0 if place % 4 else -1.0, 0.75, 0.75, None),
        # A tie is not right.
        (lambda place, side: 0.0, 0.0, 0.0, math.log(2)),
    ],
)
def test_scores_of_known_models(margin, accuracy, both, loss):
    pairs = pairs_of(100)
    result = evaluate_task(Known(pairs, margin), pairs)
    assert result.pairs == 100
    assert result.accuracy.value == accuracy
    assert result.pair_accuracy.value == both
    assert result.solved == (accuracy >= 0.95)
    if loss is not None:
        assert result.loss.value == pytest.approx(loss, abs=1e-6)
    for interval in (result.accuracy, result.pair_accuracy, result.loss):
        assert interval.low <= interval.value <= interval.high


def test_every_prompt_is_asked_once_in_batches_of_a_bounded_size():
    pairs = pairs_of(400, longest=250)
    model = Known(pairs, lambda place, side: place / 100 - 2 + side)
    result = evaluate_task(model, pairs)
    assert sorted(model.seen) == sorted(model.margins)
    assert all(rows <= 128 and rows * length <= 16384 for rows, length in model.shapes)
    asked = sum(rows * length for rows, length in model.shapes)
    assert asked < 1.2 * sum(map(len, model.seen))
    # The order of the pairs changes nothing.
    reverse = evaluate_task(model, pairs[::-1])
    assert dataclasses.astuple(reverse.accuracy) == pytest.approx(
        dataclasses.astuple(result.accuracy)
    )
    assert reverse.loss.value == pytest.approx(result.loss.value)


def test_a_prompt_longer_than_a_batch_is_asked_by_itself():
    pairs = pairs_of(2, longest=6)
    long = Pair(Prompt("", (3,) * 9000, 1, 2), Prompt("", (4,) * 9000, 2, 1))
    model = Known([*pairs, long], lambda place, side: 1.0)
    assert evaluate_task(model, [long, *pairs]).accuracy.value == 1
    assert model.shapes[-1] == (2, 9000)


@torch.no_grad()
def test_padding_has_no_influence():
    model = make().eval()
    pairs = pairs_of(9)
    margins = torch.empty(9, 2, dtype=torch.float64)
    for row, pair in enumerate(pairs):
        for side, prompt in enumerate((pair.positive, pair.negative)):
            logits = model(torch.tensor([prompt.tokens]))[0, -1]
            margins[row, side] = logits[prompt.right] - logits[prompt.wrong]
    wanted = score(margins)
    for pad in (0, V - 1):
        result = evaluate_task(model, pairs, pad=pad)
        assert result.accuracy == wanted.accuracy
        assert result.loss.value == pytest.approx(wanted.loss.value, rel=1e-9)


def test_what_has_no_score_is_refused():
    pairs = pairs_of(3)
    with pytest.raises(UserError, match="logits are not finite: choose another checkpoint"):
        evaluate_task(Known(pairs, lambda place, side: math.nan), pairs)
    with pytest.raises(ValueError, match="at least 2 pairs, got 1"):
        evaluate_task(Known(pairs, lambda place, side: 1.0), pairs[:1])


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.96])
def test_intervals_cover_the_truth(together, share):
    """Of 600 experiments of 100 pairs, whose two prompts have the same fate in some of them."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.rand(600, 100, 2, generator=draw, dtype=torch.float64)
    same = torch.rand(600, 100, generator=draw) < together
    noise[..., 1] = torch.where(same, noise[..., 0], noise[..., 1])
    # Right with the probability `share`, and skewed as losses are.
    margins = -torch.log(noise / share)
    assert (margins > 0).double().mean() == pytest.approx(share, abs=0.01)
    true_pair = together * share + (1 - together) * share**2
    true_loss = float(torch.nn.functional.softplus(-margins).mean())
    covered = {"accuracy": 0, "both": 0, "loss": 0}
    for experiment in margins:
        result = score(experiment)
        covered["accuracy"] += result.accuracy.low <= share <= result.accuracy.high
        covered["both"] += result.pair_accuracy.low <= true_pair <= result.pair_accuracy.high
        covered["loss"] += result.loss.low <= true_loss <= result.loss.high
    for name, count in covered.items():
        assert count >= 0.92 * 600, name


def test_an_interval_is_about_pairs():
    """Prompts that are right or wrong together are worth half as many."""
    together = torch.where(torch.arange(100) < 80, 1.0, -1.0).double()[:, None].expand(-1, 2)
    generator = torch.Generator().manual_seed(0)
    apart = together.reshape(-1)[torch.randperm(200, generator=generator)].view(100, 2)
    widths = [
        score(margins).accuracy.high - score(margins).accuracy.low for margins in (together, apart)
    ]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(2), rel=0.12)
    perfect = score(torch.ones(100, 2, dtype=torch.float64)).accuracy
    assert (perfect.value, perfect.high) == (1, 1)
    # Wilson's: n / (n + z^2).
    assert perfect.low == pytest.approx(100 / (100 + 1.959964**2))


@given(margins=st.lists(st.tuples(st.floats(-50, 50), st.floats(-50, 50)), min_size=2, max_size=30))
def test_intervals_hold_their_estimate(margins):
    result = score(torch.tensor(margins, dtype=torch.float64))
    for interval in (result.accuracy, result.pair_accuracy):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert 0 <= result.loss.low <= result.loss.value <= result.loss.high
    assert result.pair_accuracy.value <= result.accuracy.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder: an untrained model and a real tokenizer, which lacks many answers."""
    folder = tmp_path_factory.mktemp("run")
    files = sorted(Path(data.__file__).parent.glob("*.py"))
    cache = tmp_path_factory.mktemp("cache")
    corpus = data.prepare(files, vocab_size=400, cache_dir=cache, progress=False)
    shutil.copy(corpus.folder / "tokenizer.json", folder)
    config = ModelConfig(vocab_size=400, n_layer=1, d_model=32, context=96)
    for step, seed in ((7, 0), (9, 1)):
        generator = torch.Generator().manual_seed(seed)
        model = Transformer(config, generator=generator, fan_multiple=2)
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        meta = {"settings": {"model": dataclasses.asdict(config)}}
        checkpoint.save(folder, step, tensors, meta)
    return folder


def test_the_program_asks_all_tasks_and_says_which_it_cannot(folder, capsys, tmp_path):
    path = tmp_path / "scores.json"
    arguments = ["--checkpoint", str(folder), "--pairs", "8", "--json", str(path)]
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    assert error == ""
    heading, *rows, last = out.splitlines()
    assert re.split("  +", heading) == [
        *("task", "accuracy", "pairs right", "loss, nats", "pairs", "answers", "solved")
    ]
    assert [row.split()[0] for row in rows] == list(TASKS)
    content = json.loads(path.read_text())
    refused = {name: row["refused"] for name, row in content["tasks"].items() if "refused" in row}
    asked = {name: row for name, row in content["tasks"].items() if "refused" not in row}
    assert "single_double_quote" in asked
    assert "enumerate_range" in refused or "with_as" in refused
    counted = [row for name, row in asked.items() if TASKS[name].shortcut is None]
    solved = sum(row["solved"] for row in counted)
    assert last.startswith(f"{solved} of the {len(counted)} asked are solved")
    assert last.endswith("(without else_elif, which the last tokens decide)")
    for row in rows:
        name = row.split()[0]
        if name in refused:
            assert row.endswith(refused[name])
            assert "cannot be asked of this tokenizer" in row
        else:
            shown = f"{asked[name]['accuracy']['value']:.3f} ["
            assert re.match(rf"{name} +{re.escape(shown)}.* 8 .*(no|solved)$", row)
    assert (content["step"], content["split"], content["seed"]) == (9, "test", 0)
    # Aligned: the second column begins at the same place in all rows.
    width = max(map(len, TASKS))
    assert all(re.match(r"  \S", row[width:]) for row in (heading, *rows))


def test_the_same_arguments_give_the_same_scores(folder, capsys, tmp_path):
    base = ["--pairs", "20", "--tasks", "single_double_quote"]
    path = tmp_path / "scores.json"

    def ask(*more, checkpoint=folder):
        arguments = ["--checkpoint", str(checkpoint), *base, *more, "--json", str(path)]
        assert main(arguments) == 0
        return capsys.readouterr().out, json.loads(path.read_text())["tasks"]

    first = ask()
    assert ask() == first
    others = [ask("--seed", "1"), ask("--split", "train"), ask("--step", "7")]
    losses = [scores["single_double_quote"]["loss"]["value"] for _, scores in (first, *others)]
    assert len(set(losses)) == 4
    assert ask(checkpoint=folder / "step-00000007") == others[2]
    # A name twice is asked once.
    base.append("single_double_quote")
    assert ask() == first


def test_the_scores_are_those_of_the_model(folder, capsys, tmp_path):
    path = tmp_path / "scores.json"
    name = "single_double_quote"
    arguments = ["--checkpoint", str(folder), "--pairs", "12", "--tasks", name]
    assert main([*arguments, "--step", "7", "--json", str(path)]) == 0
    model, tokenizer = load_run(folder, 7)
    assert not model.training
    pairs = TASKS[name].pairs(tokenizer, 12, split="test", context=96)
    wanted = dataclasses.asdict(evaluate_task(model, pairs))
    row = json.loads(path.read_text())["tasks"][name]
    assert row == {**wanted, "solved": wanted["accuracy"]["value"] >= 0.95}
    assert json.loads(path.read_text())["step"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "HERE", "--tasks", "for_wile"], "did you mean for_while"),
        (["--checkpoint", "HERE", "--pairs", "1"], "--pairs must be at least 2, got 1"),
        (
            ["--checkpoint", "HERE", "--tasks", "for_while", "--json", "absent/x.json"],
            "there is no folder absent: choose another --json",
        ),
    ],
)
def test_errors_are_one_sentence_and_exit_2(folder, refused, arguments, message):
    arguments = [str(folder) if argument == "HERE" else argument for argument in arguments]
    refused(main(arguments), message)


def test_a_context_too_short_for_a_task_is_a_row(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run")
    config = ModelConfig(vocab_size=400, n_layer=1, d_model=32, context=3)
    tensors = {f"model.{name}": t for name, t in Transformer(config).state_dict().items()}
    checkpoint.save(tmp_path / "run", 10, tensors, {"settings": {"model": vars(config)}})
    assert main(["--checkpoint", str(tmp_path / "run"), "--tasks", "single_double_quote"]) == 0
    out = capsys.readouterr().out
    assert "because no prompt is as short as 3 tokens" in out
    assert "0 of the 0 asked are solved" in out


def test_ctrl_c_exits_130(folder, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_run", interrupted)
    assert main(["--checkpoint", str(folder)]) == 130
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_module_runs(folder):
    command = [sys.executable, "-m", "sparse_transformer.evaluate", "--checkpoint", str(folder)]
    ran = subprocess.run(
        [*command, "--tasks", "single_double_quote", "--pairs", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].startswith(("0 of the 1 asked", "1 of the 1 asked"))
