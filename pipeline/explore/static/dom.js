// Makes elements. Text is always set as text, never as markup: captions come from anywhere.

/** Make an element: `el("a", { href: "#", class: "x", onclick: f }, "words", child)`. */
export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** The same for SVG. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

/** Say something to those who hear the page instead of seeing it. */
export function announce(words) {
  document.getElementById("status").textContent = words;
}

/** A choice of one among few, as buttons: real radio buttons, so that arrow keys work. */
export function segments(legend, name, options, chosen, onchange) {
  return el(
    "fieldset",
    { class: "segments" },
    el("legend", { class: "hidden" }, legend),
    options.map(([value, words]) =>
      el(
        "label",
        {},
        el("input", {
          type: "radio",
          id: `${name}-${value}`,
          name,
          value,
          checked: value === chosen,
          onchange: () => onchange(value),
        }),
        el("span", {}, words),
      ),
    ),
  );
}

/** A labelled list to choose from; nothing where there is no choice. */
export function choice(label, options, chosen, onchange) {
  if (options.length < 2) return null;
  const list = el(
    "select",
    { id: `choose-${label}`, onchange: () => onchange(list.value) },
    options.map((value) => el("option", { value, selected: value === chosen }, value)),
  );
  return el("label", { class: "choice" }, el("span", {}, label), list);
}

/** The top of a view: its name, what is shown, and what can be chosen. */
export function heading(title, words, ...choices) {
  return el(
    "div",
    { class: "head" },
    el("div", {}, el("h1", {}, title), words ? el("p", {}, words) : null),
    ...choices,
  );
}

/** What is not there yet, which is no error, and the command that makes it. */
export function notYet(title, words, command) {
  return el(
    "div",
    { class: "note" },
    el("h2", {}, title),
    el("p", {}, words),
    el("p", {}, "Type in a terminal: ", el("code", {}, command)),
  );
}

/** The same where there is no store yet, so that no view has anything to show. */
export function noStore(run) {
  return notYet(
    "Nothing is encoded yet",
    "The run has no store of images and captions.",
    `sail extract ${run.run_file}`,
  );
}

/** The same where there is no trained head yet, so that images and words share no space. */
export function noHead(run) {
  return notYet(
    "There is no trained head yet",
    "It brings images and words into one space, which search and map need. Follow it under Training.",
    `sail align ${run.run_file}`,
  );
}

/** A message of the server as nodes: what stands in backticks is code. */
export function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

export function percent(value, digits = 1) {
  return `${(100 * value).toFixed(digits)}\u00a0%`;
}

export function count(value, one, many = `${one}s`) {
  return `${value.toLocaleString("en")} ${value === 1 ? one : many}`;
}
