// The accuracy of each class, and the rows that went wrong behind a number.

import { ask } from "./api.js";
import { announce, bar, button, el, fill, paged, problem, waiting } from "./dom.js";
import { grid } from "./grid.js";
import { count, grouped } from "./numbers.js";
import { openRow } from "./row.js";

/** @import { ClassAccuracy, Classes } from "../answers.d.ts" */
/** @import { Child } from "./dom.js" */
/** @typedef {{ name: string, label?: string, taken?: string }} Which Of a number, of a class. */
/** @typedef {(which: Which, title: string) => void} Open Shows failures. */

/**
 * The accuracy of each class of a split.
 *
 * @param {string} split
 * @param {Open} open
 */
export function classes(split, open) {
  const inside = el("div", {}, waiting("Classifying …"));
  ask("/api/results/classes", { split }).then(
    (found) => inside.replaceWith(ofClasses(found, open)),
    (error) => fill(inside, problem(error)),
  );
  return el("section", { class: "panel by-class" }, el("h2", {}, `Classes of ${split}`), inside);
}

/** @param {Classes} found @param {Open} open */
function ofClasses(found, open) {
  const { name } = found;
  const hardest = [...found.classes].sort(
    (a, b) => a.right / a.images - b.right / b.images || b.images - a.images,
  );
  const list = el("ol", { class: "class-list" });
  const draw = (/** @type {ClassAccuracy[]} */ order) =>
    fill(
      list,
      order.map((each) => {
        const title = `${each.name}, taken for something else`;
        return classBar(each, () => open({ name, label: each.name }, title));
      }),
    );
  draw(hardest);
  const sort = button({ class: "link", onclick: turn }, "by name");
  function turn() {
    const isByName = sort.textContent === "by name";
    sort.textContent = isByName ? "hardest first" : "by name";
    draw(isByName ? found.classes : hardest);
  }
  return el(
    "div",
    { class: "two" },
    el(
      "div",
      {},
      el(
        "p",
        { class: "soft small" },
        `${count(found.classes.length, "class", "classes")}, the hardest first; `,
        sort,
      ),
      el(
        "div",
        { class: "tall", tabindex: "0", role: "region", "aria-label": "Accuracy of each class" },
        list,
      ),
    ),
    el(
      "div",
      {},
      el("p", { class: "soft small" }, "The most frequent mistakes"),
      el(
        "ol",
        { class: "mistakes" },
        found.mistakes.map(({ true: label, predicted: taken, count, images }) =>
          line(
            { onclick: () => open({ name, label, taken }, `${label}, taken for ${taken}`) },
            el("span", {}, label, el("span", { class: "soft" }, " taken for "), taken),
            el("span", { class: "number" }, `${count} of ${images}`),
          ),
        ),
      ),
    ),
  );
}

/** @param {ClassAccuracy} each @param {() => void} onclick */
function classBar({ name, right, images }, onclick) {
  return line(
    { disabled: right === images, onclick },
    el("span", {}, name),
    bar(right / images),
    el("span", { class: "number" }, `${right} of ${images}`),
  );
}

/** @param {{ onclick: () => void, disabled?: boolean }} attributes @param {Child[]} children */
function line(attributes, ...children) {
  return el("li", {}, button({ class: "class-bar", ...attributes }, ...children));
}

/**
 * Show the rows that went wrong, some at a time.
 *
 * @param {HTMLElement} place
 * @param {Which} which
 * @param {string} title
 */
export async function failures(place, which, title) {
  const list = el("div", {}, waiting("Looking …"));
  fill(place, el("h2", {}, title), list);
  place.focus({ preventScroll: true });
  await paged(
    list,
    (start) => ask("/api/results/failures", { ...which, start }),
    (rows, { split, failed, of }) => {
      announce(`${failed} of ${of} went wrong.`);
      return [
        el(
          "p",
          { class: "soft" },
          `${grouped(failed)} of ${grouped(of)} went wrong. `,
          "Open one to see what is near it.",
        ),
        grid(split, rows, openRow),
      ];
    },
  );
  place.scrollIntoView({
    block: "start",
    behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
  });
}
