"""Runs: never lost, whatever ends them; the same on two ranks; errors in one sentence."""

import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

import sparse_transformer
from sparse_transformer import load_model, tasks
from sparse_transformer.cli.train import main, parse
from sparse_transformer.data import prepare
from sparse_transformer.model import ModelConfig, Transformer
from sparse_transformer.presets import PRESETS
from sparse_transformer.tasks.task import _side
from sparse_transformer.tasks.task import collate as collate_pairs
from sparse_transformer.train import bigram, checkpoint, loop, metrics
from sparse_transformer.train.distributed import Ranks
from sparse_transformer.train.settings import Settings
from sparse_transformer.train.trainer import Diverged, Progress, Trainer

# One thread: the models are so small that two would wait for each other.
ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
STEPS = 40
# A topology change every 3 steps, annealing until step 20, a checkpoint every 7.
OPTIONS = (
    f"--steps {STEPS} --d-model 32 --n-layer 1 --context 32 --vocab-size 300 --batch-tokens 256 "
    "--density 0.25 --embedding-density 0.25 --topology.period 3 --save-every 7 "
    "--validate-every 10 --validation-tokens 512 --learning-rate 0.0128 --no-tensorboard "
    "--bigram-start zero"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = Path(sparse_transformer.__file__).parent
    for file in source.glob("*.py"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [*OPTIONS, "--data", str(corpus), "--cache-dir", str(cache)]


def command(options, out):
    return ["-m", "sparse_transformer.train", *options, "--out", str(out)]


def run_here(options, out):
    torch.set_num_threads(1)
    return main([*options, "--out", str(out)])


def lines_of(out):
    """The metrics, but for what depends on the clock."""
    lines = metrics.read(out / "metrics.jsonl")
    for line in lines:
        assert line.pop("seconds") >= 0
    return lines


@pytest.fixture(scope="module")
def reference(options, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("reference") / "run"
    forked.run(command(options, out), OMP_NUM_THREADS="1")
    return out


def test_run_leaves_what_it_promises(reference):
    lines = lines_of(reference)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 30, 40]
    for line in lines:
        assert line.keys() >= {"step", "loss", "lr", "l0", "tokens"}
        assert line["tokens"] == 256 * line["step"]
    # Dense at the start (8 times the target is more than there is), a quarter at the end.
    assert lines[0]["l0"] > 3.9 * lines[-1]["l0"]
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.5
    assert checkpoint.steps(reference) == [28, 35, 40]
    assert (reference / "loss.png").read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((reference / "config.json").read_text())
    assert Settings.from_dict(stored).model.d_model == 32
    assert not list(reference.glob(".*temporary*"))


def test_answers_of_task_prompts_are_learned(options, tmp_path, monkeypatch):
    """The same ones after a resume, others at each step, and none that evaluation asks."""
    asked = []

    def collate(pairs, pad):
        asked.append([prompt.text for pair in pairs for prompt in (pair.positive, pair.negative)])
        return collate_pairs(pairs, pad)

    monkeypatch.setattr(tasks, "collate", collate)
    more = [*options, "--context", "128", "--learning-rate", "0.05"]
    more += ["--task-pairs", "4", "--tasks", "single_double_quote"]
    assert run_here([*more, "--steps", "60", "--save-every", "25"], tmp_path / "run") == 0
    losses = [line["answer_loss"] for line in lines_of(tmp_path / "run")]
    # From any of 300 tokens to one of two; quotes take longer.
    assert losses[0] > 4
    assert sum(losses[-10:]) / 10 < 1
    assert [len(prompts) for prompts in asked] == [8] * 60
    assert len({text for prompts in asked for text in prompts}) == 480
    assert {_side(text) for prompts in asked for text in prompts} == {"train"}
    before = asked[50:]
    asked.clear()
    again = [*more, "--steps", "60", "--resume", "--from-step", "50"]
    assert run_here(again, tmp_path / "run") == 0
    assert asked == before
    assert [line["answer_loss"] for line in lines_of(tmp_path / "run")] == losses


def test_task_prompts_that_cannot_be_asked_are_a_sentence(options, tmp_path, capsys):
    assert run_here([*options, "--task-pairs", "20"], tmp_path / "run") == 2
    assert "cannot be asked of this tokenizer and context" in capsys.readouterr().err
    assert run_here([*options, "--tasks", "with_a"], tmp_path / "run") == 2
    assert "did you mean with_as" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
def test_killed_run_goes_on_bit_for_bit(options, reference, tmp_path, number):
    """SIGKILL at random moments (one before the first checkpoint), Ctrl-C once; then to the end.

    Four interruptions in each of eight runs.
    """
    seed = random.randrange(2**32)
    print("moments drawn from seed", seed)
    draw = random.Random(seed)
    out = tmp_path / "run"
    moments = [
        (signal.SIGKILL, draw.randrange(0, 7)),
        (signal.SIGKILL, draw.randrange(8, 25)),
        (signal.SIGINT, draw.randrange(8, 35)),
        (signal.SIGKILL, draw.randrange(8, 40)),
    ]
    for sent, after in moments:
        path = out / "metrics.jsonl"
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = forked.Python([*command(options, out), "--resume"], OMP_NUM_THREADS="1")
        while process.poll() is None:
            changed = path.exists() and path.stat().st_mtime_ns > before
            if changed and path.read_bytes().count(b"\n") > after:
                break
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        process.send_signal(sent)
        status = process.wait(60)
        # It may have come to its end before.
        assert status in (0, 130 if sent == signal.SIGINT else -signal.SIGKILL)
        if status == 130:
            assert checkpoint.steps(out)[-1] == lines_of(out)[-1]["step"]
    forked.run([*command(options, out), "--resume"], OMP_NUM_THREADS="1")
    assert lines_of(out) == lines_of(reference)
    expected, actual = checkpoint.load(reference), checkpoint.load(out)
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual.tensors[name], tensor, rtol=0, atol=0, msg=name)


def test_resume_of_a_finished_run_changes_nothing(reference, tmp_path, capsys):
    out = shutil.copytree(reference, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    assert run_here(["--resume"], out) == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "from step 40" in capsys.readouterr().err


@pytest.mark.parametrize("linear", ["sparse", "masked_dense"])
def test_a_finished_run_can_be_extended(options, tmp_path, capsys, linear):
    """To more than twice its steps, of which annealing would be a half; and again."""
    out = tmp_path / "run"
    short = ["--steps", "12", "--linear", linear, "--topology.anneal-share", "0.5"]
    assert run_here([*options, *short], out) == 0
    final = lines_of(out)[-1]["l0"]
    for steps in (40, 90):
        assert run_here(["--resume", "--steps", str(steps)], out) == 0
        lines = lines_of(out)
        assert len(lines) == steps
        # It has annealed already.
        assert {line["l0"] for line in lines[11:]} == {final}
        # The rate follows the new length.
        assert lines[-2]["lr"] > lines[-1]["lr"] > 0
    # From a step in the middle, at which a new run of this length would anneal.
    assert run_here(["--from-step", "84"], out) == 0
    assert lines_of(out) == lines


def test_steps_cannot_be_changed_while_annealing(reference, tmp_path, capsys):
    out = shutil.copytree(reference, tmp_path / "run")
    for step, name in ((28, "step-00000028"), (35, "step-00000035"), (40, "step-00000040")):
        record = json.loads((out / name / "meta.json").read_text())
        # As if the fan-in fell until step 36.
        record["content"]["anneal_steps"] = 70
        (out / name / "meta.json").write_text(json.dumps(record))
        status = run_here(["--from-step", str(step), "--steps", "41"], out)
        assert status == (2 if step < 36 else 0)
        error = capsys.readouterr().err
        assert ("is still annealing, as a run of 40 steps does until step 36" in error) == (
            step < 36
        )


@pytest.mark.slow
def test_checkpoints_of_earlier_versions_go_on(reference, tmp_path):
    """They know nothing of samples and of runs that are extended."""
    out = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(out / "step-00000040")
    config = json.loads((out / "config.json").read_text())
    del config["train"]["sample_tokens"]
    (out / "config.json").write_text(json.dumps(config))
    record = json.loads((out / "step-00000035" / "meta.json").read_text())
    del record["content"]["anneal_steps"], record["content"]["settings"]["train"]["sample_tokens"]
    (out / "step-00000035" / "meta.json").write_text(json.dumps(record))
    # In a process like the reference's, for the same bits.
    forked.run(command(["--resume"], out), OMP_NUM_THREADS="1")
    assert lines_of(out) == lines_of(reference)


@pytest.mark.parametrize("given", [["--data", "nowhere"], ["--batch-tokens", "100"]])
def test_a_start_that_failed_leaves_nothing(options, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert run_here([*options, *given], Path("new/deep/run")) == 2
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    assert run_here([*options, *given], Path("mine")) == 2
    assert os.listdir("mine") == []


def test_a_missing_tensorboard_is_noticed_at_the_start(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "find_spec", lambda name: None)
    given = [option for option in options if option != "--no-tensorboard"]
    assert run_here(given, tmp_path / "run") == 2
    assert "give --no-tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_others_of_the_group_can_read_what_is_written(options, corpus, tmp_path):
    before = os.umask(0o027)
    try:
        given = ["--steps", "1", "--data", str(corpus), "--cache-dir", str(tmp_path / "cache")]
        assert run_here([*options, *given], tmp_path / "run") == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "cache").rglob("*"), (tmp_path / "run").rglob("*"):
        for found in path:
            assert found.stat().st_mode & 0o777 == (0o750 if found.is_dir() else 0o640), found


def test_little_validation_text_is_noticed_at_the_start(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        text = "".join(f"x_{number}_{line} = ('a', [{line}])\n" for line in range(60))
        (tmp_path / "corpus" / f"{number}.py").write_text(text)
    corpus = prepare(tmp_path / "corpus", vocab_size=300, cache_dir=tmp_path / "cache")
    context = len(corpus.validation)
    assert context < len(corpus.train)
    given = [*OPTIONS, "--context", str(context), "--batch-tokens", str(context)]
    given += ["--data", str(tmp_path / "corpus"), "--cache-dir", str(tmp_path / "cache")]
    assert run_here(given, tmp_path / "run") == 2
    assert f"the corpus has {context} validation tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_samples_change_nothing(options, reference, tmp_path, capsys):
    assert "sample: " not in capsys.readouterr().err
    assert run_here([*options, "--sample-tokens", "0"], tmp_path / "silent") == 0
    assert "sample: " not in capsys.readouterr().err
    assert run_here(options, tmp_path / "telling") == 0
    assert capsys.readouterr().err.count("sample: ") == 4
    assert lines_of(tmp_path / "silent") == lines_of(tmp_path / "telling")


def test_what_is_trained_and_skipped_is_counted(options, corpus, tmp_path, capsys):
    copied = shutil.copytree(corpus, tmp_path / "corpus")
    (copied / "latin.py").write_bytes("x = 'caf\xe9'\n".encode("latin-1"))
    given = ["--steps", "1", "--data", str(copied)]
    assert run_here([*options, *given], tmp_path / "run") == 0
    error = capsys.readouterr().err
    count = len(list(corpus.glob("*.py")))
    assert f"{count} files (1 that are not UTF-8 text skipped), " in error
    bigram_and_vectors = 300 * 300 + 32 * 3 + 3 * 32 + 32 + 128 + 32 + 2
    assert f"and {bigram_and_vectors:,} other parameters (bigram table" in error


def test_a_busy_machine_is_noted_once(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 1.0, 1.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert run_here([*options, "--steps", "20"], tmp_path / "run") == 0
    assert capsys.readouterr().err.count("the machine is busy (load 99.0 on") == 1


@pytest.mark.parametrize("delay", [0.5, 2.0])
@pytest.mark.parametrize("program", ["train", "generate", "circuits"])
@pytest.mark.slow
def test_an_early_interrupt_is_quiet(program, delay, tmp_path):
    """Before or while torch is imported, and while there is little to do yet."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"sparse_transformer.{program}", "--out", str(tmp_path / "run")],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    # A program that lacks an option may have said so before.
    # The signal itself ends an interpreter that is about to end.
    assert process.returncode in (130, 2, -signal.SIGINT)
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_older_checkpoint_on_request(reference, tmp_path, capsys):
    """The newest one is truncated: an error that names the older one, which then gives the same."""
    out = shutil.copytree(reference, tmp_path / "run")
    tensors = out / "step-00000040" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert run_here(["--resume"], out) == 2
    error = capsys.readouterr().err
    assert "--from-step 35" in error
    assert error.count("\n") == 1
    # In a process like the reference's, for the same bits.
    forked.run(command(["--from-step", "35"], out), OMP_NUM_THREADS="1")
    assert lines_of(out) == lines_of(reference)
    assert list(out.glob("set-aside-*/step-00000040"))


def test_model_of_a_checkpoint(reference):
    model = load_model(reference)
    # Below its final fans, in the middle of annealing, as well.
    assert isinstance(load_model(reference, step=28), Transformer)
    tokens = torch.randint(300, (2, 32))
    assert torch.isfinite(model(tokens)).all()
    for name, layer in model.sparse_layers().items():
        assert layer.weight.shape[1] == model.target_fan(name)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (["--d-model", "64"], "another model, d_model 32 and not d_model 64"),
        (["--linear", "dense"], "another model, linear sparse and not linear dense"),
        (["--topology.period", "5"], "another topology, period 3 and not period 5"),
        (["--preset", "d256"], "began with --preset tiny, not d256"),
        (["--from-step", "3"], "no checkpoint of step 3"),
        (["--data", str(Path(loop.__file__))], "trained on other files"),
    ],
)
def test_resume_with_other_settings_is_refused(reference, tmp_path, capsys, changed, match):
    out = shutil.copytree(reference, tmp_path / "run")
    assert run_here(["--resume", *changed], out) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert checkpoint.steps(out) == [28, 35, 40]
    assert (out / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "--out is missing"),
        (["--preset", "huge", "--out", "x"], "choose one of tiny, circuits, d256"),
        (["--batch-tokens", "100", "--out", "x"], "choose a multiple of 128"),
        (["--steps", "0", "--out", "x"], "steps must be at least 1"),
        (["--d-model", "17", "--out", "x"], "d_head must be a divisor of d_model"),
        (["--dtype", "float16", "--device", "cpu", "--out", "x"], "float16 needs a GPU"),
        (["--data", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["--out", "file"], "file is a file"),
        (["--out", "full"], "full is not empty: continue its run with --resume"),
        (["--out", "x", "--from-step", "3"], "there is no checkpoint in x"),
    ],
)
def test_bad_options_end_in_a_sentence(tmp_path, monkeypatch, capsys, corpus, given, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    if "--data" not in given:
        given = [*given, "--data", str(corpus), "--vocab-size", "300"]
    assert main([*given, "--cache-dir", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert match in error[-1]
    assert [line for line in error if "beginning a new run" not in line] == error[-1:]


def test_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--widht", "3"])
    assert caught.value.code == 2
    assert "--widht" in capsys.readouterr().err


def test_only_one_run_in_a_folder(options, tmp_path, capsys):
    with loop._claim(tmp_path / "run"):
        assert run_here([*options, "--resume"], tmp_path / "run") == 2
    assert "another process is training in" in capsys.readouterr().err


def test_loss_that_is_nan_stops(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    original, calls = Transformer.loss, []

    def loss(self, tokens, targets):
        calls.append(1)
        return original(self, tokens, targets) * (math.nan if len(calls) == 18 else 1)

    monkeypatch.setattr(Transformer, "loss", loss)
    assert run_here(options, out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the loss of step" in error
    assert f"the last good checkpoint is {out}/step-00000014" in error
    assert "--learning-rate" in error
    assert all(math.isfinite(line["loss"]) for line in lines_of(out))
    assert run_here(["--resume", "--learning-rate", "0.001"], out) == 0
    assert len(lines_of(out)) == STEPS


def test_weights_that_are_nan_are_not_saved(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    original = Trainer.advance

    def advance(self):
        line = original(self)
        if self.step == 7:
            with torch.no_grad():
                self.model.norm.weight[0] = math.inf
        return line

    monkeypatch.setattr(Trainer, "advance", advance)
    assert run_here(options, out) == 2
    assert "norm.weight is no longer finite after step 7, and there is no checkpoint yet" in (
        capsys.readouterr().err
    )
    assert checkpoint.steps(out) == []


def test_diverging_loss_stops(options, tmp_path, capsys):
    status = run_here([*options, "--learning-rate", "30", "--max-rise", "1"], tmp_path / "run")
    assert status == 2
    assert "the loss has risen from" in capsys.readouterr().err


def test_full_disk_stops_and_harms_nothing(options, tmp_path, capsys):
    """A limit on the size of a file stands for the disk that is full."""
    out = tmp_path / "run"
    assert run_here([*options, "--steps", "8"], out) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert run_here(["--resume", "--steps", "8", "--from-step", "7"], out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 8 cannot be written" in error
    assert "step 7 is unharmed" in error
    assert run_here(["--resume"], out) == 0
    assert checkpoint.steps(out) == [7, 8]


@pytest.mark.parametrize("linear", ["masked_dense", "dense"])
def test_other_linears_train_too(options, reference, tmp_path, linear):
    assert run_here([*options, "--linear", linear], tmp_path / "run") == 0
    lines, sparse = lines_of(tmp_path / "run"), lines_of(reference)
    assert lines[-1]["val_loss"] < lines[0]["loss"] - 0.5
    assert lines[0]["l0"] == pytest.approx(sparse[0]["l0"], rel=0.05)
    if linear == "masked_dense":
        assert lines[-1]["l0"] == pytest.approx(sparse[-1]["l0"], rel=0.05)
    else:
        assert lines[-1]["l0"] == lines[0]["l0"]


def test_a_table_of_counts_starts_where_one_of_zeros_has_to_come(options, reference, tmp_path):
    counts = [*options, "--bigram-start", "counts", "--steps", "10"]
    assert run_here(counts, tmp_path / "run") == 0
    assert lines_of(tmp_path / "run")[0]["loss"] < lines_of(reference)[9]["val_loss"] - 0.5


@pytest.mark.parametrize("chunk", [5, 1 << 24])
def test_the_bigram_table_has_the_frequencies_of_the_text(monkeypatch, chunk):
    monkeypatch.setattr(bigram, "_CHUNK", chunk)
    tokens = np.random.default_rng(0).integers(0, 4, 97).astype(np.uint16)
    table = torch.empty(5, 5)
    bigram.set_to_counts_(table, tokens)
    pairs = list(itertools.pairwise(tokens.tolist()))
    for first, second in itertools.product(range(5), repeat=2):
        share = (1 + sum(b == second for _, b in pairs)) / (5 + len(pairs))
        count, total = pairs.count((first, second)), sum(a == first for a, _ in pairs)
        wanted = math.log((count + 100 * share) / (total + 100))
        assert table[first, second] == pytest.approx(wanted, abs=1e-5)


def losses_of(out):
    return torch.tensor(
        [[line["loss"], line.get("val_loss", 0.0)] for line in lines_of(out)], dtype=torch.float64
    )


def assert_same_losses(out, wanted):
    """Alike to rounding through the first changes of connections, and near each other to the end.

    Sums in another order round otherwise, and sooner or later an AbsTopK or a choice of connections
    between two that are nearly equal falls the other way: from then on two runs drift apart.
    """
    got, wanted = losses_of(out), losses_of(wanted)
    torch.testing.assert_close(got[:14], wanted[:14], rtol=1e-5, atol=0)
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=0)


def test_accumulated_parts_give_the_same_losses(options, reference, tmp_path):
    assert run_here([*options, "--accumulate", "4"], tmp_path / "run") == 0
    assert_same_losses(tmp_path / "run", reference)


@pytest.mark.slow
def test_bfloat16_trains_to_about_the_same(options, reference, tmp_path):
    assert run_here([*options, "--dtype", "bfloat16"], tmp_path / "run") == 0
    torch.testing.assert_close(losses_of(tmp_path / "run"), losses_of(reference), rtol=0.02, atol=0)


def test_an_overflow_is_computed_again_with_half_the_scale(options, reference, tmp_path):
    """As with float16 on a GPU: in float32, with gradients that are infinite at a large scale."""
    arguments = [*options, "--out", str(tmp_path / "x")]
    settings, _, _ = parse(arguments)
    corpus = prepare(
        settings.train.data, vocab_size=300, cache_dir=settings.train.cache_dir, progress=False
    )
    here = Ranks(0, 1, torch.device("cpu"))
    trainer = Trainer(settings, corpus, here)
    scaler = trainer._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    trainer.model.norm.weight.register_hook(
        lambda gradient: gradient * (math.inf if scaler.get_scale() > 2.0**17 else 1)
    )
    losses = [trainer.advance()["loss"] for _ in range(3)]
    wanted = [line["loss"] for line in lines_of(reference)[:3]]
    assert losses == pytest.approx(wanted, rel=1e-5)
    tensors, meta = trainer.state()
    assert meta["loss_scale"] == {"scale": 2.0**17, "good": 3}
    # It goes on from there, and gives up where no scale helps.
    path = checkpoint.save(
        tmp_path / "run", 3, tensors, {**meta, "metrics_position": 0, "seconds": 0}
    )
    again = Trainer(settings, corpus, here, checkpoint.load(path))
    again._scaler = torch.amp.GradScaler("cpu")
    again._restore(point := checkpoint.load(path), Progress.of(point))
    assert again.advance()["loss"] == pytest.approx(trainer.advance()["loss"], rel=1e-5)
    assert again._scaler.get_scale() == meta["loss_scale"]["scale"]
    again.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(Diverged, match="the gradients of step 5 are not finite"):
        again.advance()


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(options, reference, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = tmp_path / "run"
    subprocess.run([*torchrun, *command(options, out)], env=ENVIRONMENT, check=True)
    assert_same_losses(out, reference)
    assert [line["l0"] for line in lines_of(out)] == [line["l0"] for line in lines_of(reference)]


def start_ranks(arguments):
    """Two ranks without torchrun, which would end the second when the first dies."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        forked.Python(
            arguments, OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), **shared
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_rank_that_dies_ends_the_others(options, tmp_path, victim):
    out = tmp_path / "run"
    ranks = start_ranks([*command(options, out), "--steps", "4000", "--validate-every", "4000"])
    while not (out / "step-00000007").exists():
        assert [process.poll() for process in ranks] == [None, None]
        time.sleep(0.01)
    ranks[victim].kill()
    _, error = ranks[1 - victim].communicate(timeout=60)
    ranks[victim].communicate()
    assert ranks[1 - victim].returncode == 2, error
    sentence = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(sentence) == 1
    assert "lost the other ranks" in sentence[0]
    assert "--resume" in sentence[0]
    assert "Traceback" not in error
    assert checkpoint.load(out).step % 7 == 0


DISAGREE = """
import os, sys
from sparse_transformer.train.distributed import leave, ranks
from sparse_transformer.errors import UserError
with ranks("cpu", 30) as here:
    assert here.agree("a" * 64, here.rank * 15) == 15
    try:
        here.agree("a" * 63 + "ab"[here.rank], 0)
        here.agree("ab"[here.rank] + "a" * 63, 0)
    except UserError as error:
        print(error, file=sys.stderr)
leave(0)
"""


@pytest.mark.slow
def test_ranks_whose_topologies_differ_stop():
    for process in start_ranks(["-c", DISAGREE]):
        _, error = process.communicate(timeout=60)
        assert error.startswith("the connections of rank 1 are not those of rank 0")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    settings = PRESETS[name]
    assert settings.preset == name
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    unit = settings.model.context * settings.train.accumulate
    assert settings.train.batch_tokens % unit == 0


def test_largest_preset_has_475_million_parameters():
    """In all: what a dense model of its widths has."""
    config = PRESETS["475m"].model
    dense = ModelConfig(**{**vars(config), "linear": "dense"})
    model = Transformer(dense, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == pytest.approx(475e6, rel=0.005)


def test_tensorboard_gets_the_same(options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert run_here([*options, "--tensorboard", "--steps", "3"], out) == 0
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines_of(out)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
