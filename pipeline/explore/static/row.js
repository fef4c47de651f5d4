// One row in a dialog: its picture, its words, what became of it, and what is near it.

import { ask, askBytes } from "./api.js";
import { announce, count, el, prose } from "./dom.js";
import { grid, photo } from "./grid.js";

const LONG = 160; // characters of a caption, from which on it is no heading to look at
const dialog = document.getElementById("row");
const inside = document.getElementById("row-content"); // the button beside it keeps the focus
document.getElementById("row-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside the content
});

/** Open a row; the focus goes back to where it was when it closes. */
export async function openRow(split, row) {
  inside.replaceChildren(el("h2", { id: "row-title" }, `Row ${row} of ${split}`));
  if (!dialog.open) dialog.showModal();
  try {
    const facts = await ask("/api/row", { split, row });
    inside.replaceChildren(...content(split, facts));
    dialog.scrollTop = 0;
    announce(`Row ${row} of ${split} is open.`);
    if (isEncoded(facts)) await near(split, row);
  } catch (error) {
    inside.append(el("p", { class: "problem", role: "alert" }, prose(error.message)));
  }
}

/** Whether the image of a row has features, by which it can be searched for. */
function isEncoded(facts) {
  return Object.entries(facts.columns).some(
    ([name, column]) => name.startsWith("image/") && column.status === "ok",
  );
}

function content(split, facts) {
  const captions = Object.entries(facts.captions);
  const longest = captions
    .map(([, words]) => words)
    .reduce((a, b) => (b.length > a.length ? b : a), "");
  return [
    el(
      "div",
      { class: "row-top" },
      el("div", { class: "row-picture" }, whole(split, facts.row, longest || facts.key)),
      el(
        "div",
        { class: "row-facts" },
        el(
          "p",
          { class: "eyebrow" },
          `${split} · row ${facts.row.toLocaleString("en")} of ${facts.rows.toLocaleString("en")}`,
        ),
        el(
          "h2",
          {
            id: "row-title",
            dir: "auto",
            ...(longest.length > LONG ? { class: "long", tabindex: "0" } : {}), // it may scroll
          },
          longest || facts.key,
        ),
        el(
          "dl",
          {},
          facts.label === null ? null : [el("dt", {}, "class"), el("dd", {}, facts.label)],
          captions
            .filter(([, words]) => words !== longest)
            .map(([field, words]) => [el("dt", {}, field), el("dd", { dir: "auto" }, words || "–")]),
          el("dt", {}, "key"),
          el("dd", {}, el("code", {}, facts.key)),
          Object.entries(facts.columns).map(([name, column]) => [
            el("dt", {}, name),
            el(
              "dd",
              {},
              el(
                "span",
                { class: column.status === "ok" ? "tag right" : "tag wrong" },
                column.status,
              ),
              column.status === "ok" ? ` length ${column.norm.toFixed(2)}` : "",
            ),
          ]),
        ),
        isEncoded(facts)
          ? el(
              "p",
              { class: "actions" },
              link(split, facts.row, "images", "Search by this image"),
              link(split, facts.row, "captions", "Find its captions"),
            )
          : null,
      ),
    ),
    el("section", { class: "near" }),
  ];
}

/** The picture, or in its place what the server says of why there is none. */
function whole(split, row, words) {
  const image = photo(split, row, words, 768);
  image.addEventListener("error", async () => {
    const place = dialog.querySelector(".row-picture .no-picture");
    const address = `/image/${encodeURIComponent(split)}/${row}`;
    await askBytes(address).catch((error) => place?.replaceChildren(error.message));
  });
  return image;
}

function link(split, row, among, words) {
  return el(
    "a",
    {
      class: "button",
      href: `#/search?${new URLSearchParams({ split, row, among })}`,
      onclick: () => dialog.close(),
    },
    words,
  );
}

async function near(split, row) {
  const place = dialog.querySelector(".near");
  try {
    const found = await ask("/api/similar", { split, row, top: 7 });
    const others = found.hits.filter((hit) => hit.row !== row).slice(0, 6);
    place.replaceChildren(
      el("h3", {}, `Nearest of ${count(found.searched, "image")}`),
      grid(split, others),
    );
  } catch (error) {
    place.replaceChildren(el("p", { class: "soft" }, prose(error.message)));
  }
}
