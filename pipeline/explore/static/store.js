// How a store is: columns, what is quarantined, lengths, and rows that nearly repeat.

import { splitChoice, splitOf } from "./address.js";
import { ask } from "./api.js";
import { histogram } from "./chart.js";
import {
  button,
  choice,
  el,
  fill,
  heading,
  noStore,
  paged,
  problem,
  tableOf,
  waiting,
} from "./dom.js";
import { photo } from "./grid.js";
import { count, grouped } from "./numbers.js";
import { openRow } from "./row.js";

/** @import { ColumnFacts, Pair, StoreFacts } from "../answers.d.ts" */
/** @import { View } from "./address.js" */

/** @type {View} */
export async function showStore(main, parameters, run) {
  const split = splitOf(run, parameters);
  if (!split) {
    fill(main, heading("Store"), noStore(run));
    return;
  }
  const facts = await ask("/api/store", { split });
  const names = facts.columns.map((column) => column.name);
  const images = names.filter((name) => name.startsWith("image/"));
  fill(
    main,
    heading("Store", summary(facts), splitChoice("store", run, split)),
    el(
      "div",
      { class: "columns" },
      facts.columns.map((column) => panel(split, facts.rows, column)),
    ),
    images.length ? alike(split, images) : null,
  );
}

/** @param {StoreFacts} facts */
function summary(facts) {
  const parts = [
    count(facts.rows, "row"),
    `${count(facts.fields.length, "caption field")} (${facts.fields.join(", ")})`,
  ];
  if (facts.classes) parts.push(count(facts.classes, "class", "classes"));
  parts.push(`${grouped(facts.rows_per_chunk)} rows a chunk`);
  return parts.join(" · ");
}

/** @param {string} split @param {number} rows @param {ColumnFacts} column */
function panel(split, rows, column) {
  const { ok = 0, ...bad } = column.status;
  const quarantined = Object.entries(bad)
    .filter(([name]) => name !== "pending")
    .reduce((sum, [, number]) => sum + number, 0);
  return el(
    "section",
    { class: "panel", "aria-label": column.name },
    el("h2", {}, column.name),
    el(
      "p",
      { class: "soft small" },
      [column.model, column.pooling, `${column.dim} × ${column.dtype}`, column.licence]
        .filter(Boolean)
        .join(" · "),
    ),
    el(
      "div",
      { class: "status-bar", "aria-hidden": "true" },
      el("span", { class: "ok", "--part": ok / rows }),
      el("span", { class: "bad", "--part": quarantined / rows }),
    ),
    el(
      "p",
      { class: "statuses" },
      el("span", { class: "tag right" }, `${grouped(ok)} ok`),
      Object.entries(bad).map(([name, number]) => [
        " ",
        el(
          "span",
          { class: name === "pending" ? "tag" : "tag wrong" },
          `${grouped(number)} ${name}`,
        ),
      ]),
    ),
    column.lengths
      ? histogram(`length of ${count(column.looked_at, "vector")}`, column.lengths)
      : null,
    quarantined ? quarantine(split, column.name, quarantined) : null,
  );
}

/** @param {string} split @param {string} column @param {number} number */
function quarantine(split, column, number) {
  const list = el("div");
  const load = (/** @type {number} */ start) =>
    ask("/api/store/quarantine", { split, column, start });
  const opened = () =>
    paged(list, load, (rows) =>
      tableOf(
        ["row", "reason", "key"],
        rows.map(({ row, reason, key }) => [
          button({ class: "link", onclick: () => openRow(split, row) }, grouped(row)),
          reason,
          el("code", {}, key),
        ]),
      ),
    );
  const details = el(
    "details",
    {
      ontoggle: () => {
        if (details.open && !list.childElementCount) opened();
      },
    },
    el("summary", {}, `Show the ${count(number, "quarantined row")}`),
    list,
  );
  return details;
}

/** @param {string} split @param {string[]} columns */
function alike(split, columns) {
  const pairs = el("div", {}, waiting("Comparing …"));
  const section = el(
    "section",
    { class: "alike" },
    el(
      "div",
      { class: "head" },
      el("h2", {}, "Images that nearly repeat"),
      choice("by", columns, columns[0], compare),
    ),
    pairs,
  );
  /** @param {string} column */
  async function compare(column) {
    try {
      const found = await ask("/api/store/duplicates", { split, column });
      fill(
        pairs,
        el(
          "p",
          { class: "soft" },
          `${count(found.compared, "row")} compared by ${column}: `,
          `${count(found.same, "pair")} above a cosine of ${found.cosine}. The most alike:`,
        ),
        el(
          "ol",
          { class: "pairs" },
          found.pairs.map((pair) => two(split, pair)),
        ),
      );
    } catch (error) {
      fill(pairs, problem(error));
    }
  }
  compare(columns[0]);
  return section;
}

/** @param {string} split @param {Pair} pair */
function two(split, pair) {
  return el(
    "li",
    { class: "pair" },
    pair.rows.map((row) =>
      button(
        { class: "frame", "aria-label": `Open row ${row}`, onclick: () => openRow(split, row) },
        photo(split, row, ""),
      ),
    ),
    el(
      "span",
      { class: "foot" },
      el("span", { class: "soft" }, `rows ${pair.rows.join(" and ")}`),
      pair.cosine.toFixed(4),
    ),
  );
}
