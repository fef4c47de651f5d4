// Rows as a grid of pictures with captions and scores.

import { picture } from "./api.js";
import { bar, button, el, unseen } from "./dom.js";
import { clamp } from "./numbers.js";

/** @import { Hit, Row } from "../answers.d.ts" */
/** @typedef {Row & Partial<Hit> & { taken?: string | null }} Card */
/** @typedef {(split: string, row: number) => void} Open What opens a row. */

/**
 * A list of cards; arrow keys go from card to card.
 *
 * @param {string} split
 * @param {Card[]} rows
 * @param {Open} open
 */
export function grid(split, rows, open) {
  return el(
    "ol",
    { class: "grid", onkeydown: walk },
    rows.map((row, i) => el("li", {}, card(split, row, i, open))),
  );
}

/**
 * The picture of a row, or words where there is none.
 *
 * @param {string} split
 * @param {number} row
 * @param {string} words
 * @param {96 | 256 | 768} [side]
 */
export function photo(split, row, words, side) {
  const image = el("img", {
    src: picture(split, row, side),
    alt: words,
    loading: "lazy",
    decoding: "async",
  });
  const instead = el("span", { class: "no-picture" }, "no picture");
  image.addEventListener("error", () => image.replaceWith(instead), { once: true });
  return image;
}

/** The caption that was found, or else the most telling one: the longest. @param {Card} row */
export function bestCaption(row) {
  return row.field ? row.captions[row.field] : longest(Object.values(row.captions));
}

/** @param {string[]} texts */
export function longest(texts) {
  return texts.reduce((best, each) => (each.length > best.length ? each : best), "");
}

/** @param {string} split @param {Card} row @param {number} place @param {Open} open */
function card(split, row, place, open) {
  return button(
    { class: "card", onclick: () => open(split, row.row) },
    el(
      "span",
      { class: "frame" },
      photo(split, row.row, ""),
      row.cosine !== undefined
        ? el("span", { class: "rank", "aria-hidden": "true" }, String(place + 1))
        : null,
    ),
    el("span", { class: "words", dir: "auto" }, bestCaption(row) || row.key),
    el(
      "span",
      { class: "foot" },
      row.taken
        ? el(
            "span",
            { class: "taken" },
            el("span", { class: "right" }, row.label),
            " taken for ",
            el("span", { class: "wrong" }, row.taken),
          )
        : el("span", { class: "soft" }, row.label ?? row.key.split("/").at(-1)),
      row.cosine === undefined ? null : score(row.cosine),
    ),
  );
}

/** @param {number} cosine */
function score(cosine) {
  return el("span", { class: "score" }, bar(clamp(cosine)), unseen("cosine "), cosine.toFixed(3));
}

/** @param {KeyboardEvent} event */
function walk(event) {
  const list = /** @type {HTMLElement} */ (event.currentTarget);
  const cards = /** @type {HTMLElement[]} */ ([...list.querySelectorAll(".card")]);
  const at = cards.findIndex((each) => each === document.activeElement);
  if (at < 0) return;
  const top = cards[0].getBoundingClientRect().top;
  const columns = cards.findIndex((each) => each.getBoundingClientRect().top > top + 4);
  const width = columns < 0 ? cards.length : columns;
  /** @type {{ [key: string]: number }} */
  const places = {
    ArrowRight: at + 1,
    ArrowLeft: at - 1,
    ArrowDown: at + width,
    ArrowUp: at - width,
    Home: 0,
    End: cards.length - 1,
  };
  const next = cards[places[event.key]];
  if (!next) return;
  event.preventDefault();
  next.focus();
}
