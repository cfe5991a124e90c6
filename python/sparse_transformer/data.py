"""The corpus: source files, and their token ids in memory-mapped files.

`prepare` turns files into a `Corpus`, or finds the one that it made before. `Batches` and
`validation_batches` cut windows out of it, and remember nothing: any step can be asked for.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import tokenizers
import torch
from filelock import FileLock
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sparse_transformer.errors import UserError
from sparse_transformer.files import new_folder, sha256, sync
from sparse_transformer.tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    load_tokenizer,
    pieces_of,
    train_tokenizer,
)

# Part of the key of the cache: raise it when the same files would give other bytes.
_VERSION = 1
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_VALIDATION_SHARE = 0.05
_TOKENIZER_SHARE = 1 / 3
# Less than this is not worth taking a third of.
_SMALL_CORPUS_BYTES = 2_000_000
# A single file or text is cut at line ends into this many parts, to have something to split.
_PARTS = 64


@dataclass(frozen=True)
class Corpus:
    """Token ids of a corpus, each file followed by the end-of-text token.

    Attributes:
        train, validation: uint16 memory maps; no file is in both.
        tokenizer: its last id, `end_of_text`, stands between files and never inside one.
        folder: where the cache keeps `train.bin`, `validation.bin` and `tokenizer.json`.
        key: hash of the files, their contents and the vocabulary size.
        files, skipped: how many files are in it, and how many were not UTF-8 text.
    """

    train: np.memmap
    validation: np.memmap
    tokenizer: Tokenizer
    folder: Path
    key: str
    files: int
    skipped: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int:
        return self.vocab_size - 1


def _bytes(name: str) -> bytes:
    """Of a file's name, which need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class _Document:
    """One file, or a part of the only one: `name` decides on which side of the split it falls."""

    name: str
    text: str

    def share(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the name alone."""
        digest = hashlib.sha256(_bytes(f"{purpose}:{self.name}")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64


def prepare(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    vocab_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Corpus:
    """Reads or builds the corpus of `source`; the same files give the same bytes.

    The byte-level BPE is trained on a third of the training files (on all, below 2 MB); each of
    `TASK_TOKENS` is a single token. The split into training and validation goes by a hash of each
    file's path inside its folder.

    Args:
        source: None for the standard library of the running interpreter; a folder (its `*.py`,
            hidden folders and installed packages left out); a file; several of these; or a text,
            which is a string with a line break in it.
        vocab_size: of the tokenizer, end-of-text included.
        tokenizer: one that `prepare` trained for another corpus, in place of one for this.
        cache_dir: by default `sparse_transformer` in `$XDG_CACHE_HOME` or `~/.cache`.
        progress: show a progress bar; by default where stderr is a terminal.

    Raises:
        UserError: nothing to read, nothing but binary files, too little text for the vocabulary, or
            a cache that cannot be written.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= 65536:
        raise UserError(
            f"--vocab-size must be between {MIN_VOCAB_SIZE} and 65536 (ids are uint16), "
            f"got {vocab_size}"
        )
    disable = None if progress is None else not progress
    documents, skipped = _read(source, disable)
    key = _key(documents, vocab_size, tokenizer)
    root = Path(cache_dir) if cache_dir is not None else default_cache()
    folder = root / key
    try:
        # What is complete needs no lock, and so no permission to write one.
        if not _complete(folder):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f"{key}.lock"):
                if not _complete(folder):
                    _build(documents, vocab_size, tokenizer, folder, disable)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "choose another folder"
        raise UserError(
            f"the token cache {root} cannot be written ({error.strerror}): "
            f"{hint}, for example with --cache-dir or XDG_CACHE_HOME"
        ) from error
    return Corpus(
        train=np.memmap(folder / "train.bin", dtype="<u2", mode="r"),
        validation=np.memmap(folder / "validation.bin", dtype="<u2", mode="r"),
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        folder=folder,
        key=key,
        files=len(documents),
        skipped=skipped,
    )


