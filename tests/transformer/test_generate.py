"""Generation: the cache changes nothing, a seed gives a text, errors are one sentence."""

import dataclasses
import importlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import make

import sparse_transformer
from sparse_transformer import ModelConfig, Transformer, UserError, data, generation, load_model
from sparse_transformer.cli.generate import GenerateConfig, main, run
from sparse_transformer.generation import generate, stream, stream_text
from sparse_transformer.train import checkpoint


def slowly(model, prompt, tokens):
    """The likeliest tokens by whole forwards, over the last half context once it is full."""
    context = model.config.context
    window, found = prompt, []
    for _ in range(tokens):
        if window.shape[1] > context:
            window = window[:, -(context // 2) :]
        found.append(model(window)[:, -1].argmax(-1))
        window = torch.cat([window, found[-1][:, None]], 1)
    return torch.stack(found, 1)


@pytest.mark.parametrize("length", [1, 5, 80])
@torch.no_grad()
def test_cached_generation_is_that_of_whole_forwards(length):
    model = make()
    prompt = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(0))
    got = torch.tensor(list(stream(model, prompt.tolist(), 130, temperature=0))).T
    assert torch.equal(got, slowly(model, prompt, 130))


def test_a_seed_gives_a_text_and_another_another():
    model = make(dtype=torch.float32)
    prompts = [[0] * 4] * 3

    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        return torch.tensor(list(stream(model, prompts, 30, generator=generator, **options))).T

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0)[0], draw(0)[1])


def test_top_k_and_temperature_limit_the_choice():
    model = make(dtype=torch.float32)
    prompt = list(range(6))
    greedy = list(stream(model, [prompt], 20, temperature=0))
    for options in ({"top_k": 1}, {"temperature": 1e-6}, {"temperature": 1e-45}):
        assert list(stream(model, [prompt], 20, **options)) == greedy
    with torch.no_grad():
        allowed = set(model(torch.tensor([prompt]))[0, -1].topk(3).indices.tolist())
    many = [prompt] * 300
    assert set(next(stream(model, many, 1, top_k=3))) == allowed
    assert len(set(next(stream(model, many, 1, top_k=50)))) > 3


@torch.no_grad()
def test_prompts_of_different_lengths_are_continued_as_each_alone():
    model = make()
    lengths = (1, 7, 80, 33)
    prompts = [torch.randint(50, (length,)).tolist() for length in lengths]
    steps = list(stream(model, prompts, 60, temperature=0))
    for row, prompt in enumerate(prompts):
        (alone,) = slowly(model, torch.tensor([prompt]), 60).tolist()
        assert [step[row] for step in steps if step[row] is not None] == alone


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (81, {}, "the prompt has 81 tokens, and the model reads 1 to 80: shorten it"),
        (0, {}, "give at least one"),
        (3, {"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        (3, {"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        (3, {"top_k": 0}, "top-k must be at least 1, got 0"),
        (3, {"tokens": -1}, "nothing can be generated"),
        (3, {"prompts": []}, "nothing can be generated"),
    ],
)
def test_refusals(length, options, message):
    options = {"tokens": 4, "prompts": [[0] * length], **options}
    with pytest.raises(UserError, match=message):
        list(stream(make(), **options))


def test_logits_that_are_not_finite_are_refused():
    model = make(dtype=torch.float32)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    for temperature in (0.0, 0.8):
        with pytest.raises(UserError, match="not finite: choose another checkpoint"):
            next(stream(model, [[1, 2]], 3, temperature=temperature))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder: an untrained model and a real tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    source = tmp_path_factory.mktemp("source")
    for file in Path(data.__file__).parent.glob("*.py"):
        shutil.copy(file, source)
    cache = tmp_path_factory.mktemp("cache")
    corpus = data.prepare(source, vocab_size=300, cache_dir=cache)
    shutil.copy(corpus.folder / "tokenizer.json", folder)
    config = ModelConfig(vocab_size=300, n_layer=1, d_model=32, context=24)
    model = Transformer(config, generator=torch.Generator().manual_seed(0), fan_multiple=2)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    meta = {"settings": {"model": dataclasses.asdict(config)}}
    checkpoint.save(folder, 7, tensors, meta)
    return folder


