// The numbers of the evaluation, and the rows that went wrong behind each.

import { ask } from "./api.js";
import { announce, count, el, percent, prose } from "./dom.js";
import { bestCaption, grid } from "./grid.js";

const TITLES = [
  ["zero_shot", "Zero-shot classification", "The class of a picture, picked from all class names."],
  ["retrieval/", "Retrieval", "The right caption of an image, the right image of a caption."],
  ["compositional", "Composition", "Two images and two captions of the same words: which belongs to which."],
  ["knn/", "k-NN", "The class by the nearest frozen features: no text, no training."],
  ["linear_probe", "Linear probe", "A linear classifier on frozen features."],
  ["segmentation", "Segmentation", "The class of every patch."],
  ["alignment/", "Alignment of the encoders", "How alike image and text features are; no head is used."],
];

/** Show the view. */
export async function showResults(main) {
  const found = await ask("/api/results");
  const rows = el("section", { class: "failures", "aria-live": "polite", tabindex: "-1", "aria-label": "Rows that went wrong" });
  const open = (query, title) => failures(rows, query, title);
  main.replaceChildren(
    el("div", { class: "head" }, el("div", {}, el("h1", {}, "Results"), el("p", {}, "Bars are the score, whiskers its 95 % interval, the red line what guessing gives."))),
    found.is_current ? "" : el("p", { class: "problem" }, "These are of an earlier head than there is now. Run `sail eval` for new ones."),
    el("div", { class: "tables" }, grouped(found.results).map((group) => table(group, open))),
    ...found.classified.map((split) => classes(split, open)),
    rows,
  );
}

function grouped(results) {
  const groups = TITLES.map(([task, title, words]) => ({ title, words, results: results.filter((each) => each.task === task || (task.endsWith("/") && each.task.startsWith(task)) || each.task.startsWith(`${task}/`)) }));
  const known = new Set(groups.flatMap((group) => group.results));
  groups.push({ title: "Others", words: "", results: results.filter((each) => !known.has(each)) });
  return groups.filter((group) => group.results.length);
}

function table({ title, words, results }, open) {
  return el(
    "section",
    { class: "panel" },
    el("h2", {}, title),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "scores" },
        el("caption", {}, words),
        el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "measure"), el("th", { scope: "col", class: "number" }, "score"), el("th", { scope: "col" }, el("span", { class: "hidden" }, "drawn")), el("th", { scope: "col", class: "number" }, "n"), el("th", { scope: "col" }, el("span", { class: "hidden" }, "rows")))),
        el("tbody", {}, results.map((each) => line(each, open))),
      ),
    ),
  );
}

function line(each, open) {
  const name = named(each);
  const interval = each.ci95 ? `${percent(each.ci95[0])} to ${percent(each.ci95[1])}` : "";
  const go = each.has_rows && each.value < 1 ? el("button", { class: "link", type: "button", "aria-label": `Rows that went wrong: ${name}`, onclick: () => open({ name: each.name }, name) }, "failures") : null;
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, name, el("span", { class: "soft" }, ` ${each.dataset}`)),
    el("td", { class: "number" }, el("b", {}, each.value < 0 ? each.value.toFixed(3) : percent(each.value))),
    el("td", { class: "drawn" }, meter(each), el("span", { class: "hidden" }, interval ? `95 % interval ${interval}` : "")),
    el("td", { class: "number soft" }, each.n.toLocaleString("en")),
    el("td", { class: "number" }, go),
  );
}

/** What was measured, in few words; the heading says the rest. */
function named(each) {
  const [task, part = ""] = each.task.split("/", 2);
  const metric = each.metric.replaceAll("_", " ");
  const detail = each.task.slice(task.length + 1).replaceAll("_", " ");
  if (task === "knn") return `${detail}, k = ${each.protocol.k}${each.encoders.text === null ? `, ${each.encoders.image}` : ""}`;
  if (task === "retrieval") return `${part === "image_to_text" ? "image → text" : "text → image"}, ${metric}`;
  return detail && task !== "zero_shot" ? `${metric}, ${detail}` : metric;
}

