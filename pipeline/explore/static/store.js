// How a store is: columns, what is quarantined, lengths, and rows that nearly repeat.

import { ask } from "./api.js";
import { histogram } from "./chart.js";
import { choice, count, el, heading, noStore, prose } from "./dom.js";
import { photo } from "./grid.js";
import { openRow } from "./row.js";

/** Show the view. */
export async function showStore(main, parameters, run) {
  const splits = Object.keys(run.splits);
  if (!splits.length) {
    main.replaceChildren(heading("Store"), noStore(run));
    return;
  }
  const split = splits.includes(parameters.get("split")) ? parameters.get("split") : splits[0];
  const facts = await ask("/api/store", { split });
  const pick = choice(
    "split",
    splits,
    split,
    (name) => (location.hash = `#/store?${new URLSearchParams({ split: name })}`),
  );
  const images = facts.columns.filter((column) => column.name.startsWith("image/"));
  main.replaceChildren(
    heading("Store", summary(facts), pick),
    el(
      "div",
      { class: "columns" },
      facts.columns.map((column) => panel(split, facts.rows, column)),
    ),
    images.length
      ? alike(
          split,
          images.map((column) => column.name),
        )
      : "",
  );
}

function summary(facts) {
  const parts = [
    count(facts.rows, "row"),
    `${count(facts.fields.length, "caption field")} (${facts.fields.join(", ")})`,
  ];
  if (facts.classes) parts.push(count(facts.classes, "class", "classes"));
  parts.push(`${facts.rows_per_chunk.toLocaleString("en")} rows a chunk`);
  return parts.join(" · ");
}

function panel(split, rows, column) {
  const bad = Object.entries(column.status).filter(([name]) => name !== "ok");
  const ok = column.status.ok ?? 0;
  const quarantined = bad
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
      el("span", { class: "tag right" }, `${ok.toLocaleString("en")} ok`),
      bad
        .map(([name, number]) => [
          " ",
          el(
            "span",
            { class: name === "pending" ? "tag" : "tag wrong" },
            `${number.toLocaleString("en")} ${name}`,
          ),
        ])
        .flat(),
    ),
    column.lengths
      ? histogram(`length of ${count(column.looked_at, "vector")}`, column.lengths)
      : null,
    quarantined ? quarantine(split, column.name, quarantined) : null,
  );
}

function quarantine(split, column, number) {
  const list = el("div", {});
  const details = el(
    "details",
    { ontoggle: () => details.open && !list.childElementCount && more(0) },
    el("summary", {}, `Show the ${count(number, "quarantined row")}`),
    list,
  );
  async function more(start) {
    const found = await ask("/api/store/quarantine", { split, column, start });
    list.querySelector("button.more")?.remove();
    if (!start) {
      list.replaceChildren(
        el(
          "div",
          { class: "scroll" },
          el(
            "table",
            {},
            el(
              "thead",
              {},
              el(
                "tr",
                {},
                ["row", "reason", "key"].map((name) => el("th", { scope: "col" }, name)),
              ),
            ),
            el("tbody", {}),
          ),
        ),
      );
    }
    list
      .querySelector("tbody")
      .append(
        ...found.rows.map((each) =>
          el(
            "tr",
            {},
            el(
              "td",
              {},
              el(
                "button",
                { class: "link", type: "button", onclick: () => openRow(split, each.row) },
                each.row.toLocaleString("en"),
              ),
            ),
            el("td", {}, each.reason),
            el("td", {}, el("code", {}, each.key)),
          ),
        ),
      );
    const next = start + found.rows.length;
    if (next < found.total)
      list.append(
        el(
          "button",
          { class: "button more", type: "button", onclick: () => more(next) },
          `More (${found.total - next})`,
        ),
      );
  }
  return details;
}

function alike(split, columns) {
  const pairs = el("div", {}, el("p", { class: "waiting" }, "Comparing …"));
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
  async function compare(column) {
    try {
      const found = await ask("/api/store/duplicates", { split, column });
      pairs.replaceChildren(
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
      pairs.replaceChildren(el("p", { class: "problem" }, prose(error.message)));
    }
  }
  compare(columns[0]);
  return section;
}

function two(split, pair) {
  return el(
    "li",
    { class: "pair" },
    pair.rows.map((row) =>
      el(
        "button",
        {
          class: "frame",
          type: "button",
          "aria-label": `Open row ${row}`,
          onclick: () => openRow(split, row),
        },
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