def test_prompts_are_continued_from_python(folder):
    model = load_model(folder)
    texts = ["def f(", "", "x = 1\n" * 40, "import os, sys, numpy as np\n"]
    together = generate(model, texts, 30, temperature=0)
    assert together == [generate(model, text, 30, temperature=0)[0] for text in texts]
    assert all(together)
    with pytest.raises(UserError, match="is not UTF-8"):
        generate(model, "a\udce9b")
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        generate(model, "x")


def test_the_program_streams_text(folder, capsys):
    arguments = ["--checkpoint", str(folder), "--prompt", "def f(", "--tokens", "40"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f(")
    assert len(first) > len("def f(") + 10
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out != first
    # A checkpoint's own folder, and several texts; no prompt.
    assert (
        main(["--checkpoint", str(folder / "step-00000007"), "--batch", "3", "--top-k", "9"]) == 0
    )
    out = capsys.readouterr().out
    assert "\n=== 2 of 3\n" in out
    assert "\n=== 3 of 3\n" in out


def test_text_comes_out_while_it_grows(folder):
    class Watched(io.StringIO):
        flushes = 0

        def flush(self):
            self.flushes += 1

    out = Watched()
    run(GenerateConfig(folder, prompt="x", tokens=20, temperature=0), out)
    assert out.flushes >= 5


def test_characters_wait_for_all_their_bytes(folder, monkeypatch):
    model = load_model(folder)
    ids = model.tokenizer.encode("a€bé").ids
    assert len(ids) > 4

    def pieces(chosen):
        monkeypatch.setattr(generation, "stream", lambda *_, **options: ([id] for id in chosen))
        return [new for (new,) in stream_text(model, [[1]], 9, temperature=0.0, top_k=None, seed=0)]

    whole = pieces(ids)
    assert "".join(whole) == "a€bé"
    assert "" in whole[:-1]
    assert pieces(ids[:2]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "absent"], "absent does not exist"),
        (["--checkpoint", "HERE", "--prompt", "caf\udce9"], "is not UTF-8"),
        (["--checkpoint", "HERE", "--seed", str(2**64)], "--seed must be at most"),
        (["--checkpoint", "HERE", "--seed", "-1"], "--seed must be at least 0"),
        (["--checkpoint", "HERE", "--step", "3"], "there is no checkpoint of step 3"),
        (["--checkpoint", "HERE", "--batch", "0"], "--batch must be at least 1"),
        (["--checkpoint", "HERE", "--device", "abacus"], "there is no device 'abacus'"),
        (["--checkpoint", "HERE", "--temperature", "-1"], "the temperature must be 0 or more"),
    ],
)
def test_errors_are_one_sentence_and_exit_2(folder, refused, arguments, message):
    arguments = [str(folder) if argument == "HERE" else argument for argument in arguments]
    assert refused(main(arguments), message) == ""


def test_a_prompt_that_is_too_long_is_cropped_with_a_note(folder, capsys):
    prompt = "x = 1\n" * 30
    assert main(["--checkpoint", str(folder), "--prompt", prompt, "--tokens", "3"]) == 0
    out, error = capsys.readouterr()
    assert out.startswith(prompt)
    assert re.fullmatch(r"of the prompt's \d+ tokens the last 24 are read\n", error)


def test_a_tokenizer_of_another_size_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "run")
    config = ModelConfig(vocab_size=299, n_layer=1, d_model=32, context=24)
    tensors = {f"model.{name}": t for name, t in Transformer(config).state_dict().items()}
    checkpoint.save(tmp_path / "run", 8, tensors, {"settings": {"model": vars(config)}})
    assert main(["--checkpoint", str(tmp_path / "run")]) == 2
    assert "the tokenizer has 300 tokens and the model 299" in capsys.readouterr().err
    (tmp_path / "run" / "tokenizer.json").unlink()
    assert main(["--checkpoint", str(tmp_path / "run")]) == 2
    assert "copy tokenizer.json there" in capsys.readouterr().err


def test_the_module_runs_and_reads_a_prompt_from_standard_input(folder):
    command = [sys.executable, "-m", "sparse_transformer.generate", "--checkpoint", str(folder)]
    ran = subprocess.run(
        [*command, "--prompt", "-", "--tokens", "3"],
        input="import os",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("import os")


def test_the_function_stays_callable_when_the_module_is_imported():
    module = importlib.import_module("sparse_transformer.generate")
    assert sparse_transformer.generate is module
    assert module.__call__ is generate
    assert {"generate", "load_model", "record", "intervene"} <= set(dir(sparse_transformer))