class Batches:
    """Random windows of the training tokens, a pure function of (seed, step, rank, world).

    Step `s` has `batch` windows of `context` tokens, drawn uniformly with Philox(seed, s). Of those
    rank `r` of `world` gets the `r`-th part, so that all ranks together see what one alone would.

    Raises:
        UserError: `batch` cannot be divided among the ranks, or there are too few tokens.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        context: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch < 1 or batch % world:
            raise UserError(
                f"the {batch} windows of a step cannot be divided among {world} ranks: "
                f"choose --batch-tokens as a multiple of {context * world}"
            )
        check_length(tokens, context, "training")
        self._tokens, self._context, self._batch = tokens, context, batch
        self._seed, self._rank, self._world = seed, rank, world

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """`(tokens, targets)` of this rank, int64 `(batch / world, context)`; targets are next."""
        # The raw words of a counter-based generator: the same on every platform and numpy.
        words = np.random.Philox(key=self._seed, counter=step << 64).random_raw(self._batch)
        starts = words % np.uint64(len(self._tokens) - self._context)
        share = self._batch // self._world
        return _windows(
            self._tokens, starts[self._rank * share : (self._rank + 1) * share], self._context
        )


def validation_batches(
    tokens: np.ndarray,
    *,
    context: int,
    batch: int,
    windows: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows each time: up to `windows` of them, evenly spaced, without overlap.

    Yields `(tokens, targets)` as `Batches.at` does, at most `batch` windows at once; rank `r` gets
    every `world`-th window. Every rank gets equally many batches, the last may have no window.
    """
    check_length(tokens, context, "validation")
    available = (len(tokens) - 1) // context
    count = min(windows, available)
    starts = np.arange(count) * available // count * context
    for first in range(0, count, batch * world):
        yield _windows(tokens, starts[first : first + batch * world][rank::world], context)


def sample(corpus: Corpus, tokenizer: Tokenizer, context: int, count: int) -> Tensor:
    """int64 `(count, context)`, evenly spaced over the training tokens; fewer if there are fewer.

    Where the corpus on this machine has another tokenizer, the text is encoded again.
    """
    available = (len(corpus.train) - 1) // context
    count = max(1, min(count, available))
    starts = np.arange(count) * available // count * context
    picked = np.stack([corpus.train[start : start + context] for start in starts])
    if tokenizer.to_str() != corpus.tokenizer.to_str():
        texts = [corpus.tokenizer.decode(row, skip_special_tokens=False) for row in picked.tolist()]
        ids = [id for encoding in tokenizer.encode_batch(texts) for id in encoding.ids]
        rows = max(1, len(ids) // context)
        picked = np.array(ids[: rows * context]).reshape(rows, -1)
    return torch.from_numpy(picked.astype(np.int64))


def _windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    positions = starts.astype(np.int64)[:, None] + np.arange(context + 1)
    ids = torch.from_numpy(tokens[positions].astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def check_length(tokens: np.ndarray, context: int, name: str) -> None:
    """A UserError unless `tokens` hold one window and the target of its last token."""
    if len(tokens) <= context:
        raise UserError(
            f"the corpus has {len(tokens)} {name} tokens, which is less than one window of "
            f"{context} and its target: give more text with --data, or a smaller --context"
        )


def _read(source: object, disable: bool | None) -> tuple[list[_Document], int]:
    """The documents, sorted by name, and how many files are not text."""
    if isinstance(source, str) and "\n" in source:
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not UTF-8 ({error.reason}): convert it") from error
        return _parts("text", source), 0
    files = _files(source)
    documents, skipped = [], 0
    for name, path in tqdm(files, "reading", unit=" files", disable=disable, leave=False):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): leave it out of --data, or make it "
                f"readable"
            ) from error
        text = _decode(content)
        if text is None:
            skipped += 1
        elif text:
            documents.append(_Document(name, text))
    if not documents:
        found = f"{skipped} files that are not UTF-8 text" if skipped else "only empty files"
        raise UserError(
            f"the corpus is empty, there are {found}: give --data a file or folder with source code"
        )
    if len(documents) == 1:
        documents = _parts(documents[0].name, documents[0].text)
    return documents, skipped


def _decode(content: bytes) -> str | None:
    """The text, its line ends as `\\n`; None if this is not UTF-8 text."""
    if b"\0" in content:
        return None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _files(source: object) -> list[tuple[str, Path]]:
    """`(name, path)` of all files of `source`, sorted by name."""
    if source is None:
        return _folder_files(Path(sysconfig.get_paths()["stdlib"]))
    if isinstance(source, (str, os.PathLike)):
        sources = [Path(source)]
    elif isinstance(source, Sequence):
        sources = [Path(entry) for entry in source]
    else:
        raise UserError(f"the corpus must be paths or a text, got {type(source).__name__}")
    files: dict[str, Path] = {}
    known: set[tuple[int, int]] = set()
    for index, path in enumerate(sources):
        if path.is_dir():
            found = _folder_files(path)
        elif path.is_file():
            found = [(path.name, path)]
        else:
            raise UserError(f"{path} does not exist: give --data files or folders that do")
        for name, file in found:
            if len(sources) > 1:
                # A file that is in two sources counts once.
                status = file.stat()
                identity = (status.st_dev, status.st_ino)
                if identity in known:
                    continue
                known.add(identity)
            # Several sources may hold the same name; the first keeps it.
            files[name if name not in files else f"{index}/{name}"] = file
    if not files:
        raise UserError("the list of files is empty: give --data at least one file or folder")
    return sorted(files.items())


