"""The page of a circuit in real headless Chromium; skipped, with a reason, where there is none."""

import dataclasses
import re

import pytest
from drawn import HOSTILE, VALIDATION, hostile, large, quotes

from sparse_transformer.circuits import viz, words

pytestmark = pytest.mark.slow


@pytest.fixture
def show(open_page, tmp_path):
    """Opens a circuit's page."""

    def opened(circuit, **options):
        path = tmp_path / "circuit.html"
        viz.write_html(circuit, path)
        return open_page(path, **options)

    return opened


def node_of(shown, circuit, id):
    index = next(place for place, node in enumerate(circuit.nodes) if node.id == id)
    return shown.locator(f"#n{index}")


def panel_name(shown):
    return shown.locator("#details h2").inner_text()


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_the_page_draws_every_node_and_edge(show, make):
    circuit = make()
    shown = show(circuit)
    assert shown.title() != "broken"
    boxes = shown.locator("[data-node]")
    assert boxes.count() == len(circuit.nodes)
    assert shown.locator(".edge").count() == len(circuit.edges)
    # No text is wider than its box, whatever fonts this machine has.
    assert shown.evaluate(
        """() => [...document.querySelectorAll("[data-node] text")].every((words) => {
            const box = words.parentNode.querySelector("path").getBoundingClientRect();
            return words.getBoundingClientRect().width <= box.width;
        })"""
    )
    # Every node can be described.
    described = boxes.evaluate_all(
        "all => all.map(one => (one.focus(), document.querySelector('#details h2').textContent))"
    )
    assert sorted(described) == sorted(
        re.sub("`([^`]+)`", r"\1", words.visible(node.label or words.channel(node)))
        for node in circuit.nodes
    )
    assert shown.locator("img").count() == 0


def test_hover_lights_the_neighbours_and_opens_the_panel(show):
    circuit = quotes()
    shown = show(circuit)
    node_of(shown, circuit, "0.mlp.post_act:201").hover()
    assert panel_name(shown) == "quote type"
    lit = shown.locator("[data-node].lit").evaluate_all("all => all.map(one => +one.dataset.node)")
    assert {circuit.nodes[place].id for place in lit} == {
        "0.mlp.post_act:201", "0.mlp.act_in:45", "0.mlp.act_in:12", "0.mlp.resid_delta:77"
    }  # fmt: skip
    assert shown.locator("g.edge.lit").count() == 3
    details = shown.locator("#details")
    said = details.inner_text()
    for wanted in (
        "neuron 201, layer 0",
        "0.mlp.post_act:201",
        "reads (2)",
        "read by (1)",
        "+1.37",
        "−0.34",
    ):
        assert wanted in said
    strips = details.locator(".tokens")
    # In the whole model and in the circuit alone.
    assert strips.count() == 2 * len(circuit.examples) + 3
    opening = strips.nth(0).locator("span").nth(1)
    assert opening.inner_text() == '("'
    assert opening.get_attribute("title") == '("  +3.10'
    assert opening.get_attribute("class") == "positive"
    assert strips.nth(1).locator("span").nth(1).get_attribute("title") == '("  +1.55'
    assert strips.nth(2).locator("span").nth(1).get_attribute("class") == "negative"
    assert strips.last.locator(".peak").inner_text() == '("'
    assert 'whole model: ")' in said
    assert "circuit alone: ') over \") by −0.40, which is wrong" in said
    assert said.count("the circuit is wrong") == 1
    shown.mouse.move(2, 2)
    assert shown.locator(".lit").count() == 0
    assert panel_name(shown) == "quote type"


def test_the_panel_shows_where_a_head_looks_and_what_channels_mean(show):
    circuit = quotes()
    shown = show(circuit)
    node_of(shown, circuit, "1.attn.head:1").hover()
    assert panel_name(shown) == 'looks at (" (94%)'
    details = shown.locator("#details")
    assert "Where it looks from the last token" in details.inner_text()
    strips = details.locator(".tokens")
    assert strips.count() == 2 * len(circuit.examples)
    assert strips.nth(1).locator("span").nth(1).get_attribute("title") == '("  +0.94'
    node_of(shown, circuit, "0.mlp.act_in:12").hover()
    assert "0.99 balanced accuracy on held-out text" in details.inner_text()
    sources = details.locator(".list code").all_text_contents()
    assert sources == ['(" +0.81', "(' +0.78", "·in −0.20"]
    node_of(shown, circuit, "1.attn.resid_delta:90").hover()
    assert details.locator(".list code").all_text_contents() == ['")', "')", "·in"]
    node_of(shown, circuit, "1.attn.q:mean of 1").hover()
    assert "at their mean" in details.inner_text()


