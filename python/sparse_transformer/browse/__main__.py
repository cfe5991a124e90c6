"""`python -m sparse_transformer.browse --checkpoint DIR`: the whole model as one offline page.

Any neuron, channel, head or residual direction with what writes to it and what reads it, its label,
where in the corpus it is most active, and where the heads look on an example.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparse_transformer import program
from sparse_transformer.browse.content import describe, need_small
from sparse_transformer.browse.page import render
from sparse_transformer.generation import prompt_tokens
from sparse_transformer.model import count_weights
from sparse_transformer.run import corpus_sample, load_run

# Windows of the corpus from which labels and snippets are; tokens of the example.
_ROWS, _EXAMPLE = 128, 64


@dataclass(frozen=True)
class BrowseConfig:
    """Writes one page with all nodes of a trained model: their weights, labels and snippets."""

    checkpoint: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of a run, of a checkpoint in it or of an exported model; or the name of a model."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The page; by default DIR's name with .html, in the current folder."""
    prompt: str | None = None
    """Text on which attention is shown ("-": standard input); by default from the corpus."""
    step: int | None = None
    """The checkpoint of this step, by default the newest."""
    data: tuple[Path, ...] = ()
    """Files for labels and snippets; by default the model's sample, or its training files."""
    cache_dir: Path | None = None
    """Folder for tokenized corpora."""


def run(config: BrowseConfig) -> None:
    """Writes the page and prints how large it is."""
    name = config.checkpoint.resolve().name
    out = config.out or Path(f"{name}.html")
    program.need_writable("--out", out)
    model, tokenizer = load_run(config.checkpoint, config.step)
    need_small(model.config)
    corpus = corpus_sample(config.checkpoint, model, data=config.data, cache_dir=config.cache_dir)
    corpus = corpus[:: max(1, len(corpus) // _ROWS)]
    example = corpus[0, :_EXAMPLE].tolist()
    if config.prompt is not None:
        ids, length = prompt_tokens(model, program.read_text(config.prompt))
        example = program.cropped(ids[-_EXAMPLE:], length)
    content = describe(model, tokenizer, corpus, example)
    facts = (
        f"{model.config.n_layer} layers, width {model.config.d_model}, "
        f"L0 {count_weights(model):,}, {len(content.names):,} nodes, "
        f"{len(content.weight):,} edges in its blocks; "
        f"labels and snippets from {corpus.numel():,} tokens"
    )
    out.write_text(render(name, facts, content), encoding="utf-8", newline="\n")
    print(f"{program.printable(str(out))}: {facts}; {out.stat().st_size / 1e6:.1f} MB")


main = program.entry(BrowseConfig, "browse", run)


if __name__ == "__main__":
    sys.exit(main())
