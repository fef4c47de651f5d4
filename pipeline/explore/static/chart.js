// Charts as SVG: lines over steps, and bars of a histogram. Colours come from the style sheet.

import { el, svg } from "./dom.js";

const HEIGHT = 230;
const LEFT = 52;
const BOTTOM = 28;
const TOP = 12;
const RIGHT = 14;

/**
 * Draw curves over one axis of steps.
 * curves: [{ name, step: [..], value: [..] }]; format: of a value; mark: a step to point at.
 */
export function lineChart(title, curves, { format = short, mark = null, log = false } = {}) {
  const width = window.innerWidth < 720 ? 340 : 560; // so that the words keep their size
  const drawn = curves.filter((curve) => curve.value.some(Number.isFinite));
  const values = drawn.flatMap((curve) => curve.value).filter(Number.isFinite);
  if (!values.length) return el("p", { class: "soft" }, "Nothing yet.");
  const steps = drawn.flatMap((curve) => curve.step);
  const x = scale(Math.min(...steps), Math.max(...steps), LEFT, width - RIGHT);
  const useLog = log && Math.min(...values) > 0;
  const y = scale(...padded(values, useLog), HEIGHT - BOTTOM, TOP, useLog);
  const picture = svg(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${width} ${HEIGHT}`,
      role: "img",
      "aria-label": described(title, drawn, format),
    },
    y
      .ticks(4)
      .map((value) => [
        svg("line", {
          class: "grid-line",
          x1: LEFT,
          x2: width - RIGHT,
          y1: y(value),
          y2: y(value),
        }),
        svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
      ])
      .flat(),
    svg("text", { x: LEFT - 8, y: HEIGHT - 8, "text-anchor": "end" }, "step"),
    x
      .ticks(5)
      .filter((value) => x(value) > LEFT + 20) // beside the word
      .map((value) =>
        svg("text", { x: x(value), y: HEIGHT - 8, "text-anchor": "middle" }, short(value)),
      ),
    mark === null
      ? []
      : svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: TOP, y2: HEIGHT - BOTTOM }),
    drawn.map((curve, i) => svg("path", { class: `curve c${i}`, d: path(curve, x, y) })),
    drawn.map((curve, i) =>
      svg("circle", {
        class: `dot c${i}`,
        r: 3.5,
        cx: x(curve.step[curve.value.findLastIndex(Number.isFinite)]),
        cy: y(curve.value.findLast(Number.isFinite)),
      }),
    ),
  );
  return el(
    "figure",
    { class: "figure" },
    el("figcaption", {}, el("h3", {}, title), legend(drawn, format)),
    picture,
  );
}

/** Draw a histogram: { counts, edges }. */
export function histogram(title, { counts, edges }) {
  const most = Math.max(...counts);
  const width = 220 / counts.length;
  const bars = counts.map((count, i) =>
    svg(
      "rect",
      {
        x: (i * width).toFixed(2),
        width: Math.max(width - 1, 0.5).toFixed(2),
        y: (44 - (44 * count) / most).toFixed(2),
        height: ((44 * count) / most).toFixed(2),
      },
      svg("title", {}, `${edges[i].toPrecision(3)} to ${edges[i + 1].toPrecision(3)}: ${count}`),
    ),
  );
  const ends = [edges[0], edges.at(-1)].map((value) => value.toPrecision(3));
  return el(
    "figure",
    { class: "histogram" },
    svg(
      "svg",
      {
        viewBox: "0 0 220 45",
        role: "img",
        preserveAspectRatio: "none",
        "aria-label": `${title}: from ${ends[0]} to ${ends[1]}`,
      },
      bars,
    ),
    el(
      "figcaption",
      { class: "soft small" },
      el("span", {}, ends[0]),
      el("span", {}, title),
      el("span", {}, ends[1]),
    ),
  );
}

/** What is not finite comes as null. */
function worded(value, format) {
  return value === null ? "not finite" : format(value);
}

/** A number as short as it can be told from its neighbours. */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

function legend(curves, format) {
  return el(
    "ul",
    { class: "legend" },
    curves.map((curve, i) =>
      el(
        "li",
        {},
        el("span", { class: `key c${i}`, "aria-hidden": "true" }),
        `${curve.name} `,
        el("b", {}, worded(curve.value.at(-1), format)),
      ),
    ),
  );
}

function described(title, curves, format) {
  const each = curves.map(({ name, step, value }) => {
    const [first, last] = [value[0], value.at(-1)].map((one) => worded(one, format));
    return `${name}, at step ${step.at(-1)}, is ${last}; it was ${first} at step ${step[0]}`;
  });
  return `${title}. ${each.join(". ")}.`;
}

function path(curve, x, y) {
  let pen = "M";
  let drawn = "";
  curve.step.forEach((step, i) => {
    if (!Number.isFinite(curve.value[i])) {
      pen = "M";
      return;
    }
    drawn += `${pen}${x(step).toFixed(1)} ${y(curve.value[i]).toFixed(1)}`;
    pen = "L";
  });
  return drawn;
}

function padded(values, log) {
  const least = Math.min(...values);
  const most = Math.max(...values);
  if (log) return [least, most === least ? least * 1.1 : most];
  const space = (most - least || Math.abs(most) || 1) * 0.06;
  return [least >= 0 && least - space < 0 ? 0 : least - space, most + space];
}

function scale(from, to, start, end, log = false) {
  const f = log ? Math.log : (value) => value;
  const span = f(to) - f(from) || 1;
  const place = (value) => start + ((f(value) - f(from)) / span) * (end - start);
  place.ticks = (count) => (log ? logTicks(from, to) : ticks(from, to, count));
  return place;
}

function ticks(from, to, count) {
  const rough = (to - from || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(from / step) * step; value <= to + step * 1e-6; value += step)
    found.push(+value.toPrecision(12));
  return found;
}

function logTicks(from, to) {
  const found = [];
  for (let power = Math.floor(Math.log10(from)); power <= Math.ceil(Math.log10(to)); power++) {
    for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
  }
  const inside = found.filter((value) => value >= from && value <= to);
  return inside.length > 1 ? inside : ticks(from, to, 3);
}
