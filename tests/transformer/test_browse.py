"""The page of a whole model: its data are the model's, and it can be walked in real Chromium."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from drawn import HOSTILE

from sparse_transformer import hooks
from sparse_transformer.browse import __main__ as program
from sparse_transformer.browse.content import Content, Place, describe, need_small
from sparse_transformer.browse.page import render
from sparse_transformer.circuits import labels, words
from sparse_transformer.circuits.graph import Edges, Nodes, rows_of
from sparse_transformer.errors import UserError
from sparse_transformer.model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=48,
    n_layer=2,
    d_model=16,
    d_head=8,
    d_mlp=24,
    context=24,
    density=0.25,
    embedding_density=0.5,
)
NODES = Nodes.of(CONFIG)
TEXTS = [HOSTILE[at % len(HOSTILE)] for at in range(CONFIG.vocab_size)]
TOKENIZER = SimpleNamespace(decode=lambda ids: TEXTS[ids[0]])


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    made = Transformer(CONFIG, generator=generator).eval()
    with torch.no_grad():
        for block in made.blocks:
            block.attn.sinks.normal_(generator=generator)
            block.attn.qkv.weight.mul_(30)
        made.norm.weight.normal_(generator=generator)
    return made


@pytest.fixture(scope="module")
def corpus():
    return torch.randint(
        CONFIG.vocab_size, (20, CONFIG.context), generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module")
def content(model, corpus):
    return describe(model, TOKENIZER, corpus, corpus[3, :10].tolist())


def first(content, name):
    """The number of a place's first node."""
    sizes = {place.name: place.width for place in content.places}
    return sum(sizes[place] for place in list(sizes)[: list(sizes).index(name)])


# --- the data


def test_snippets_and_facts_are_of_the_recorded_activations(model, corpus, content):
    seen = hooks.record(model, corpus)
    for name in ("0.attn.q", "1.mlp.post_act", "1.attn.resid_delta", "final_resid"):
        for channel in (0, 5, 11):
            node, values = first(content, name) + channel, seen[name][..., channel]
            assert content.means[node] == pytest.approx(float(values.mean()), abs=1e-6)
            assert content.active[node] == pytest.approx(float((values != 0).float().mean()))
            peaks = content.peaks[node]
            best = values.abs().amax(1).sort(descending=True).values[: len(peaks)]
            for peak, around, largest in zip(peaks, content.snippets[node], best, strict=True):
                if peak < 0:
                    assert largest == 0
                    continue
                row, at = divmod(int(peak), CONFIG.context)
                assert abs(values[row, at]) == pytest.approx(float(largest))
                for place in range(max(0, at - 12), min(CONFIG.context, at + 5)):
                    assert around[place - at + 12] == pytest.approx(float(values[row, place]))


def test_patterns_are_the_attention_that_the_model_has(model, corpus, content):
    example = corpus[3:4, :10]
    assert content.example == example[0].tolist()
    seen = hooks.record(model, example)
    for layer in range(CONFIG.n_layer):
        v = seen[f"{layer}.attn.v"][0].unflatten(-1, (CONFIG.heads, CONFIG.d_head))
        y = torch.einsum("hqk,khd->qhd", content.patterns[layer], v).flatten(1)
        torch.testing.assert_close(y, seen[f"{layer}.attn.y"][0], atol=1e-5, rtol=1e-4)
        sums = content.patterns[layer].sum(-1)
        assert sums.max() < 1 + 1e-5
        assert sums.min() < 0.9  # the rest is the sink's


def test_tokens_of_a_direction_are_the_embedding_s_and_the_unembedding_s(model, content):
    embed = rows_of(model.embed, range(CONFIG.vocab_size))
    unembed = rows_of(model.unembed, range(CONFIG.vocab_size)) * model.norm.weight.detach()
    for found, table, by in (
        (content.embedded, embed, embed.abs()),
        (content.raised, unembed, unembed),
        (content.lowered, unembed, -unembed),
    ):
        for channel in range(CONFIG.d_model):
            count = min(6, int((by[:, channel] > 0).sum()))
            best = by[:, channel].sort(descending=True).values[:count].tolist()
            pairs = found[channel]
            assert [float(by[token, channel]) for token, _ in pairs] == pytest.approx(best)
            weights = [float(table[token, channel]) for token, _ in pairs]
            assert [weight for _, weight in pairs] == pytest.approx(weights, abs=1e-4)


