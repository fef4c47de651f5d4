// The numbers of the evaluation, and the rows that went wrong behind each.

import { ask } from "./api.js";
import { el, percent } from "./dom.js";
import { classes, failures } from "./failures.js";

const TITLES = [
  ["zero_shot", "Zero-shot classification", "The class of a picture, picked from all class names."],
  ["retrieval/", "Retrieval", "The right caption of an image, the right image of a caption."],
  [
    "compositional",
    "Composition",
    "Two images and two captions of the same words: which belongs to which.",
  ],
  ["knn/", "k-NN", "The class by the nearest frozen features: no text, no training."],
  ["linear_probe", "Linear probe", "A linear classifier on frozen features."],
  ["segmentation", "Segmentation", "The class of every patch."],
  [
    "alignment/",
    "Alignment of the encoders",
    "How alike image and text features are; no head is used.",
  ],
];

/** Show the view. */
export async function showResults(main) {
  const found = await ask("/api/results");
  const rows = el("section", {
    class: "failures",
    "aria-live": "polite",
    tabindex: "-1",
    "aria-label": "Rows that went wrong",
  });
  const open = (query, title) => failures(rows, query, title);
  main.replaceChildren(
    el(
      "div",
      { class: "head" },
      el(
        "div",
        {},
        el("h1", {}, "Results"),
        el(
          "p",
          {},
          "Bars are the score, whiskers its 95 % interval, the red line what guessing gives.",
        ),
      ),
    ),
    found.is_current
      ? ""
      : el(
          "p",
          { class: "problem" },
          "These are of an earlier head than there is now. Run `sail eval` for new ones.",
        ),
    el(
      "div",
      { class: "tables" },
      grouped(found.results).map((group) => table(group, open)),
    ),
    ...found.classified.map((split) => classes(split, open)),
    rows,
  );
}

function grouped(results) {
  const groups = TITLES.map(([task, title, words]) => ({
    title,
    words,
    results: results.filter(
      (each) =>
        each.task === task ||
        (task.endsWith("/") && each.task.startsWith(task)) ||
        each.task.startsWith(`${task}/`),
    ),
  }));
  const known = new Set(groups.flatMap((group) => group.results));
  groups.push({ title: "Others", words: "", results: results.filter((each) => !known.has(each)) });
  return groups.filter((group) => group.results.length);
}

function table({ title, words, results }, open) {
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

function scores(words, results, open) {
  const heading = (attributes, ...content) => el("th", { scope: "col", ...attributes }, ...content);
  const unseen = (text) => el("span", { class: "hidden" }, text);
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      { class: "scores" },
      words ? el("caption", {}, words) : null,
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          heading({}, "measure"),
          heading({ class: "number" }, "score"),
          heading({}, unseen("drawn")),
          heading({ class: "number" }, "n"),
          heading({}, unseen("failures")),
        ),
      ),
      el(
        "tbody",
        {},
        results.map((each) => line(each, open)),
      ),
    ),
  );
}

function line(each, open) {
  const name = named(each);
  const interval = each.ci95 ? `${percent(each.ci95[0])} to ${percent(each.ci95[1])}` : "";
  const go =
    each.has_rows && each.value < 1
      ? el(
          "button",
          {
            class: "link",
            type: "button",
            "aria-label": `Rows that went wrong: ${name}`,
            onclick: () => open({ name: each.name }, name),
          },
          "failures",
        )
      : null;
  const dataset = each.dataset.replaceAll("/", "/\u200b"); // a long one may break there
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, name, el("span", { class: "soft" }, ` ${dataset}`)),
    el(
      "td",
      { class: "number" },
      el("b", {}, each.value < 0 ? each.value.toFixed(3) : percent(each.value)),
    ),
    el(
      "td",
      { class: "drawn" },
      meter(each),
      el("span", { class: "hidden" }, interval ? `95 % interval ${interval}` : ""),
    ),
    el("td", { class: "number soft" }, each.n.toLocaleString("en")),
    el("td", { class: "number" }, go),
  );
}

/** What was measured, in few words; the heading says the rest. */
function named(each) {
  const [task, part = ""] = each.task.split("/", 2);
  const metric = each.metric.replaceAll("_", " ");
  const detail = each.task.slice(task.length + 1).replaceAll("_", " ");
  if (task === "knn")
    return `${detail}, k = ${each.protocol.k}${each.encoders.text === null ? `, ${each.encoders.image}` : ""}`;
  if (task === "retrieval")
    return `${part === "image_to_text" ? "image → text" : "text → image"}, ${metric}`;
  return detail && task !== "zero_shot" ? `${metric}, ${detail}` : metric;
}

function meter(each) {
  const parts = {
    "--part": clamp(each.value),
    "--low": clamp(each.ci95?.[0] ?? each.value),
    "--high": clamp(each.ci95?.[1] ?? each.value),
  };
  return el(
    "span",
    { class: "meter", "aria-hidden": "true", ...parts },
    el("span", { class: "fill" }),
    each.ci95 ? el("span", { class: "whisker" }) : null,
    each.chance === null ? null : el("span", { class: "chance", "--at": clamp(each.chance) }),
  );
}

function clamp(value) {
  return Math.max(0, Math.min(1, value));
}
