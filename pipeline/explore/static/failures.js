// The accuracy of each class, and the rows that went wrong behind a number.

import { ask } from "./api.js";
import { announce, count, el, prose } from "./dom.js";
import { bestCaption, grid } from "./grid.js";

/** The accuracy of each class of a split; `open` shows the failures of one. */
export function classes(split, open) {
  const section = el(
    "section",
    { class: "panel by-class" },
    el("h2", {}, `Classes of ${split}`),
    el("p", { class: "waiting" }, "Classifying …"),
  );
  ask("/api/results/classes", { split }).then(
    (found) =>
      section.replaceChildren(
        el("h2", {}, `Classes of ${split}`),
        ...ofClasses(split, found, open),
      ),
    (error) => section.append(el("p", { class: "problem" }, prose(error.message))),
  );
  return section;
}

function ofClasses(split, found, open) {
  const name = `zero_shot ${split} top1`;
  const byName = [...found.classes];
  const hardest = [...found.classes].sort(
    (a, b) => a.right / a.images - b.right / b.images || b.images - a.images,
  );
  const list = el("ol", { class: "class-list" });
  const draw = (order) =>
    list.replaceChildren(
      ...order.map((each) =>
        classBar(each, () =>
          open({ name, label: each.name }, `${each.name}, taken for something else`),
        ),
      ),
    );
  draw(hardest);
  const sort = el(
    "button",
    {
      class: "link",
      type: "button",
      onclick: () => (
        (sort.textContent = sort.textContent === "by name" ? "hardest first" : "by name"),
        draw(sort.textContent === "by name" ? hardest : byName)
      ),
    },
    "by name",
  );
  return [
    el(
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
          found.mistakes.map((each) =>
            mistake(each, () =>
              open(
                { name, label: each.true, taken: each.predicted },
                `${each.true}, taken for ${each.predicted}`,
              ),
            ),
          ),
        ),
      ),
    ),
  ];
}

function classBar(each, onclick) {
  const part = each.right / each.images;
  return el(
    "li",
    {},
    el(
      "button",
      { class: "class-bar", type: "button", disabled: each.right === each.images, onclick },
      el("span", {}, each.name),
      el("span", { class: "bar", "--part": part, "aria-hidden": "true" }),
      el("span", { class: "number" }, `${each.right} of ${each.images}`),
    ),
  );
}

function mistake(each, onclick) {
  return el(
    "li",
    {},
    el(
      "button",
      { class: "class-bar", type: "button", onclick },
      el("span", {}, each.true, el("span", { class: "soft" }, " taken for "), each.predicted),
      el("span", { class: "number" }, `${each.count} of ${each.images}`),
    ),
  );
}

/** Show the rows that went wrong, some at a time. */
export async function failures(place, query, title) {
  place.replaceChildren(el("h2", {}, title), el("p", { class: "waiting" }, "Looking …"));
  place.focus({ preventScroll: true });
  const all = [];
  async function more(start) {
    const found = await ask("/api/results/failures", { ...query, start });
    all.push(
      ...found.rows.map((row) => ({
        ...row,
        note: row.taken
          ? el(
              "span",
              { class: "taken" },
              el("span", { class: "right" }, row.label),
              " taken for ",
              el("span", { class: "wrong" }, row.taken),
            )
          : undefined,
      })),
    );
    place.replaceChildren(
      el("h2", {}, title),
      el(
        "p",
        { class: "soft" },
        `${found.failed.toLocaleString("en")} of ${found.of.toLocaleString("en")} went wrong. `,
        "Open one to see what is near it.",
      ),
      grid(found.split, all, { captionOf: (row) => bestCaption(row) }),
      all.length < found.total
        ? el(
            "p",
            { class: "more" },
            el(
              "button",
              { class: "button", type: "button", onclick: () => more(all.length) },
              `More (${(found.total - all.length).toLocaleString("en")})`,
            ),
          )
        : "",
    );
    announce(`${found.failed} of ${found.of} went wrong.`);
  }
  try {
    await more(0);
    place.scrollIntoView({
      block: "start",
      behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
    });
  } catch (error) {
    place.replaceChildren(el("p", { class: "problem", role: "alert" }, prose(error.message)));
  }
}
