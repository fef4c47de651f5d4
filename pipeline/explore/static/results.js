// The numbers of the evaluation, and the rows that went wrong behind each.

import { ask } from "./api.js";
import { button, el, fill, heading, notYet, tableOf, unseen } from "./dom.js";
import { classes, failures } from "./failures.js";
import { clamp, grouped, percent } from "./numbers.js";

/** @import { Measure, Result } from "../answers.d.ts" */
/** @import { View } from "./address.js" */
/** @import { Open, Which } from "./failures.js" */

/** @type {View} */
export async function showResults(main, _parameters, run) {
  if (!run.is_evaluated) {
    const words = "Scores, and the rows that went wrong behind each, are shown once it is.";
    const note = notYet("This run is not evaluated yet", words, `sail eval ${run.run_file}`);
    fill(main, heading("Results"), note);
    return;
  }
  const found = await ask("/api/results");
  const rows = el("section", {
    class: "failures",
    tabindex: "-1",
    "aria-label": "Rows that went wrong",
  });
  const open = (/** @type {Which} */ which, /** @type {string} */ title) =>
    failures(rows, which, title);
  fill(
    main,
    heading(
      "Results",
      "Bars are the score, whiskers its 95 % interval, the red line what guessing gives.",
    ),
    found.is_current
      ? null
      : notYet(
          "The head has changed since",
          "These are the scores of an earlier one than there is now.",
          `sail eval ${run.run_file}`,
        ),
    el(
      "div",
      { class: "tables" },
      byMeasure(found.measures, found.results).map((group) => panel(group, open)),
    ),
    found.classified.map((split) => classes(split, open)),
    rows,
  );
}

/** @typedef {{ title: string, words: string, results: Result[] }} Group */

/** @param {Measure[]} measures @param {Result[]} results @returns {Group[]} */
function byMeasure(measures, results) {
  const others = { name: null, title: "Others", words: "" };
  return [...measures, others]
    .map((each) => ({ ...each, results: results.filter(({ measure }) => measure === each.name) }))
    .filter((group) => group.results.length);
}

/** @param {Group} group @param {Open} open */
function panel({ title, words, results }, open) {
  const details = results.filter((each) => each.is_detail);
  const shown = results.filter((each) => !each.is_detail);
  return el(
    "section",
    { class: "panel" },
    el("h2", {}, title),
    scores(words, shown, open),
    details.length
      ? el(
          "details",
          {},
          el("summary", {}, `Each class (${details.length})`),
          scores("", details, open),
        )
      : null,
  );
}

/** @param {string} caption @param {Result[]} results @param {Open} open */
function scores(caption, results, open) {
  return tableOf(
    [
      "measure",
      ["score", "number"],
      [unseen("drawn"), "drawn"],
      ["n", "number soft"],
      [unseen("failures"), "number"],
    ],
    results.map((each) => line(each, open)),
    { class: "scores", caption },
  );
}

/** The cells of a result. @param {Result} each @param {Open} open */
function line(each, open) {
  const name = each.label;
  const format = each.in_percent ? percent : (/** @type {number} */ value) => value.toFixed(3);
  const attributes = {
    class: "link",
    "aria-label": `Rows that went wrong: ${name}`,
    onclick: () => open({ name: each.name }, name),
  };
  return [
    [breakable(name), " ", el("span", {}, breakable(each.dataset))],
    [el("b", {}, format(each.value)), interval(each.ci95, format)],
    [meter(each), each.chance === null ? null : unseen(`guessing gives ${format(each.chance)}`)],
    grouped(each.n),
    each.has_rows && each.value < 1 ? button(attributes, "failures") : null,
  ];
}

/** A name that may break at its slashes, where it is long. @param {string} name */
function breakable(name) {
  return name.replaceAll("/", "/\u200b").replaceAll("|", " | ");
}

/** @param {Result["ci95"]} ends @param {(value: number) => string} format */
function interval(ends, format) {
  if (!ends) return null;
  const [low, high] = ends.map((end) => format(end).replace("\u00a0%", ""));
  return el("span", { class: "interval" }, unseen("95 % interval "), `${low}–${high}`);
}

/** @param {Result} each */
function meter({ value, ci95, chance }) {
  const [low, high] = ci95 ?? [value, value];
  const parts = { "--part": clamp(value), "--low": clamp(low), "--high": clamp(high) };
  return el(
    "span",
    { class: "meter", "aria-hidden": "true", ...parts },
    el("span", { class: "fill" }),
    ci95 ? el("span", { class: "whisker" }) : null,
    chance === null ? null : el("span", { class: "chance", "--at": clamp(chance) }),
  );
}
