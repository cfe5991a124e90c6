"""The corpus: what is read, what is refused, the split, the cache and the windows."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_transformer import data
from sparse_transformer import tokenizer as tokenizing
from sparse_transformer.errors import UserError

VOCAB = 300


def source_text(seed: int, lines: int = 200) -> str:
    """Python-like text without the end-of-text token."""
    rng = np.random.default_rng(seed)
    names = [f"name_{i}" for i in range(50)]
    return "".join(
        f"def {rng.choice(names)}(self, x=\"{rng.choice(names)}\"):\n    return ('é', [x[{i}]])\n"
        for i in range(lines)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    for i in range(30):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(source_text(i, 20 + i))
    for left_out in ("site-packages/big.py", ".git/hook.py", "package0/notes.txt"):
        path = root / left_out
        path.parent.mkdir(exist_ok=True)
        path.write_text("left_out\n" * 1000)
    (root / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    (root / "binary.py").write_bytes(b"a\0b\n")
    (root / "empty.py").write_text("")
    (root / "windows.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\r\n")
    return root


@pytest.fixture(scope="module")
def corpus(folder, tmp_path_factory):
    return data.prepare(folder, vocab_size=VOCAB, cache_dir=tmp_path_factory.mktemp("cache"))


def pieces(corpus, tokens):
    """The files of one side of the split, as text."""
    ends = np.flatnonzero(np.asarray(tokens) == corpus.end_of_text)
    starts = [0, *(ends[:-1] + 1)]
    return [
        corpus.tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)
    ]


def test_corpus_holds_every_text_once(folder, corpus):
    expected = {path.read_text() for path in folder.glob("package*/*.py")} | {"x = 1\ny = 2\n"}
    train, validation = pieces(corpus, corpus.train), pieces(corpus, corpus.validation)
    assert sorted(train + validation) == sorted(expected)
    assert validation
    assert len(train) > len(validation)
    assert (corpus.files, corpus.skipped) == (31, 2)
    assert corpus.train[-1] == corpus.validation[-1] == corpus.end_of_text == VOCAB - 1


def test_split_follows_the_path_alone(folder, corpus, tmp_path):
    """The same relative paths with other contents, in another place: the same files held out."""
    for path in folder.glob("package*/*.py"):
        copy = tmp_path / "copy" / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f"# {path.name}\n{source_text(1000)}")
    (tmp_path / "copy" / "windows.py").write_text("# windows.py\n")
    other = data.prepare(tmp_path / "copy", vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    names = {path.read_text(): path.name for path in folder.glob("package*/*.py")}
    before = {names.get(text, "windows.py") for text in pieces(corpus, corpus.validation)}
    after = {text.split("\n")[0][2:] for text in pieces(other, other.validation)}
    assert before == after


@pytest.mark.slow
def test_same_files_give_the_same_bytes(folder, corpus, tmp_path):
    """Another process, another hash seed, other threads."""
    code = "import sys; from sparse_transformer import data; data.prepare(sys.argv[1], "
    code += f"vocab_size={VOCAB}, cache_dir=sys.argv[2], progress=False)"
    environment = {
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    # Two at once, which must not disturb one another.
    processes = [
        subprocess.Popen([sys.executable, "-c", code, folder, tmp_path], env=environment)
        for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [corpus.key]
    for path in corpus.folder.iterdir():
        assert (tmp_path / corpus.key / path.name).read_bytes() == path.read_bytes()


def test_a_changed_file_is_noticed(folder, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(source_text(1))
    first = data.prepare([file, folder], vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    file.write_text(source_text(1).replace("name_1", "name_2"))
    second = data.prepare([file, folder], vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    assert first.key != second.key


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "manifest.json"])
def test_a_damaged_cache_is_built_again(folder, tmp_path, name):
    def prepare():
        return data.prepare(folder, vocab_size=VOCAB, cache_dir=tmp_path)

    path = prepare().folder / name
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], bytes(len(content)), b"[" * len(content)):
        path.write_bytes(damaged)
        prepare()
        assert path.read_bytes() == content


def test_task_tokens_are_single(corpus):
    for token in tokenizing.TASK_TOKENS:
        assert len(corpus.tokenizer.encode(token).ids) == 1, token
    ids = corpus.tokenizer.get_vocab().values()
    assert sorted(ids) == list(range(VOCAB))


@pytest.mark.parametrize("learned", range(7))
def test_task_tokens_are_single_where_some_are_the_rarest_that_were_learned(tmp_path, learned):
    text = "a big " * 40 + "f(\"a\") g('b') " * 20
    size = tokenizing.MIN_VOCAB_SIZE + learned
    tokenizer = data.prepare(text + "\n", vocab_size=size, cache_dir=tmp_path).tokenizer
    assert all(len(tokenizer.encode(token).ids) == 1 for token in tokenizing.TASK_TOKENS)
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_end_of_text_inside_a_file_is_ordinary_text(tmp_path):
    text = source_text(3, 60) + f'EOT = "{tokenizing.END_OF_TEXT}"\n' * 40
    corpus = data.prepare(text, vocab_size=VOCAB, cache_dir=tmp_path)
    assert "".join(pieces(corpus, corpus.train)).count(tokenizing.END_OF_TEXT) >= 30
    assert (np.asarray(corpus.train) == corpus.end_of_text).sum() + (
        np.asarray(corpus.validation) == corpus.end_of_text
    ).sum() == corpus.files


def test_text_and_single_file_agree(tmp_path):
    text = source_text(5)
    (tmp_path / "text").write_text(text)
    a = data.prepare(text, vocab_size=VOCAB, cache_dir=tmp_path)
    b = data.prepare(tmp_path / "text", vocab_size=VOCAB, cache_dir=tmp_path)
    assert a.key == b.key
    assert len(a.validation) > 0


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "only empty files"),
        (b"\n\n \n", "empty"),
        (b"\x89PNG\0\0\0", "1 files that are not UTF-8"),
        (b"x = 1\n", "too small for a vocabulary of 300"),
    ],
)
def test_unusable_corpus_is_refused(tmp_path, content, match):
    path = tmp_path / "corpus.py"
    path.write_bytes(content)
    for source in (path, [path], str(tmp_path)):
        with pytest.raises(UserError, match=match):
            data.prepare(source, vocab_size=VOCAB, cache_dir=tmp_path / "cache")


def test_a_single_long_line_is_a_corpus(tmp_path):
    text = source_text(4).replace("\n", "; ")
    (tmp_path / "line.py").write_text(text)
    corpus = data.prepare(tmp_path / "line.py", vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    found = pieces(corpus, corpus.train) + pieces(corpus, corpus.validation)
    assert len(found) == corpus.files == 64
    assert sum(map(len, found)) == len(text)


@pytest.mark.parametrize("character", ["x", "7", "=", "_", " ", "\t", "é"])
def test_a_very_long_word_is_trained_on_in_pieces(tmp_path, character):
    """Byte-level BPE takes time that grows with the square of a word."""
    word = character * 100_000
    corpus = data.prepare(source_text(4) + word + "\n", vocab_size=VOCAB, cache_dir=tmp_path)
    found = "".join(pieces(corpus, corpus.train) + pieces(corpus, corpus.validation))
    assert found.count(character) >= len(word)
    assert "".join(tokenizing.pieces_of(word)) == word
    assert max(map(len, tokenizing.pieces_of(f"x = '{word}'"))) <= 1100
    assert corpus.tokenizer.decode(tokenizing.encode(corpus.tokenizer, word)) == word


def test_ordinary_text_is_one_piece():
    text = source_text(4)
    assert tokenizing.pieces_of(text) == [text]
    assert tokenizing.pieces_of("") in ([], [""])


def test_names_that_are_not_utf8_are_read(tmp_path):
    for number in range(3):
        name = f"caf{number}".encode() + b"\xe9.py"
        with open(os.path.join(os.fsencode(tmp_path), name), "w") as file:
            file.write(source_text(number))
    corpus = data.prepare(tmp_path, vocab_size=VOCAB, cache_dir=tmp_path / "cache")
    assert corpus.files == 3
    with pytest.raises(UserError, match="not UTF-8"):
        data.prepare(source_text(1) + "\ud800", vocab_size=VOCAB, cache_dir=tmp_path / "cache")


def test_the_same_file_counts_once(folder, tmp_path):
    file = folder / "package0" / "module0.py"
    link = tmp_path / "link.py"
    link.symlink_to(file)
    cache = tmp_path / "cache"
    once = data.prepare([folder], vocab_size=VOCAB, cache_dir=cache)
    for again in (file, folder, link, folder / "package0" / ".." / "package0"):
        twice = data.prepare([folder, again], vocab_size=VOCAB, cache_dir=cache)
        assert (twice.files, twice.key) == (once.files, once.key)


def test_a_full_disk_is_a_sentence(folder, tmp_path):
    """A limit on the size of a file stands for the disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"token cache .* cannot be written"):
            data.prepare(folder, vocab_size=VOCAB, cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_can_be_read(folder, tmp_path):
    corpus = data.prepare(folder, vocab_size=VOCAB, cache_dir=tmp_path)
    (tmp_path / f"{corpus.key}.lock").unlink()
    again = data.prepare(folder, vocab_size=VOCAB, cache_dir=tmp_path)
    assert again.key == corpus.key
    assert not (tmp_path / f"{corpus.key}.lock").exists()


def test_missing_paths_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        data.prepare(tmp_path / "nowhere", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"holds no \.py file"):
        data.prepare(tmp_path, cache_dir=tmp_path)
    with pytest.raises(UserError, match="list of files is empty"):
        data.prepare([], cache_dir=tmp_path)
    with pytest.raises(UserError, match="--vocab-size must be between"):
        data.prepare(source_text(1), vocab_size=261, cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*--cache-dir"):
        data.prepare(source_text(1), vocab_size=VOCAB, cache_dir=tmp_path / "file")


def test_foreign_tokenizers_are_refused(corpus, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="missing or not a tokenizer"):
        tokenizing.load_tokenizer(path)
    content = (corpus.folder / "tokenizer.json").read_text()
    for broken in (content[:-10], "[]", '{"model": 3}', '{"model": {"type": "BPE"}}', "[" * 10000):
        path.write_text(broken)
        with pytest.raises(UserError, match="missing or not a tokenizer"):
            tokenizing.load_tokenizer(path)


@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 2**40),
    world=st.sampled_from([1, 2, 4]),
    share=st.integers(1, 5),
    context=st.integers(1, 9),
)
def test_ranks_together_see_the_global_batch(seed, step, world, share, context):
    tokens = np.arange(1000, dtype=np.uint16)
    batches = [
        data.Batches(tokens, context=context, batch=world * share, seed=seed, rank=r, world=w).at(
            step
        )
        for w in (1, world)
        for r in range(w)
    ]
    (whole, targets), parts = batches[0], batches[1:]
    torch.testing.assert_close(torch.cat([tokens for tokens, _ in parts]), whole)
    torch.testing.assert_close(torch.cat([targets for _, targets in parts]), targets)
    torch.testing.assert_close(targets, whole + 1)
    assert whole.shape == (world * share, context)
    assert whole.dtype == torch.int64


