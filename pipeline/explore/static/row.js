// One row in a dialog: its picture, its words, what became of it, and what is near it.

import { address } from "./address.js";
import { ask, askBytes } from "./api.js";
import { announce, byId, el, fill, messageOf, problem, prose } from "./dom.js";
import { grid, longest, photo } from "./grid.js";
import { count, grouped } from "./numbers.js";

/** @import { RowFacts } from "../answers.d.ts" */
/** @import { Child } from "./dom.js" */

const LONG = 160; // characters of a caption, from which on it is no heading to look at
const dialog = /** @type {HTMLDialogElement} */ (byId("row"));
const inside = byId("row-content"); // the button beside it keeps the focus
byId("row-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside the content
});

/**
 * Open a row; the focus goes back to where it was when it closes.
 *
 * @param {string} split
 * @param {number} row
 */
export async function openRow(split, row) {
  fill(inside, el("h2", { id: "row-title" }, `Row ${row} of ${split}`));
  if (!dialog.open) dialog.showModal();
  try {
    const facts = await ask("/api/row", { split, row });
    const nearby = el("section", { class: "near" });
    fill(inside, content(split, facts), nearby);
    dialog.scrollTop = 0;
    announce(`Row ${row} of ${split} is open.`);
    if (isEncoded(facts)) await near(nearby, split, row);
  } catch (error) {
    inside.append(problem(error));
  }
}

/** Whether the image has features, by which it can be searched for. @param {RowFacts} facts */
function isEncoded(facts) {
  return Object.entries(facts.columns).some(
    ([name, column]) => name.startsWith("image/") && column.status === "ok",
  );
}

/** @param {string} split @param {RowFacts} facts */
function content(split, facts) {
  const title = longest(Object.values(facts.captions));
  const others = Object.entries(facts.captions).filter(([, words]) => words !== title);
  return el(
    "div",
    { class: "row-top" },
    el("div", { class: "row-picture" }, whole(split, facts.row, title || facts.key)),
    el(
      "div",
      { class: "row-facts" },
      el(
        "p",
        { class: "eyebrow" },
        `${split} · row ${grouped(facts.row)} of ${grouped(facts.rows)}`,
      ),
      el(
        "h2",
        {
          id: "row-title",
          dir: "auto",
          ...(title.length > LONG ? { class: "long", tabindex: "0" } : {}), // it may scroll
        },
        title || facts.key,
      ),
      el(
        "dl",
        {},
        facts.label === null ? null : fact("class", facts.label),
        others.map(([field, words]) => fact(field, words || "–", { dir: "auto" })),
        fact("key", el("code", {}, facts.key)),
        Object.entries(facts.columns).map(([name, { status, norm }]) => {
          const isOk = status === "ok";
          const tag = el("span", { class: isOk ? "tag right" : "tag wrong" }, status);
          return fact(name, [tag, isOk ? ` length ${norm.toFixed(2)}` : ""]);
        }),
      ),
      isEncoded(facts)
        ? el(
            "p",
            { class: "actions" },
            searchBy(split, facts.row, "images", "Search by this image"),
            searchBy(split, facts.row, "captions", "Find its captions"),
          )
        : null,
    ),
  );
}

/** @param {string} name @param {Child} words @param {{ dir?: string }} [attributes] */
function fact(name, words, attributes) {
  return [el("dt", {}, name), el("dd", attributes, words)];
}

/**
 * The picture, or in its place what the server says of why there is none.
 *
 * @param {string} split
 * @param {number} row
 * @param {string} words
 */
function whole(split, row, words) {
  const image = photo(split, row, words, 768);
  image.addEventListener("error", async () => {
    const place = dialog.querySelector(".row-picture .no-picture");
    await askBytes(`/image/${encodeURIComponent(split)}/${row}`).catch((error) =>
      place?.replaceChildren(messageOf(error)),
    );
  });
  return image;
}

/** @param {string} split @param {number} row @param {string} among @param {string} words */
function searchBy(split, row, among, words) {
  const href = address("search", { split, row, among });
  return el("a", { class: "button", href, onclick: () => dialog.close() }, words);
}

/** @param {Element} place @param {string} split @param {number} row */
async function near(place, split, row) {
  try {
    const found = await ask("/api/similar", { split, row, top: 7 });
    const others = found.hits.filter((hit) => hit.row !== row).slice(0, 6);
    fill(
      place,
      el("h3", {}, `Nearest of ${count(found.searched, "image")}`),
      grid(split, others, openRow),
    );
  } catch (error) {
    fill(place, el("p", { class: "soft" }, prose(messageOf(error))));
  }
}