def test_names_are_labels_and_heads_say_where_they_look(model, corpus, content):
    place = "1.attn.v"
    nodes = [(place, channel) for channel in range(16)]
    wanted = labels.label_nodes(model, corpus, TOKENIZER, nodes)
    start = first(content, place)
    for at, label in enumerate(wanted):
        assert content.names[start + at] == (words.named("v", label.text) if label.text else "")
        assert content.scores[start + at] == pytest.approx(label.score if label.text else 0)
    # A head that looks at its own token: the query is the key, and there is no sink.
    alone = Transformer(dataclasses.replace(CONFIG, linear="dense", active=None, sinks=False))
    with torch.no_grad():
        weight = torch.eye(CONFIG.d_model)
        alone.blocks[0].attn.qkv.weight.copy_(torch.cat([9 * weight, 9 * weight, weight]))
        bits = (torch.arange(CONFIG.vocab_size)[:, None] >> torch.arange(8)) % 2 * 2.0 - 1
        alone.embed.weight.copy_(torch.cat([bits, bits], 1))
    found = describe(alone.eval(), TOKENIZER, corpus, [1, 2])
    head = found.names[first(found, "0.attn.head")]
    assert head.startswith("looks at its own token (")
    assert found.means[first(found, "0.attn.head")] == pytest.approx(0, abs=1e-5)


# --- the program


def run(monkeypatch, model, corpus, arguments):
    monkeypatch.setattr(program, "load_run", lambda *_: (model, TOKENIZER))
    monkeypatch.setattr(program, "corpus_sample", lambda *_, **__: corpus)
    return program.main(arguments)


def test_the_program_writes_one_page(monkeypatch, model, corpus, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "prompt_tokens", lambda _, text: ([len(text), 7, 5], 9))
    assert run(monkeypatch, model, corpus, ["--checkpoint", "runs/a<b", "--prompt", "def f"]) == 0
    text = (tmp_path / "a<b.html").read_text(encoding="utf-8")
    assert "<title>a&lt;b</title>" in text
    assert '"example":[5,7,5]' in text
    said, note = capsys.readouterr()
    assert "of the prompt's 9 tokens the last 3 are read\n" in note
    assert f"{NODES.total + 2 * 2 + 16:,} nodes, {len(Edges.of(model).weight):,} edges" in said
    assert run(monkeypatch, model, corpus, ["--checkpoint", "a", "--out", "no/such/a.html"]) == 2
    assert capsys.readouterr().err == "error: there is no folder no/such: choose another --out\n"


def test_models_that_are_too_large_are_refused(monkeypatch, capsys, corpus):
    large = SimpleNamespace(config=ModelConfig(d_model=1024, n_layer=8))
    assert run(monkeypatch, large, corpus, ["--checkpoint", "large"]) == 2
    assert capsys.readouterr().err == (
        "error: the page shows at most 20,000 nodes, and this model has 91,648: "
        "choose a smaller or a sparser model\n"
    )
    with pytest.raises(UserError, match="at most 400,000 edges, and this model has 400,001"):
        need_small(CONFIG, 400_001)


# --- in the browser


@pytest.fixture
def show(open_page, tmp_path):
    """Opens the page of a model at a node."""

    def opened(content, node="", name="tiny", **options):
        path = tmp_path / "model.html"
        path.write_text(render(name, "facts", content), encoding="utf-8")
        shown = open_page(path, **options)
        if node:
            visit(shown, node)
        return shown

    return opened


def arrive(shown, node):
    """Waits until a node is shown. The page forbids the eval of `wait_for_function`."""
    pytest.importorskip("playwright.sync_api").expect(shown).to_have_title(
        re.compile(re.escape(f"{node} · "))
    )


def visit(shown, node):
    shown.evaluate("id => { location.hash = id }", node)
    arrive(shown, node)


def linked(shown, side):
    """Id and text of the weight of each node in a list."""
    more = shown.locator(f"#{side} > button:not(.node)")
    if more.count():
        more.click()
    places = shown.evaluate("JSON.parse(document.getElementById('content').textContent).places")
    ids = [f"{name}:{at}" for name, _, width in places for at in range(width)]
    found = shown.locator(f"#{side} .node").evaluate_all(
        "all => all.map(one => [+one.dataset.node, one.lastChild.textContent])"
    )
    return [(ids[node], text) for node, text in found]