def test_a_click_pins_and_the_lists_lead_on(show):
    circuit = quotes()
    shown = show(circuit)
    detector = node_of(shown, circuit, "0.mlp.post_act:137")
    detector.click()
    assert detector.get_attribute("aria-pressed") == "true"
    node_of(shown, circuit, "answer:7").hover()
    assert panel_name(shown) == "quote detector"
    shown.locator(".ends button", has_text="write 31").click()
    assert panel_name(shown) == "write 31"
    assert node_of(shown, circuit, "0.mlp.resid_delta:31").get_attribute("aria-pressed") == "true"
    assert shown.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "write 31"
    )
    shown.keyboard.press("Escape")
    assert shown.locator('[aria-pressed="true"]').count() == 0


def test_all_of_it_with_the_keyboard(show):
    circuit = quotes()
    shown = show(circuit)

    def focused():
        return shown.evaluate("document.activeElement.ariaLabel") or ""

    for _ in range(8):
        shown.keyboard.press("Tab")
        if focused().startswith('("'):
            break
    # Both tokens are read by two channels of the MLP, one of them by attention too.
    assert focused() == '(", token 5, 0 in, 3 out'
    assert panel_name(shown) == '("'
    outline = "getComputedStyle(document.activeElement.querySelector('path')).strokeWidth"
    assert shown.evaluate(outline) == "3px"
    shown.keyboard.press("ArrowRight")
    assert focused().startswith("(', token 6")
    shown.keyboard.press("ArrowRight")
    assert focused().startswith("(', token 6")
    seen = []
    for _ in range(12):
        shown.keyboard.press("ArrowDown")
        seen.append(focused().split(",")[0].split(" ")[0])
    assert seen[:4] == ["read", "quote", "write", "read"]
    assert seen[-1] in ('")', "')")
    shown.keyboard.press("Home")
    assert focused().startswith('("')
    shown.keyboard.press("Enter")
    pressed = shown.locator('[aria-pressed="true"]')
    assert pressed.get_attribute("aria-label").startswith('("')
    shown.keyboard.press("ArrowDown")
    assert panel_name(shown) == '("'
    shown.keyboard.press("Escape")
    assert pressed.count() == 0
    assert panel_name(shown).startswith("read")
    # One stop for all nodes: the next Tab leaves the picture.
    shown.keyboard.press("Tab")
    assert shown.evaluate("!document.activeElement.closest('#picture')")


def test_dark_is_the_readers_choice(show):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(255, 255, 255)", "rgb(21, 24, 28)"
    shown = show(quotes(), color_scheme="light")
    assert shown.evaluate(background) == light
    shown.click("#theme")
    assert shown.evaluate(background) == dark
    assert shown.inner_text("#theme") == "Light"
    shown.click("#theme")
    assert shown.evaluate(background) == light
    shown = show(quotes(), color_scheme="dark")
    assert shown.evaluate(background) == dark
    assert shown.inner_text("#theme") == "Light"


@pytest.mark.parametrize("make", [quotes, large, hostile])
def test_a_narrow_screen_scrolls_the_picture_alone(show, make):
    circuit = make()
    shown = show(circuit, width=360, height=740)
    node_of(shown, circuit, circuit.nodes[0].id).focus()
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360
    panel, scroller = (
        shown.locator("#panel").bounding_box(),
        shown.locator("#scroller").bounding_box(),
    )
    assert panel["y"] >= scroller["y"] + scroller["height"]
    # Names stay legible rather than fit.
    natural = shown.evaluate("document.getElementById('picture').viewBox.baseVal.width")
    assert shown.locator("#picture").bounding_box()["width"] >= 0.79 * natural


def test_an_edge_says_its_weight_at_the_pointer(show):
    circuit = large()
    shown = show(circuit)
    at = next(place for place, edge in enumerate(circuit.edges) if edge.kind == "weight")
    title = shown.locator(f"#e{at} title").text_content()
    assert title.endswith(words.signed(circuit.edges[at].weight))
    assert " → " in title


def test_size_buttons(show):
    shown = show(quotes())
    width = "document.getElementById('picture').getBoundingClientRect().width"
    fitting = shown.evaluate(width)
    shown.click("#larger")
    assert shown.evaluate(width) == pytest.approx(1.25 * fitting, rel=0.01)
    shown.click("#fit")
    assert shown.evaluate(width) == pytest.approx(fitting)


def test_the_reasons_to_doubt_are_red(show):
    near = dataclasses.replace(VALIDATION.controls[0], edges=12)
    validation = dataclasses.replace(VALIDATION, necessary=False, controls=(near,))
    circuit = dataclasses.replace(quotes(), validation=validation)
    shown = show(circuit, color_scheme="light")
    failed = shown.locator(".verdicts .fails")
    assert failed.count() == 2
    assert failed.first.evaluate("one => getComputedStyle(one).color") == "rgb(179, 20, 15)"
    assert failed.first.inner_text().startswith("Nonsense needs 1.3 times the edges")


def test_words_are_the_same_in_both_languages(show):
    """`visible` exists twice: what the panel shows of a token is what its box shows."""
    circuit = hostile()
    shown = show(circuit)
    node_of(shown, circuit, "0.mlp.post_act:137").hover()
    spans = shown.locator("#details .tokens").last.locator("span")
    assert spans.all_text_contents() == [words.visible(token) for token in HOSTILE]
