// The numbers of the evaluation, and the rows that went wrong behind each.

import { ask } from "./api.js";
import { el, heading, notYet, percent } from "./dom.js";
import { classes, failures } from "./failures.js";

const TITLES = [
  ["zero_shot", "Zero-shot classification", "The class of a picture, picked from all class names."],
  ["retrieval/", "Retrieval", "The right caption of an image, the right image of a caption."],
  [
    "compositional",
    "Composition",
    "Two images and two captions of the same words: which belongs to which.",
  ],
  [
    "knn/",
    "k-NN",
    "The class that the nearest rows vote for: by frozen features, or by embeddings of the head.",
  ],
  ["linear_probe", "Linear probe", "A linear classifier on frozen features."],
  ["segmentation", "Segmentation", "The class of every patch."],
  [
    "alignment/",
    "Alignment",
    "Whether images that are near each other have captions that are so, too.",
  ],
];

/** Show the view. */
export async function showResults(main, parameters, run) {
  if (!run.is_evaluated) {
    const words = "Scores, and the rows that went wrong behind each, are shown once it is.";
    const note = notYet("This run is not evaluated yet", words, `sail eval ${run.run_file}`);
    main.replaceChildren(heading("Results"), note);
    return;
  }
  const found = await ask("/api/results");
  const rows = el("section", {
    class: "failures",
    tabindex: "-1",
    "aria-label": "Rows that went wrong",
  });
  const open = (query, title) => failures(rows, query, title);
  main.replaceChildren(
    heading(
      "Results",
      "Bars are the score, whiskers its 95 % interval, the red line what guessing gives.",
    ),
    found.is_current
      ? ""
      : notYet(
          "The head has changed since",
          "These are the scores of an earlier one than there is now.",
          `sail eval ${run.run_file}`,
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
  const format = each.task.startsWith("alignment/") ? (value) => value.toFixed(3) : percent;
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, breakable(name), " ", el("span", {}, breakable(each.dataset))),
    el("td", { class: "number" }, el("b", {}, format(each.value)), interval(each.ci95, format)),
    el(
      "td",
      { class: "drawn" },
      meter(each),
      each.chance === null ? null : unseen(`guessing gives ${format(each.chance)}`),
    ),
    el("td", { class: "number soft" }, each.n.toLocaleString("en")),
    el("td", { class: "number" }, go),
  );
}

function unseen(words) {
  return el("span", { class: "hidden" }, words);
}

/** A name that may break at its slashes, where it is long. */
function breakable(name) {
  return name.replaceAll("/", "/\u200b").replaceAll("|", " | ");
}

function interval(ends, format) {
  if (!ends) return null;
  const [low, high] = ends.map((end) => format(end).replace("\u00a0%", ""));
  return el("span", { class: "interval" }, unseen("95 % interval "), `${low}–${high}`);
}

/** What was measured, in few words; the heading says the rest. */
function named(each) {
  const [task, part = ""] = each.task.split("/", 2);
  const metric = each.metric.replaceAll("_", " ");
  const detail = each.task.slice(task.length + 1).replaceAll("_", " ");
  if (task === "knn")
    return `${detail}, k\u00a0=\u00a0${each.protocol.k}${each.encoders.text === null ? `, ${each.encoders.image}` : ""}`;
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
