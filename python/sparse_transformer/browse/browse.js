// What moves in the page of a model; common.js stands before it.
(() => {
  const content = JSON.parse(byId("content").textContent);
  const { places, texts, names, context, before, shape: [perNode, width] } = content;
  const HEAD = ".attn.head";
  const [SHOWN, FOUND] = [14, 60]; // neighbours at first, results of a search

  function unpack(name, Type) {
    const text = atob(content[name]);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    return new Type(bytes.buffer);
  }
  const corpus = unpack("corpus", Int32Array);
  const [scores, means, active, largest, weights] = ["scores", "means", "active", "largest", "weight"].map(
    (name) => unpack(name, Float32Array),
  );
  const [peaks, sources, targets] = ["peaks", "source", "target"].map((name) => unpack(name, Int32Array));
  const snippets = unpack("snippets", Int8Array);
  const patterns = unpack("patterns", Uint8Array);

  // --- nodes and edges ---

  const first = new Map(); // of a place, its first node
  const placeOf = [];
  for (const place of places) {
    first.set(place[0], placeOf.length);
    for (let at = 0; at < place[2]; at++) placeOf.push(place);
  }
  const total = placeOf.length;
  const hook = (node) => placeOf[node][0];
  const kind = (node) => placeOf[node][1];
  const channel = (node) => node - first.get(hook(node));
  const layer = (node) => (kind(node) === "residual" ? null : Number(hook(node).split(".")[0]));
  const idOf = (node) => `${hook(node)}:${channel(node)}`;
  function nodeOf(id) {
    const [place, number] = id.split(":");
    const node = first.get(place) + Number(number);
    return /^\d+$/.test(number) && placeOf[node]?.[0] === place ? node : undefined;
  }

  // By node, where its edges stand in `order`.
  function index(ends) {
    const starts = new Uint32Array(total + 1);
    for (const end of ends) starts[end + 1]++;
    for (let node = 0; node < total; node++) starts[node + 1] += starts[node];
    const [next, order] = [starts.slice(), new Uint32Array(ends.length)];
    ends.forEach((end, edge) => (order[next[end]++] = edge));
    return (node) => order.subarray(starts[node], starts[node + 1]);
  }
  const arriving = index(targets);
  const leaving = index(sources);

  const inOrder = places.filter(([, of]) => of === "read" || of === "write");
  // Channels of the residual stream have one number everywhere; others that are read are positions.
  const streamWidth = places.at(-1)[2];
  const isPosition = (node) => kind(node) === "read" && channel(node) >= streamWidth;
  function stream(node, of, later) {
    const number = channel(node);
    if (isPosition(node)) return [];
    const here = inOrder.indexOf(placeOf[node]);
    const along = inOrder.filter((place, at) => place[1] === of && (here < 0 || at > here === later));
    const found = along.map(([place]) => first.get(place) + number);
    if (here >= 0) found.push(first.get(places.at(-1)[0]) + number);
    return found.map((other) => ({ other, flow: "residual" }));
  }
  const headOf = (node) => first.get(layer(node) + HEAD) + Math.floor(channel(node) / content.dHead);
  const attended = (node, kinds) =>
    Array.from(kinds, (of) => {
      const start = first.get(`${layer(node)}.attn.${of}`) + channel(node) * content.dHead;
      return Array.from({ length: content.dHead }, (_, at) => ({ other: start + at, flow: "attention" }));
    })
      .flat()
      .sort((a, b) => scores[b.other] - scores[a.other]);

  const byWeight = (edges, ends) =>
    Array.from(edges, (edge) => ({ other: ends[edge], weight: weights[edge] })).sort(
      (a, b) => Math.abs(b.weight) - Math.abs(a.weight),
    );
  function writers(node) {
    const found = byWeight(arriving(node), sources);
    if (kind(node) === "read" || kind(node) === "residual") found.push(...stream(node, "write", false));
    if (kind(node) === "head") found.push(...attended(node, "qk"));
    if (kind(node) === "v") found.push({ other: headOf(node), flow: "attention" });
    return found;
  }
  function readers(node) {
    const found = byWeight(leaving(node), targets);
    if (kind(node) === "write" || kind(node) === "residual") found.push(...stream(node, "read", true));
    if (kind(node) === "head") found.push(...attended(node, "v"));
    if (kind(node) === "q" || kind(node) === "k") found.push({ other: headOf(node), flow: "attention" });
    return found;
  }

  // --- words ---

  const MEANING = {
    read: "what a sublayer reads from the residual stream",
    q: "a query channel of an attention head",
    k: "a key channel of an attention head",
    v: "a value channel of an attention head, which moves what the head looks at",
    head: "an attention head: its q and k decide where it looks, its v what it moves",
    neuron: "an MLP neuron",
    write: "what a sublayer adds to the residual stream",
    residual: "a direction of the residual stream, which sublayers write to and read from",
  };
  const meaning = (node) => (isPosition(node) ? "a channel that says where a token stands, beside the residual stream" : MEANING[kind(node)]);
  function whereOf(node) {
    if (kind(node) === "residual") return `residual direction ${channel(node)}`;
    let part = "";
    if (kind(node).length === 1) part = `head ${Math.floor(channel(node) / content.dHead)}, `;
    if (kind(node) === "read" || kind(node) === "write") part = hook(node).includes(".mlp.") ? "MLP, " : "attention, ";
    const name = isPosition(node) ? `position channel ${channel(node) - streamWidth}` : `${kind(node)} ${channel(node)}`;
    return `${name}, ${part}layer ${layer(node)}`;
  }
  const nameOf = (node) => names[node] || whereOf(node);

  function button(node, right = "") {
    const name = element("span", {}, ...rich(nameOf(node)));
    if (names[node]) name.append(element("small", {}, whereOf(node)));
    const made = element("button", { type: "button", class: "node", "data-node": node }, name, right);
    return made;
  }
  function list(title, items) {
    if (!items.length) return [];
    const chips = element("p", { class: "chips" });
    for (const [token, weight] of items)
      chips.append(element("span", {}, element("code", {}, visible(texts[token])), " ", element("span", { class: sign(weight) }, signed(weight))));
    return [element("h3", {}, title), chips];
  }

  // --- one node ---

  let current;
  let side = null; // the list that was followed: its next node gets the focus

  function fill(box, title, links) {
    const flow = (link) =>
      link.flow
        ? element("span", { class: "flow" }, link.flow)
        : element("span", { class: `weight ${sign(link.weight)}` }, signed(link.weight));
    const show = (count) => {
      const shown = links.slice(0, count).map((link) => button(link.other, flow(link)));
      box.replaceChildren(element("h3", {}, `${title} (${links.length})`), ...shown);
      if (!links.length) box.append(element("p", { class: "none" }, "nothing"));
      if (count >= links.length) return;
      const rest = element("button", { type: "button" }, `All ${links.length}`);
      rest.addEventListener("click", () => {
        show(links.length);
        box.querySelectorAll(".node")[count].focus();
        draw();
      });
      box.append(rest);
    };
    box.links = links;
    show(SHOWN);
  }

  function describe(node) {
    const of = kind(node);
    const card = byId("node");
    const steps = element("div", { class: "steps" });
    for (const [by, sign] of [[-1, "‹"], [1, "›"]]) {
      const step = element("button", { type: "button", "aria-label": by < 0 ? "Previous in this place" : "Next in this place" }, sign);
      step.disabled = placeOf[node + by] !== placeOf[node];
      step.addEventListener("click", () => go(node + by));
      steps.append(step);
    }
    const facts = element("dl", {});
    const fact = (name, value) => facts.append(element("dt", {}, name), element("dd", {}, value));
    fact("kind", meaning(node));
    fact(of === "head" ? "id" : "hook point", idOf(node));
    if (scores[node]) fact("score of its label", `${scores[node].toFixed(2)} balanced accuracy on held-out text`);
    if (of === "head") fact("to the sink", `${(100 * means[node]).toFixed(0)}% of its attention`);
    else {
      fact("mean", signed(means[node]));
      fact("not zero", `at ${(100 * active[node]).toFixed(active[node] < 0.1 ? 1 : 0)}% of the tokens`);
      fact("strongest", largest[node] ? signed(largest[node]).slice(1) : "never active");
    }
    card.replaceChildren(steps, element("h2", { tabindex: -1 }, ...rich(nameOf(node))), element("p", { class: "where" }, whereOf(node)), facts);
    const number = channel(node);
    if ((of === "read" || of === "residual") && number < streamWidth) card.append(...list("Tokens whose embedding writes it", content.embedded[number]));
    if (of === "write" || of === "residual")
      card.append(...list("Raises the logits of", content.raised[number]), ...list("Lowers the logits of", content.lowered[number]));
    paint = () => {};
    byId("more").replaceChildren(...(of === "head" ? attention(node) : passages(node)));
    paint();
  }

  function passages(node) {
    const found = [];
    for (let at = node * perNode; at < (node + 1) * perNode; at++) {
      if (peaks[at] < 0) continue;
      const row = peaks[at] - (peaks[at] % context);
      const start = Math.max(row, peaks[at] - before);
      const end = Math.min(row + context, peaks[at] - before + width);
      const value = (place) => (snippets[at * width + place - peaks[at] + before] / 127) * largest[node];
      const strip = Array.from({ length: end - start }, (_, place) => start + place);
      found.push(element("div", { class: "example" }, tokens(strip.map((place) => texts[corpus[place]]), strip.map(value), largest[node], peaks[at] - start)));
    }
    if (!found.length) return [];
    const title = kind(node) === "residual" ? "Where it is largest after the last layer" : "Where it is most active in the corpus";
    return [element("h2", {}, title), ...found];
  }

  // --- attention on the example ---

  let paint; // the square, in the colour of the theme
  function attention(node) {
    const length = content.example.length;
    const base = ((node - first.get(places.find(([, of]) => of === "head")[0])) * length * (length + 1)) / 2;
    const share = (query, key) => (key <= query ? patterns[base + (query * (query + 1)) / 2 + key] / 255 : 0);
    const canvas = element("canvas", { width: length, height: length, "aria-hidden": "true" });
    const strip = element("div", { id: "example", class: "tokens", tabindex: 0, role: "group" });
    const said = element("p", { class: "answer-line", role: "status" });
    let query = length - 1;
    function look(at) {
      query = Math.min(length - 1, Math.max(0, at));
      const shares = content.example.map((_, key) => share(query, key));
      const lit = tokens(content.example.map((token) => texts[token]), shares, Math.max(...shares), query);
      strip.replaceChildren(...lit.childNodes);
      const sum = shares.reduce((a, b) => a + b, 0);
      const top = shares.indexOf(Math.max(...shares));
      said.replaceChildren("from ", element("code", {}, visible(texts[content.example[query]])), ` (token ${query}) `,
        `${(100 * shares[top]).toFixed(0)}% goes to `, element("code", {}, visible(texts[content.example[top]])),
        ` (token ${top}), ${(100 * Math.max(0, 1 - sum)).toFixed(0)}% to the sink`);
      paint();
    }
    paint = () => {
      const pen = canvas.getContext("2d");
      pen.clearRect(0, 0, length, length);
      pen.fillStyle = getComputedStyle(canvas).color;
      for (let from = 0; from < length; from++)
        for (let to = 0; to <= from; to++) {
          pen.globalAlpha = Math.sqrt(share(from, to)); // so that little is seen too
          pen.fillRect(to, from, 1, 1);
        }
    };
    const pointed = (event) => look(Math.floor((event.offsetY / canvas.clientHeight) * length));
    canvas.addEventListener("pointermove", pointed);
    canvas.addEventListener("pointerdown", pointed);
    strip.addEventListener("click", (event) => {
      const at = [...strip.children].indexOf(event.target);
      if (at >= 0) look(at);
    });
    strip.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -length, End: length }[event.key];
      if (!by) return;
      look(query + by);
      event.preventDefault();
      event.stopPropagation();
    });
    strip.setAttribute("aria-label", "The example; arrow keys change the token that looks");
    look(query);
    return [
      element("h2", {}, "Where it looks on an example"),
      element("p", { class: "facts" }, "Choose the token that looks: in the text, or a row of the square, whose columns are what it looks at."),
      canvas, element("div", {}, strip, said),
    ];
  }

  // --- lines from the lists to the node ---

  function draw() {
    const lines = byId("lines");
    if (getComputedStyle(lines).display === "none") return;
    const [frame, card] = [byId("trace"), byId("node")].map((box) => box.getBoundingClientRect());
    const made = [];
    for (const [box, right] of [[byId("writers"), false], [byId("readers"), true]]) {
      const most = Math.max(...box.links.map(({ weight }) => Math.abs(weight ?? 0)), 1e-9);
      box.querySelectorAll(".node").forEach((item, at) => {
        const rect = item.getBoundingClientRect();
        const { weight } = box.links[at];
        const x = (right ? rect.left : rect.right) - frame.left;
        const y = rect.top + rect.height / 2 - frame.top;
        const end = (right ? card.right : card.left) - frame.left;
        const middle = Math.min(card.bottom - 16, Math.max(card.top + 16, rect.top + rect.height / 2)) - frame.top;
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
        path.setAttribute("d", `M${x} ${y}C${(x + end) / 2} ${y} ${(x + end) / 2} ${middle} ${end} ${middle}`);
        path.setAttribute("stroke-width", weight === undefined ? 1 : 0.75 + (4 * Math.abs(weight)) / most);
        if (weight !== undefined) path.setAttribute("class", sign(weight));
        made.push(path);
      });
    }
    lines.replaceChildren(...made);
  }

  // --- going from node to node; the hash is where one is ---

  function show() {
    const asked = location.hash.slice(1);
    const node = asked ? nodeOf(asked) : start();
    if (node === undefined) {
      byId("search").value = asked;
      search();
      if (current !== undefined) return;
    }
    current = node ?? start();
    fill(byId("writers"), "Written by", writers(current));
    fill(byId("readers"), "Read by", readers(current));
    describe(current);
    draw();
    document.title = `${idOf(current)} · ${document.querySelector("h1").textContent}`;
    if (!side) return;
    const next = byId(side).querySelector(".node") ?? byId("node").querySelector("h2");
    next.focus({ preventScroll: innerWidth > 900 });
    if (innerWidth <= 900) byId("node").scrollIntoView();
    side = null;
  }
  // The neuron with the best label.
  function start() {
    let best = 0;
    for (let node = 0; node < total; node++)
      if (kind(node) === "neuron" && (kind(best) !== "neuron" || scores[node] > scores[best])) best = node;
    return best;
  }
  function go(node, from = null) {
    side = from;
    close();
    if (location.hash.slice(1) === idOf(node)) show();
    else location.hash = idOf(node);
  }

  document.addEventListener("click", (event) => {
    const item = event.target instanceof Element ? event.target.closest(".node") : null;
    if (item) go(Number(item.dataset.node), item.closest(".side")?.id ?? "readers");
    else if (!(event.target instanceof Element && event.target.closest("search"))) close();
  });

  // --- search ---

  let haystack = null;
  function search() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    haystack ??= placeOf.map((_, node) => `${idOf(node)} ${whereOf(node)} ${names[node]}`.toLowerCase());
    const found = [];
    for (let node = 0; node < total; node++)
      if (words.every((word) => haystack[node].includes(word))) found.push(node);
    // The node that was named, then by how good labels are.
    const exact = (node) => words.length && (idOf(node) === words[0] || whereOf(node).startsWith(`${words.join(" ")},`));
    found.sort((a, b) => exact(b) - exact(a) || scores[b] - scores[a] || a - b);
    byId("results").replaceChildren(
      element("p", { class: "facts" }, found.length ? `${found.length.toLocaleString("en")} nodes${found.length > FOUND ? `, of which ${FOUND} are here` : ""}` : "no such node"),
      ...found.slice(0, FOUND).map((node) => button(node)),
    );
    byId("results").hidden = false;
  }
  const close = () => (byId("results").hidden = true);
  byId("search").addEventListener("input", search);
  byId("search").addEventListener("focus", search);

  // --- keys ---

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const at = document.activeElement;
    const typing = at === byId("search");
    const box = at.closest(".side, #results") ?? (typing ? byId("results") : null);
    const items = box ? [...box.querySelectorAll(".node")] : [];
    let next = null;
    if (event.key === "Escape") {
      close();
      if (typing) next = byId("node").querySelector("h2");
    } else if (event.key === "ArrowDown") next = items[items.indexOf(at) + 1];
    else if (event.key === "ArrowUp") next = items[items.indexOf(at) - 1] ?? (box === byId("results") ? byId("search") : null);
    else if (typing) next = event.key === "Enter" ? (items[0]?.click(), null) : null;
    else if (event.key === "/") next = byId("search");
    else if (event.key === "ArrowLeft" || event.key === "ArrowRight")
      next = byId(event.key === "ArrowLeft" ? "writers" : "readers").querySelector(".node");
    else if (event.key === "[" || event.key === "]") {
      const other = current + (event.key === "[" ? -1 : 1);
      if (placeOf[other] === placeOf[current]) go(other);
    }
    if (!next) return;
    next.focus();
    event.preventDefault();
  });

  addEventListener("hashchange", show);
  addEventListener("resize", draw);
  show();
  setUpTheme(() => paint());
})();