function meter(each) {
  const parts = { "--part": clamp(each.value), "--low": clamp(each.ci95?.[0] ?? each.value), "--high": clamp(each.ci95?.[1] ?? each.value) };
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

function classes(split, open) {
  const section = el("section", { class: "panel by-class" }, el("h2", {}, `Classes of ${split}`), el("p", { class: "waiting" }, "Classifying …"));
  ask("/api/results/classes", { split }).then(
    (found) => section.replaceChildren(el("h2", {}, `Classes of ${split}`), ...ofClasses(split, found, open)),
    (error) => section.append(el("p", { class: "problem" }, prose(error.message))),
  );
  return section;
}

function ofClasses(split, found, open) {
  const name = `zero_shot ${split} top1`;
  const byName = [...found.classes];
  const hardest = [...found.classes].sort((a, b) => a.right / a.images - b.right / b.images || b.images - a.images);
  const list = el("ol", { class: "class-list" });
  const draw = (order) => list.replaceChildren(...order.map((each) => classBar(each, () => open({ name, label: each.name }, `${each.name}, taken for something else`))));
  draw(hardest);
  const sort = el("button", { class: "link", type: "button", onclick: () => ((sort.textContent = sort.textContent === "by name" ? "hardest first" : "by name"), draw(sort.textContent === "by name" ? hardest : byName)) }, "by name");
  return [
    el("div", { class: "two" },
      el("div", {}, el("p", { class: "soft small" }, `${count(found.classes.length, "class", "classes")}, the hardest first; `, sort), el("div", { class: "tall", tabindex: "0", role: "region", "aria-label": "Accuracy of each class" }, list)),
      el("div", {}, el("p", { class: "soft small" }, "The most frequent mistakes"), el("ol", { class: "mistakes" }, found.mistakes.map((each) => mistake(each, () => open({ name, label: each.true, taken: each.predicted }, `${each.true}, taken for ${each.predicted}`))))),
    ),
  ];
}

function classBar(each, onclick) {
  const part = each.right / each.images;
  return el(
    "li",
    {},
    el("button", { class: "class-bar", type: "button", disabled: each.right === each.images, onclick }, el("span", {}, each.name), el("span", { class: "bar", "--part": part, "aria-hidden": "true" }), el("span", { class: "number" }, `${each.right} of ${each.images}`)),
  );
}

function mistake(each, onclick) {
  return el("li", {}, el("button", { class: "class-bar", type: "button", onclick }, el("span", {}, each.true, el("span", { class: "soft" }, " taken for "), each.predicted), el("span", { class: "number" }, `${each.count} of ${each.images}`)));
}

async function failures(place, query, title) {
  place.replaceChildren(el("h2", {}, title), el("p", { class: "waiting" }, "Looking …"));
  place.focus({ preventScroll: true });
  const all = [];
  async function more(start) {
    const found = await ask("/api/results/failures", { ...query, start });
    all.push(...found.rows.map((row) => ({ ...row, note: row.taken ? el("span", { class: "taken" }, el("span", { class: "right" }, row.label), " taken for ", el("span", { class: "wrong" }, row.taken)) : undefined })));
    place.replaceChildren(
      el("h2", {}, title),
      el("p", { class: "soft" }, `${found.failed.toLocaleString("en")} of ${found.of.toLocaleString("en")} went wrong. Open one to see what is near it.`),
      grid(found.split, all, { captionOf: (row) => bestCaption(row) }),
      all.length < found.total ? el("p", { class: "more" }, el("button", { class: "button", type: "button", onclick: () => more(all.length) }, `More (${(found.total - all.length).toLocaleString("en")})`)) : "",
    );
    announce(`${found.failed} of ${found.of} went wrong.`);
  }
  try {
    await more(0);
    place.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  } catch (error) {
    place.replaceChildren(el("p", { class: "problem", role: "alert" }, prose(error.message)));
  }
}