def _folder_files(root: Path) -> list[tuple[str, Path]]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in _SKIPPED_FOLDERS and name[0] != "."
        ]
        for name in names:
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file():
                files.append((path.relative_to(root).as_posix(), path))
    if not files:
        raise UserError(
            f"{root} holds no .py file: give --data another folder, or name its files one by one"
        )
    return sorted(files)


def _parts(name: str, text: str) -> list[_Document]:
    """One text as `_PARTS` documents, cut at line ends; a single line anywhere."""
    lines = text.splitlines(keepends=True)
    if len(lines) == 1 and len(text) >= 2 * _PARTS:
        size = -(-len(text) // _PARTS)
        lines = [text[start : start + size] for start in range(0, len(text), size)]
    count = min(_PARTS, len(lines))
    bounds = [len(lines) * part // count for part in range(count + 1)] if count else []
    parts = ["".join(lines[a:b]) for a, b in itertools.pairwise(bounds)]
    if not "".join(parts).strip():
        raise UserError("the corpus is empty: give --data a file or folder with source code")
    return [_Document(f"{name}#{part:04d}", text) for part, text in enumerate(parts)]


def _key(documents: list[_Document], vocab_size: int, tokenizer: Tokenizer | None) -> str:
    digest = hashlib.sha256(f"{_VERSION} {tokenizers.__version__} {vocab_size}".encode())
    if tokenizer is not None:
        digest.update(tokenizer.to_str().encode())
    for document in documents:
        content = document.text.encode()
        digest.update(_bytes(f"\0{document.name}\0{len(content)}\0"))
        digest.update(content)
    return digest.hexdigest()[:24]


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "sparse_transformer")


def _complete(folder: Path) -> bool:
    """True if everything that the manifest promises is there, with its bytes."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = manifest["sha256"].keys() == {"train.bin", "validation.bin", "tokenizer.json"}
        counted = isinstance(manifest["files"], int)
        return (
            whole
            and counted
            and all(sha256(folder / name) == digest for name, digest in manifest["sha256"].items())
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def _build(
    documents: list[_Document],
    vocab_size: int,
    tokenizer: Tokenizer | None,
    folder: Path,
    disable: bool | None,
) -> None:
    """Writes `folder` under another name, then renames it: who finds it finds all of it."""
    train, validation = _split(documents)
    if tokenizer is None:
        sample = train
        if sum(len(document.text) for document in train) > _SMALL_CORPUS_BYTES:
            sample = [document for document in train if document.share("bpe") < _TOKENIZER_SHARE]
        bar = tqdm(sample, "tokenizer", disable=disable, leave=False)
        tokenizer = train_tokenizer((document.text for document in bar), vocab_size)
    for stale in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = new_folder(folder.parent, f"{folder.name}.", ".tmp")
    try:
        # The library's own `save` raises nothing that tells a full disk from a fault.
        text = tokenizer.to_str(pretty=True)
        (temporary / "tokenizer.json").write_text(text, encoding="utf-8")
        with tqdm(total=len(documents), desc="tokens", unit=" files", disable=disable) as bar:
            for name, side in (("train", train), ("validation", validation)):
                with open(temporary / f"{name}.bin", "wb") as file:
                    _encode(side, tokenizer, file, bar)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        manifest = {"files": len(documents), "sha256": hashes}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in temporary.iterdir():
            sync(path)
        # Here can only be what _complete refused: something truncated or altered.
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split(documents: list[_Document]) -> tuple[list[_Document], list[_Document]]:
    """Training and validation; each has at least one document if there are two."""
    ordered = sorted(documents, key=lambda document: document.share("validation"))
    count = sum(document.share("validation") < _VALIDATION_SHARE for document in documents)
    count = min(max(count, 1), len(documents) - 1)
    held_out = {document.name for document in ordered[:count]}
    return (
        [document for document in documents if document.name not in held_out],
        [document for document in documents if document.name in held_out],
    )


def _encode(documents: list[_Document], tokenizer: Tokenizer, file: IO[bytes], bar: tqdm) -> None:
    end = tokenizer.token_to_id(END_OF_TEXT)
    # A file that contains the name of the end-of-text token contains ordinary characters.
    tokenizer.encode_special_tokens = True
    for first in range(0, len(documents), 64):
        pieces = [pieces_of(document.text) for document in documents[first : first + 64]]
        encodings = iter(tokenizer.encode_batch_fast([text for texts in pieces for text in texts]))
        for texts in pieces:
            ids = itertools.chain.from_iterable(next(encodings).ids for _ in texts)
            file.write(np.array([*ids, end], dtype="<u2").tobytes())
        bar.update(len(pieces))
