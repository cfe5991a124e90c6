"use strict";
// What the pages of a circuit and of a whole model share. Texts become text nodes, never markup.

const byId = (id) => document.getElementById(id);

// The same as `visible` in words.py.
function visible(text) {
  if (!text) return "∅";
  const inner = text.replace(/^ +| +$/g, "");
  const start = text.length - text.replace(/^ +/, "").length;
  const signs = Array.from(inner, (char) => {
    if (char === "\n") return "⏎";
    if (char === "\t") return "⇥";
    if (char !== " " && /[\p{C}\p{Z}]/u.test(char))
      return "\\u" + char.codePointAt(0).toString(16).padStart(4, "0");
    return char;
  });
  return "·".repeat(start) + signs.join("") + "·".repeat(text.length - start - inner.length);
}

function signed(value) {
  const size = Math.abs(value);
  const usual = size === 0 || (size >= 0.005 && size < 1000);
  return (value < 0 ? "−" : "+") + (usual ? size.toFixed(2) : size.toExponential(0));
}

const sign = (value) => (value < 0 ? "negative" : "positive");

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// What stands between two backquotes is code.
const rich = (text) =>
  text.split(/`([^`]+)`/).map((part, at) => (at % 2 ? element("code", {}, part) : part));

// Tokens, each in the colour of its activation.
function tokens(texts, activations, largest, peak = -1) {
  const strip = element("div", { class: "tokens" });
  texts.forEach((text, at) => {
    const span = element("span", {}, visible(text));
    const value = activations?.[at];
    if (value !== undefined) {
      span.title = `${visible(text)}  ${signed(value)}`;
      span.className = sign(value);
      span.style.setProperty("--share", largest ? Math.abs(value) / largest : 0);
    }
    if (at === peak) span.classList.add("peak");
    strip.append(span);
    // Where a line ended it ends here too.
    if (text.endsWith("\n")) strip.append("\n");
  });
  return strip;
}

// The button changes the theme, which is the reader's at first.
function setUpTheme(changed = () => {}) {
  const root = document.documentElement;
  const theme = byId("theme");
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    changed();
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  nameTheme();
}