def test_windows_reach_every_token_and_differ_between_steps():
    tokens = np.arange(12, dtype=np.uint16)
    batches = data.Batches(tokens, context=4, batch=400, seed=0)
    starts = batches.at(0)[0][:, 0]
    assert set(starts.tolist()) == set(range(8))
    assert not torch.equal(starts, batches.at(1)[0][:, 0])
    other = data.Batches(tokens, context=4, batch=400, seed=1)
    assert not torch.equal(starts, other.at(0)[0][:, 0])


def test_windows_stay_the_same_for_ever():
    """A run that is resumed with a later release must see the same batches."""
    tokens = np.arange(60000, dtype=np.uint16)
    starts = data.Batches(tokens, context=4, batch=3, seed=5).at(7)[0][:, 0]
    assert starts.tolist() == [35706, 43212, 27073]


@given(
    length=st.integers(12, 300),
    context=st.integers(1, 10),
    windows=st.integers(1, 40),
    batch=st.integers(1, 7),
    world=st.sampled_from([1, 2, 3]),
)
def test_validation_windows_do_not_overlap(length, context, windows, batch, world):
    tokens = np.arange(length, dtype=np.uint16)
    found = []
    batches = [
        list(
            data.validation_batches(
                tokens, context=context, batch=batch, windows=windows, rank=rank, world=world
            )
        )
        for rank in range(world)
    ]
    assert len({len(of_rank) for of_rank in batches}) == 1
    for of_rank in batches:
        for ids, targets in of_rank:
            assert len(ids) <= batch
            torch.testing.assert_close(targets, ids + 1)
            found += ids[:, 0].tolist()
    assert len(found) == min(windows, (length - 1) // context)
    gaps = np.diff(sorted(found))
    assert (gaps >= context).all()
    # Evenly spaced: no gap is longer than twice the mean one, rounded up to windows.
    assert (gaps <= context * (1 + (length - 1) // context / len(found))).all()


def test_too_few_tokens_are_refused():
    tokens = np.zeros(4, dtype=np.uint16)
    with pytest.raises(UserError, match="less than one window of 4"):
        data.Batches(tokens, context=4, batch=1, seed=0)
    with pytest.raises(UserError, match="less than one window of 4"):
        next(data.validation_batches(tokens, context=4, batch=1, windows=1))
    with pytest.raises(UserError, match="multiple of 6"):
        data.Batches(tokens, context=3, batch=3, seed=0, world=2)
