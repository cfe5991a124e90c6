// What moves in the page of a circuit; common.js stands before it.
(() => {
  const circuit = JSON.parse(byId("circuit").textContent);
  const picture = byId("picture");
  const scroller = byId("scroller");
  const nodes = circuit.nodes;
  const place = new Map(nodes.map((node, index) => [node.id, index]));

  // By index in circuit.nodes and circuit.edges, as the ids n12 and e34 in the drawing are.
  const shapes = nodes.map((_, index) => byId(`n${index}`));
  const lines = circuit.edges.map((_, index) => byId(`e${index}`));
  const arriving = nodes.map(() => []);
  const leaving = nodes.map(() => []);
  circuit.edges.forEach((edge, index) => {
    const [source, target] = [place.get(edge.source), place.get(edge.target)];
    leaving[source].push({ index, other: target });
    arriving[target].push({ index, other: source });
  });
  // The middle of each node; nodes of a row have the same y.
  const middle = shapes.map((shape) => {
    const { x, y, width, height } = shape.querySelector("path").getBBox();
    return [x + width / 2, y + height / 2];
  });
  const sameRow = (a, b) => Math.abs(middle[a][1] - middle[b][1]) < 2;
  // Reading order: rows downward, each from left to right.
  const order = nodes.map((_, index) => index);
  order.sort((a, b) => (sameRow(a, b) ? middle[a][0] - middle[b][0] : middle[a][1] - middle[b][1]));

  // --- words ---

  const weightOf = (edge) =>
    edge.kind === "residual" ? "residual stream" : edge.kind === "attention" ? "attention" : signed(edge.weight);
  const isEnd = (node) => node.kind === "token" || node.kind === "answer";
  const nameOf = (node) => visible(node.label || (isEnd(node) ? "" : `${node.kind} ${node.channel}`));

  const MEANING = {
    token: "a token of the prompts",
    read: "what a sublayer reads from the residual stream",
    q: "a query channel of an attention head",
    k: "a key channel of an attention head",
    v: "a value channel of an attention head",
    head: "where an attention head looks from the last token, as its q and k decide; the share is that of its attention, without the sink, on held-out prompts",
    frozen: "all channels of its kind in this head, which the circuit has at their mean",
    neuron: "an MLP neuron",
    write: "what a sublayer adds to the residual stream",
    answer: "one of the two answers",
  };
  function whereOf(node) {
    if (isEnd(node)) return node.id.replace(":", " ");
    if (node.kind === "head" || node.kind === "frozen") return `head ${node.head}, layer ${node.layer}`;
    let part = node.head === null ? "" : `head ${node.head}, `;
    if (node.kind === "read" || node.kind === "write") part = node.id.includes(".mlp.") ? "MLP, " : "attention, ";
    return `${node.kind} ${node.channel}, ${part}layer ${node.layer}`;
  }

  nodes.forEach((node, index) => {
    const shape = shapes[index];
    const label = `${nameOf(node)}, ${whereOf(node)}, ${arriving[index].length} in, ${leaving[index].length} out`;
    const attributes = { "data-node": index, role: "button", "aria-pressed": "false", "aria-label": label, tabindex: index === order[0] ? 0 : -1 };
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  });
  circuit.edges.forEach((edge, index) => {
    const ends = `${nameOf(nodes[place.get(edge.source)])} → ${nameOf(nodes[place.get(edge.target)])}`;
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `${ends}  ${weightOf(edge)}`;
    lines[index].prepend(title);
  });

  // --- the panel ---

  function ends(title, links) {
    const box = element("div", {}, element("h3", {}, title));
    const sorted = [...links].sort(
      (a, b) => Math.abs(circuit.edges[b.index].weight) - Math.abs(circuit.edges[a.index].weight),
    );
    for (const { index, other } of sorted) {
      const edge = circuit.edges[index];
      const weighted = edge.kind !== "residual" && edge.kind !== "attention";
      const weight = element("span", { class: weighted ? `weight ${sign(edge.weight)}` : "weight" }, weightOf(edge));
      const button = element("button", { type: "button" }, element("span", {}, ...rich(nameOf(nodes[other]))), weight);
      button.addEventListener("click", () => go(other));
      box.append(button);
    }
    if (!sorted.length) box.append(element("p", { class: "none" }, "nothing"));
    return box;
  }

  // What an example or a snippet has for a node, token by token.
  const valuesOf = (trace, node) => (node.kind === "head" ? trace.attention : trace.activations)[node.id];
  const RUNS = [["model", "whole model"], ["circuit", "circuit alone"]];

  function examples(node, largest) {
    return circuit.examples.map((example) => {
      const box = element("div", { class: "example" }, element("p", { class: "note" }, example.note));
      for (const [run, name] of RUNS) {
        const { logit_difference: by } = example[run];
        const difference = element("span", by > 0 ? {} : { class: "wrong" }, signed(by));
        box.append(
          element(
            "p", { class: "answer-line" },
            `${name}: `, element("code", {}, visible(example.right)), " over ",
            element("code", {}, visible(example.wrong)), " by ", difference,
            by > 0 ? "" : element("span", { class: "wrong" }, ", which is wrong"),
          ),
        );
        const values = valuesOf(example[run], node);
        // Once is enough where there is nothing to colour.
        if (values || run === "model") box.append(tokens(example.tokens, values, largest));
      }
      return box;
    });
  }

  function scaleOf(node) {
    const own = circuit.examples.flatMap((example) => RUNS.map(([run]) => valuesOf(example[run], node) ?? []));
    const found = (circuit.snippets[node.id] ?? []).map((snippet) => snippet.activations);
    return [...own, ...found].flat().reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  }

  function list(title, texts) {
    if (!texts.length) return [];
    const line = element("p", { class: "list" });
    texts.forEach((text, at) => line.append(at ? "  " : "", element("code", {}, text)));
    return [element("h3", {}, title), line];
  }

  function fact(list, name, value) {
    list.append(element("dt", {}, name), element("dd", {}, value));
  }

  function describe(index) {
    const node = nodes[index];
    const largest = scaleOf(node);
    const whole = element("div", {}, element("h2", {}, ...rich(nameOf(node))));
    const where = whereOf(node);
    whole.append(element("p", { class: "where" }, pinned === index ? `${where} · kept here` : where));
    const facts = element("dl", {});
    fact(facts, "kind", `${node.kind}: ${MEANING[node.kind]}`);
    if (!isEnd(node)) {
      fact(facts, node.kind === "head" || node.kind === "frozen" ? "id" : "hook point", node.id);
      if (node.kind !== "head" && node.kind !== "frozen") fact(facts, "mean", signed(node.mean));
      if (node.score !== null) fact(facts, "score of its name", `${node.score.toFixed(2)} balanced accuracy on held-out text`);
      if (node.importance !== null) fact(facts, "importance", `${signed(node.importance)} loss without it`);
    }
    if (largest) fact(facts, "strongest", `${signed(largest).slice(1)}, the darkest colour below`);
    whole.append(facts);
    whole.append(
      element("div", { class: "ends" }, ends(`reads (${arriving[index].length})`, arriving[index]),
        ends(`read by (${leaving[index].length})`, leaving[index])),
    );
    whole.append(
      ...list("Written by the embedding of", node.sources.map(([text, weight]) => `${visible(text)} ${signed(weight)}`)),
      ...list("Raises the logits of", node.promotes.map(visible)),
      ...list("Lowers the logits of", node.suppresses.map(visible)),
    );
    if (circuit.examples.length) {
      const title = node.kind === "head" ? "Where it looks from the last token" : "Its activations on held-out prompts";
      whole.append(element("h3", {}, isEnd(node) || node.kind === "frozen" ? "Held-out prompts" : title));
      whole.append(...examples(node, largest));
    }
    const snippets = circuit.snippets[node.id] ?? [];
    if (snippets.length) whole.append(element("h3", {}, "Where it is most active in the corpus"));
    for (const { tokens: texts, at, activations } of snippets) {
      const line = element("p", { class: "answer-line" }, signed(activations[at] ?? 0), " at ", element("code", {}, visible(texts[at] ?? "")));
      whole.append(element("div", { class: "example" }, tokens(texts, activations, largest, at), line));
    }
    byId("details").replaceChildren(whole);
  }

  // --- what is looked at ---

  let active = null; // pointed at or focused
  let pinned = null;
  let current = null; // in the panel
  let kept = null; // `pinned` when the panel was written

  function light() {
    const shown = pinned ?? active;
    for (const lit of picture.querySelectorAll(".lit")) lit.classList.remove("lit");
    picture.classList.toggle("looking", shown !== null);
    if (shown === null) return;
    shapes[shown].classList.add("lit");
    for (const { index, other } of [...arriving[shown], ...leaving[shown]]) {
      shapes[other].classList.add("lit");
      lines[index].classList.add("lit");
    }
  }

  function update() {
    light();
    const shown = pinned ?? active ?? current;
    if (shown === current && pinned === kept) return;
    shapes.forEach((shape, index) => shape.setAttribute("aria-pressed", String(index === pinned)));
    if (current !== null) shapes[current].classList.remove("current");
    [current, kept] = [shown, pinned];
    shapes[current].classList.add("current");
    describe(current);
  }

  function look(index) {
    active = index;
    update();
  }

  function pin(index) {
    pinned = pinned === index ? null : index;
    update();
  }

  function go(index) {
    if (pinned !== null) pinned = index;
    shapes[index].focus();
    active = index;
    update();
  }

  const nodeAt = (target) => {
    const shape = target instanceof Element ? target.closest("[data-node]") : null;
    return shape ? Number(shape.dataset.node) : null;
  };
  const focused = () => nodeAt(document.activeElement);

  picture.addEventListener("pointerover", (event) => {
    const index = nodeAt(event.target);
    if (index !== null) look(index);
  });
  picture.addEventListener("pointerout", (event) => {
    if (nodeAt(event.target) !== null && nodeAt(event.relatedTarget) === null) look(focused());
  });
  // Not at the picture: an <svg> that listens for focus is a stop of Tab itself.
  scroller.addEventListener("focusin", (event) => {
    if (nodeAt(event.target) === null) return;
    for (const shape of shapes) shape.tabIndex = shape === event.target ? 0 : -1;
    look(nodeAt(event.target));
  });
  scroller.addEventListener("focusout", (event) => {
    if (nodeAt(event.relatedTarget) === null) look(null);
  });
  picture.addEventListener("click", (event) => {
    const index = nodeAt(event.target);
    if (index !== null) pin(index);
    else if (pinned !== null) pin(pinned);
  });

  // --- keys ---

  function beside(index, key) {
    const at = order.indexOf(index);
    if (key === "Home") return order[0];
    if (key === "End") return order.at(-1);
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const next = order[at + (key === "ArrowRight" ? 1 : -1)];
      return next !== undefined && sameRow(next, index) ? next : index;
    }
    // The nearest in the next row.
    const [x, y] = middle[index];
    const up = key === "ArrowUp" ? 1 : -1;
    const ahead = order.filter((other) => !sameRow(other, index) && up * (y - middle[other][1]) > 0);
    const closest = up > 0 ? ahead.at(-1) : ahead[0];
    const row = ahead.filter((other) => sameRow(other, closest));
    row.sort((a, b) => Math.abs(middle[a][0] - x) - Math.abs(middle[b][0] - x));
    return row[0] ?? index;
  }

  picture.addEventListener("keydown", (event) => {
    const index = focused();
    if (index === null || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") pin(index);
    else if (/^(Arrow|Home|End)/.test(event.key)) shapes[beside(index, event.key)].focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned !== null) pin(pinned);
  });

  // --- size and theme ---

  const [LEAST, MOST] = [0.8, 1.3]; // relative to the size that fits
  const { width: natural, height: tall } = picture.viewBox.baseVal;
  let scale = null; // null: what fits
  // As wide as there is room, but not so large that a picture leaves the screen which need not.
  const fitting = () => {
    const upright = Math.max(1, (innerHeight - 40) / tall);
    return Math.min(MOST, Math.max(LEAST, Math.min(upright, scroller.clientWidth / natural)));
  };
  function size() {
    picture.style.width = `${natural * (scale ?? fitting())}px`;
    picture.style.height = "auto";
  }
  function zoom(factor) {
    scale = factor === null ? null : Math.min(4, Math.max(0.2, (scale ?? fitting()) * factor));
    size();
  }
  byId("smaller").addEventListener("click", () => zoom(1 / 1.25));
  byId("larger").addEventListener("click", () => zoom(1.25));
  byId("fit").addEventListener("click", () => zoom(null));
  addEventListener("resize", size);
  size();

  // Text in a font that is wider than the one the boxes were made for is made narrower.
  for (const shape of shapes) {
    const room = shape.querySelector("path").getBBox().width - 8;
    for (const words of shape.querySelectorAll("text")) {
      if (words.getComputedTextLength() <= room) continue;
      words.setAttribute("textLength", room);
      words.setAttribute("lengthAdjust", "spacingAndGlyphs");
    }
  }

  setUpTheme();
})();
