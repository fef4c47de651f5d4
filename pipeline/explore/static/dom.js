// Makes elements. Text is always set as text, never as markup: captions come from anywhere.

import { grouped } from "./numbers.js";

/** @import { Run } from "../answers.d.ts" */
/** @typedef {Node | string | null | undefined | Child[]} Child What is null is left out. */
/** @typedef {GlobalEventHandlersEventMap} Events */
/** @typedef {{ [Key in keyof Events as `on${Key}`]?: (event: Events[Key]) => void }} Handlers */
/** @typedef {string | number | boolean | null | undefined | object} Value A function, if an object. */
/**
 * Handlers of events, attributes, and properties of the style by `--name`; what is null or false is
 * left out.
 *
 * @typedef {Handlers & { [name: string]: Value }} Attributes
 */

/**
 * Make an element: `el("a", { href: "#", class: "x", onclick: f }, "words", child)`.
 *
 * @template {keyof HTMLElementTagNameMap} Name
 * @param {Name} name
 * @param {Attributes} [attributes]
 * @param {Child[]} children
 */
export function el(name, attributes = {}, ...children) {
  return made(document.createElement(name), attributes, children);
}

/**
 * The same for SVG.
 *
 * @template {keyof SVGElementTagNameMap} Name
 * @param {Name} name
 * @param {Attributes} [attributes]
 * @param {Child[]} children
 */
export function svg(name, attributes = {}, ...children) {
  return made(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

/**
 * @template {HTMLElement | SVGElement} Made
 * @param {Made} node
 * @param {Attributes} attributes
 * @param {Child[]} children
 */
function made(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function")
      node.addEventListener(key.slice(2), /** @type {EventListener} */ (value));
    else if (key.startsWith("--")) node.style.setProperty(key, String(value));
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...flat(children));
  return node;
}

/**
 * Put children in the place of those that an element has.
 *
 * @param {Element} place
 * @param {Child[]} children
 */
export function fill(place, ...children) {
  place.replaceChildren(...flat(children));
}

/** @param {Child} child @returns {(Node | string)[]} */
function flat(child) {
  if (Array.isArray(child)) return child.flatMap(flat);
  return child === null || child === undefined ? [] : [child];
}

/** An element of index.html. @param {string} id */
export function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

/** Say something to those who hear the page instead of seeing it. @param {string | null} words */
export function announce(words) {
  byId("status").textContent = words;
}

/** What is only heard. @param {Child} words */
export function unseen(words) {
  return el("span", { class: "hidden" }, words);
}

/** A button that submits nothing. @param {Attributes} attributes @param {Child[]} children */
export function button(attributes, ...children) {
  return el("button", { type: "button", ...attributes }, ...children);
}

/** A part of a whole, drawn beside the number that says it. @param {number} part */
export function bar(part) {
  return el("span", { class: "bar", "--part": part, "aria-hidden": "true" });
}

/**
 * A table, which scrolls where it is too wide. The first cell of a row is the row's heading.
 *
 * @param {(string | [words: Child, kind: string])[]} headings of the columns; kind is the class of
 *   all cells of one
 * @param {Child[][]} rows
 * @param {{ class?: string, caption?: string }} [options]
 */
export function tableOf(headings, rows, { caption, ...attributes } = {}) {
  const columns = headings.map((each) => (typeof each === "string" ? [each] : each));
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      attributes,
      caption ? el("caption", {}, caption) : null,
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          columns.map(([words, kind]) => el("th", { scope: "col", class: kind }, words)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((cells) =>
          el(
            "tr",
            {},
            cells.map((cell, i) =>
              i
                ? el("td", { class: columns[i][1] }, cell)
                : el("th", { scope: "row", class: columns[i][1] }, cell),
            ),
          ),
        ),
      ),
    ),
  );
}

/**
 * Fill a place with what the server lists some at a time, and a button for more.
 *
 * @template Item
 * @template {{ total: number, rows: Item[] }} Part
 * @param {Element} place
 * @param {(start: number) => Promise<Part>} load
 * @param {(all: Part["rows"], last: Part) => Child} draw
 */
export async function paged(place, load, draw) {
  /** @type {Part["rows"]} */
  const all = [];
  async function more() {
    try {
      const part = await load(all.length);
      all.push(...part.rows);
      const left = part.total - all.length;
      const next = button({ class: "button", onclick: more }, `More (${grouped(left)})`);
      fill(place, draw(all, part), left > 0 ? el("p", { class: "more" }, next) : null);
    } catch (error) {
      if (all.length) place.append(problem(error));
      else fill(place, problem(error));
    }
  }
  await more();
}

/**
 * A choice of one among few, as buttons: real radio buttons, so that arrow keys work.
 *
 * @param {string} legend
 * @param {string} name
 * @param {[value: string, words: string][]} options
 * @param {string} chosen
 * @param {(value: string) => void} onchange
 */
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

/**
 * A labelled list to choose from; null where there is no choice.
 *
 * @param {string} label
 * @param {string[]} options
 * @param {string} chosen
 * @param {(value: string) => void} onchange
 */
export function choice(label, options, chosen, onchange) {
  if (options.length < 2) return null;
  const list = el(
    "select",
    {
      id: `choose-${label}`,
      onchange: () => {
        onchange(list.value);
      },
    },
    options.map((value) => el("option", { value, selected: value === chosen }, value)),
  );
  return el("label", { class: "choice" }, el("span", {}, label), list);
}

/**
 * The top of a view.
 *
 * @param {string} title
 * @param {Child} [words] what is shown
 * @param {Child[]} choices
 */
export function heading(title, words, ...choices) {
  return el(
    "div",
    { class: "head" },
    el("div", {}, el("h1", {}, title), words ? el("p", {}, words) : null),
    ...choices,
  );
}

/** @param {string} words */
export function waiting(words) {
  return el("p", { class: "waiting" }, words);
}

/** What went wrong, in the words of the server. @param {unknown} error @param {string} [title] */
export function problem(error, title) {
  const words = prose(messageOf(error));
  if (!title) return el("p", { class: "problem", role: "alert" }, words);
  return el("div", { class: "problem", role: "alert" }, el("h1", {}, title), el("p", {}, words));
}

/** @param {unknown} error */
export function messageOf(error) {
  return error instanceof Error ? error.message : String(error);
}

/** A message as nodes: what stands in backticks is code. @param {string} text */
export function prose(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

/**
 * What is not there yet, which is no error, and the command that makes it.
 *
 * @param {string} title
 * @param {string} words
 * @param {string} command
 */
export function notYet(title, words, command) {
  return el(
    "div",
    { class: "note" },
    el("h2", {}, title),
    el("p", {}, words),
    el("p", {}, "Type in a terminal: ", el("code", {}, command)),
  );
}

/** The same where there is no store yet, so that no view has anything to show. @param {Run} run */
export function noStore(run) {
  return notYet(
    "Nothing is encoded yet",
    "The run has no store of images and captions.",
    `sail extract ${run.run_file}`,
  );
}

/** The same where there is no trained head yet, so no space to search in. @param {Run} run */
export function noHead(run) {
  return notYet(
    "There is no trained head yet",
    "It brings images and words into one space, which search and map need. Follow it under Training.",
    `sail align ${run.run_file}`,
  );
}
