// Rows as a grid of pictures with captions and scores.

import { picture } from "./api.js";
import { el } from "./dom.js";
import { openRow } from "./row.js";

/** A list of cards; arrow keys go from card to card. */
export function grid(split, rows, { captionOf = bestCaption } = {}) {
  const list = el(
    "ol",
    { class: "grid", onkeydown: walk },
    rows.map((row, i) => card(split, row, i, captionOf(row))),
  );
  return list;
}

/** The picture of a row, or words where there is none. */
export function photo(split, row, words, side = 256) {
  const image = el("img", {
    src: picture(split, row, side),
    alt: words,
    loading: "lazy",
    decoding: "async",
  });
  image.addEventListener(
    "error",
    () => image.replaceWith(el("span", { class: "no-picture" }, "no picture")),
    { once: true },
  );
  return image;
}

/** The caption that was found, or else the most telling one: the longest. */
export function bestCaption(row) {
  if (row.field) return row.captions[row.field];
  return Object.values(row.captions).reduce(
    (best, each) => (each.length > best.length ? each : best),
    "",
  );
}

function card(split, row, place, caption) {
  const words = caption || row.key;
  const score =
    row.cosine === null || row.cosine === undefined
      ? null
      : el(
          "span",
          { class: "score" },
          el("span", {
            class: "bar",
            "--part": Math.max(0, Math.min(1, row.cosine)),
            "aria-hidden": "true",
          }),
          el("span", { class: "hidden" }, "cosine "),
          row.cosine.toFixed(3),
        );
  return el(
    "li",
    {},
    el(
      "button",
      { class: "card", type: "button", onclick: () => openRow(split, row.row) },
      el(
        "span",
        { class: "frame" },
        photo(split, row.row, ""),
        score ? el("span", { class: "rank", "aria-hidden": "true" }, String(place + 1)) : null,
      ),
      el("span", { class: "words", dir: "auto" }, words),
      el(
        "span",
        { class: "foot" },
        row.note ?? el("span", { class: "soft" }, row.label ?? row.key.split("/").at(-1)),
        score,
      ),
    ),
  );
}

function walk(event) {
  const cards = [...event.currentTarget.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (at < 0) return;
  const top = cards[0].getBoundingClientRect().top;
  const columns = cards.findIndex((each) => each.getBoundingClientRect().top > top + 4);
  const width = columns < 0 ? cards.length : columns;
  const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width };
  const next =
    event.key === "Home"
      ? 0
      : event.key === "End"
        ? cards.length - 1
        : at + (moves[event.key] ?? NaN);
  if (!(next in cards)) return;
  event.preventDefault();
  cards[next].focus();
}