@pytest.mark.slow
def test_readers_and_writers_are_the_models_edges(show, model, content):
    edges = Edges.of(model)
    shown = show(content)
    for id in ("0.mlp.post_act:7", "1.attn.act_in:3", "0.attn.v:9", "1.mlp.resid_delta:5"):
        visit(shown, id)
        node = NODES.index(id)
        for side, here, there in (
            ("writers", edges.target, edges.source),
            ("readers", edges.source, edges.target),
        ):
            wanted = {
                (NODES.id(int(there[at])), words.signed(float(edges.weight[at])))
                for at in (here == node).nonzero().flatten().tolist()
            }
            found = linked(shown, side)
            assert {pair for pair in found if pair[1] not in ("residual", "attention")} == wanted
            assert len(found) == len(set(found))

    def flows(id, side):
        visit(shown, id)
        return {other for other, text in linked(shown, side) if text in ("residual", "attention")}

    # Along the residual stream only what comes later reads.
    assert flows("1.attn.act_in:3", "writers") == {
        "0.attn.resid_delta:3", "0.mlp.resid_delta:3", "final_resid:3"
    }  # fmt: skip
    assert flows("0.mlp.resid_delta:3", "readers") == {
        "1.attn.act_in:3", "1.mlp.act_in:3", "final_resid:3"
    }  # fmt: skip
    assert len(flows("final_resid:3", "readers")) == len(flows("final_resid:3", "writers")) == 4
    # Channel 9 is of head 1.
    assert flows("1.attn.q:9", "readers") == {"1.attn.head:1"}
    assert flows("1.attn.head:1", "readers") == {f"1.attn.v:{at}" for at in range(8, 16)}
    assert flows("1.attn.v:9", "writers") == {"1.attn.head:1"}


@pytest.mark.slow
def test_a_walk_with_the_keyboard_and_back(show, content):
    shown = show(content, "0.mlp.act_in:3")
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("ArrowDown")
    second = linked(shown, "readers")[1][0]
    shown.keyboard.press("ArrowRight")  # the list was rewritten by "All"
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("Enter")
    arrive(shown, second)
    assert second.startswith("0.mlp.post_act:")
    # Its first reader has the focus: Enter goes on.
    third = linked(shown, "readers")[0][0]
    shown.keyboard.press("Enter")
    arrive(shown, third)
    assert third.startswith("0.mlp.resid_delta:")
    shown.keyboard.press("ArrowLeft")
    assert shown.evaluate("!!document.activeElement.closest('#writers')")
    shown.go_back()
    arrive(shown, second)
    shown.go_back()
    arrive(shown, "0.mlp.act_in:3")
    shown.go_forward()
    arrive(shown, second)
    shown.keyboard.press("]")
    at = int(second.split(":")[1])
    following = f"0.mlp.post_act:{at + 1 if at < 23 else at}"
    arrive(shown, following)
    first_writer = linked(shown, "writers")[0][0]
    shown.locator("#writers .node").first.click()
    arrive(shown, first_writer)


@pytest.mark.slow
def test_search_finds_by_id_kind_and_label(show, content):
    name = "detects `needle`, `(`"
    node = NODES.index("1.mlp.post_act:20")
    names = [*content.names[:node], name, *content.names[node + 1 :]]
    shown = show(dataclasses.replace(content, names=names))
    shown.keyboard.press("/")
    shown.keyboard.type("NEEDLE")
    results = shown.locator("#results .node")
    assert results.count() == 1
    assert results.first.inner_text() == "detects needle, (\nneuron 20, layer 1"
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("Enter")
    arrive(shown, "1.mlp.post_act:20")
    assert shown.locator("#results").is_hidden()
    shown.fill("#search", "neuron 2")
    # The one of that name stands before 20 to 23.
    assert results.first.inner_text().endswith("neuron 2, layer 0")
    shown.fill("#search", "head 1")
    assert results.first.inner_text().endswith("head 1, layer 0")
    shown.fill("#search", "xyzzy")
    assert shown.locator("#results").inner_text() == "no such node"
    shown.keyboard.press("Escape")
    assert shown.locator("#results").is_hidden()
    for unknown in ("7.mlp.post_act:1", "1.mlp.post_act:24", "%"):
        shown.evaluate("id => { location.hash = id }", unknown)
        shown.locator("#results .facts").wait_for()
        assert shown.input_value("#search") == unknown
        shown.keyboard.press("Escape")
    arrive(shown, "1.mlp.post_act:20")


@pytest.mark.slow
def test_hostile_texts_are_shown_as_they_are(show, corpus, content):
    names = [HOSTILE[at % len(HOSTILE)] for at in range(len(content.names))]
    shown = show(dataclasses.replace(content, names=names), "0.mlp.post_act:1", HOSTILE[0])
    assert shown.title() == f"0.mlp.post_act:1 · {HOSTILE[0]}"
    assert shown.locator("h1").inner_text() == HOSTILE[0]
    peak = int(content.peaks[NODES.index("0.mlp.post_act:1"), 0])
    at = peak % CONFIG.context
    part = corpus.flatten()[peak - min(12, at) : peak + min(5, CONFIG.context - at)]
    spans = shown.locator("#more .tokens").first.locator("span")
    assert spans.all_text_contents() == [words.visible(TEXTS[token]) for token in part]
    assert spans.locator("nth=" + str(min(12, at))).get_attribute("class").endswith("peak")
    assert shown.locator("img").count() == 0
    assert shown.locator("script").count() == 2


@pytest.mark.slow
def test_attention_on_the_example(show, content):
    shown = show(content, "1.attn.head:1")
    strip = shown.locator("#example")
    strip.focus()
    for _ in range(3):
        shown.keyboard.press("ArrowLeft")
    query = len(content.example) - 4
    pattern = content.patterns[1, 1, query]
    shares = strip.locator("span").evaluate_all(
        "all => all.map(one => +one.style.getPropertyValue('--share'))"
    )
    assert shares == pytest.approx((pattern / pattern.max()).tolist(), abs=0.02)
    sink = f"{100 * (1 - float(pattern.sum())):.0f}"
    said = shown.locator("#more .answer-line").inner_text()
    assert f"(token {query})" in said
    assert abs(int(said.split(", ")[-1].split("%")[0]) - int(sink)) <= 1
    # Of the first row the first and the last pixel.
    row = """() => [...document.querySelector("canvas").getContext("2d")
        .getImageData(0, 0, 10, 1).data]"""
    red, _, blue, seen, *_, hidden = shown.evaluate(row)
    assert blue > 2 * red  # the theme's blue
    assert seen == pytest.approx(255 * float(content.patterns[1, 1, 0, 0]) ** 0.5, abs=3)
    assert hidden == 0  # nothing looks ahead


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_one_column(show, content, scheme):
    shown = show(content, "0.mlp.act_in:3", width=390, height=844, color_scheme=scheme)
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}[scheme]
    for id in ("0.mlp.act_in:3", "1.attn.head:1"):
        visit(shown, id)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [shown.locator(f"#{id}").bounding_box() for id in ("node", "writers", "readers")]
    for above, below in itertools.pairwise(boxes):
        assert below["y"] >= above["y"] + above["height"]


def synthetic():
    """As large as the page of a model of 5,000 nodes is, with a name and snippets for each."""
    config = ModelConfig(n_layer=2, density=1 / 32, bigram=False)
    edges = Edges.of(Transformer(config))
    nodes, D = Nodes.of(config), config.d_model
    places = [Place(n, nodes.kind(n), w) for n, w in zip(nodes.names, nodes.widths, strict=True)]
    places += [Place(f"{n}.attn.head", "head", config.heads) for n in range(2)]
    places.append(Place("final_resid", "residual", D))
    N = sum(place.width for place in places)
    pairs = [[(at, 0.125)] * 6 for at in range(D)]
    return Content(
        tuple(places), config.d_head, [f" token{at}" for at in range(2048)],
        torch.randint(2048, (128, 256)), [f"detects ` token{at}`, `(`, 9 more" for at in range(N)],
        torch.rand(N), torch.randn(N), torch.rand(N), torch.randint(128 * 256, (N, 4)),
        torch.randn(N, 4, 17), edges.source, edges.target, edges.weight, pairs, pairs, pairs,
        list(range(64)), torch.rand(2, config.heads, 64, 64),
    )  # fmt: skip


@pytest.mark.slow
def test_five_thousand_nodes_take_less_than_2_seconds_and_5_megabytes(show, tmp_path):
    content = synthetic()
    assert len(content.names) > 5000
    assert len(content.weight) > 40_000
    shown = show(content, "")
    assert (tmp_path / "model.html").stat().st_size < 5e6
    # Seconds of a processor, as a busy machine has no others: from nothing to a drawn page.
    session = shown.context.new_cdp_session(shown)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    shown.reload()
    shown.locator("#lines path").first.wait_for(state="attached")
    metrics = session.send("Performance.getMetrics")["metrics"]
    busy = {metric["name"]: metric["value"] for metric in metrics}
    assert 0 < busy["TaskDuration"] < 2
    shown.fill("#search", "token123")
    assert shown.locator("#results .node").count() == 11  # and 1230 to 1239
