// Charts as SVG: lines over steps, and bars of a histogram. Colours come from the style sheet.

import { el, svg } from "./dom.js";
import { short } from "./numbers.js";

/** @import { Curve, Histogram } from "../answers.d.ts" */
/** @typedef {Curve & { name: string }} NamedCurve */
/** @typedef {(value: number) => string} Format */
/** @typedef {((value: number) => number) & { ticks: (count: number) => number[] }} Scale */
/** @typedef {{ format?: Format, mark?: number | null, log?: boolean }} Options */

const HEIGHT = 230;
const LEFT = 52;
const BOTTOM = 28;
const TOP = 12;
const RIGHT = 14;

/**
 * Draw curves over one axis of steps.
 *
 * @param {string} title
 * @param {NamedCurve[]} curves
 * @param {Options} [options] how a value is written, a step to point at, a logarithmic axis
 */
export function lineChart(title, curves, { format = short, mark = null, log = false } = {}) {
  const width = window.innerWidth < 720 ? 340 : 560; // so that the words keep their size
  const drawn = curves.filter((curve) => curve.value.some(isThere));
  const values = drawn.flatMap((curve) => curve.value).filter(isThere);
  if (!values.length) return el("p", { class: "soft" }, "Nothing yet.");
  const steps = drawn.flatMap((curve) => curve.step);
  const x = scale(Math.min(...steps), Math.max(...steps), LEFT, width - RIGHT);
  const useLog = log && Math.min(...values) > 0;
  const [least, most] = padded(values, useLog);
  const y = scale(least, most, HEIGHT - BOTTOM, TOP, useLog);
  const picture = svg(
    "svg",
    {
      class: "chart",
      viewBox: `0 0 ${width} ${HEIGHT}`,
      role: "img",
      "aria-label": described(title, drawn, format),
    },
    y.ticks(4).map((value) => [
      svg("line", {
        class: "grid-line",
        x1: LEFT,
        x2: width - RIGHT,
        y1: y(value),
        y2: y(value),
      }),
      svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)),
    ]),
    svg("text", { x: LEFT - 8, y: HEIGHT - 8, "text-anchor": "end" }, "step"),
    x
      .ticks(5)
      .filter((value) => x(value) > LEFT + 20) // beside the word
      .map((value) =>
        svg("text", { x: x(value), y: HEIGHT - 8, "text-anchor": "middle" }, short(value)),
      ),
    mark === null
      ? null
      : svg("line", { class: "mark", x1: x(mark), x2: x(mark), y1: TOP, y2: HEIGHT - BOTTOM }),
    drawn.map((curve, i) => svg("path", { class: `curve c${i}`, d: path(curve, x, y) })),
    drawn.map(({ step, value }, i) => {
      const last = value.findLastIndex(isThere);
      return svg("circle", {
        class: `dot c${i}`,
        r: 3.5,
        cx: x(step[last]),
        cy: y(value[last] ?? 0),
      });
    }),
  );
  return el(
    "figure",
    { class: "figure" },
    el("figcaption", {}, el("h3", {}, title), legend(drawn, format)),
    picture,
  );
}

/** @param {string} title @param {Histogram} bins */
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
  const ends = [edges[0], edges[edges.length - 1]].map((value) => value.toPrecision(3));
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

/**
 * Whether a value is finite: what is not comes as null.
 *
 * @param {number | null} value
 * @returns {value is number}
 */
function isThere(value) {
  return value !== null;
}

/** @param {number | null | undefined} value @param {Format} format */
function worded(value, format) {
  return value === null || value === undefined ? "not finite" : format(value);
}

/** @param {NamedCurve[]} curves @param {Format} format */
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

/** @param {string} title @param {NamedCurve[]} curves @param {Format} format */
function described(title, curves, format) {
  const each = curves.map(({ name, step, value }) => {
    const [first, last] = [value[0], value.at(-1)].map((one) => worded(one, format));
    return `${name}, at step ${step.at(-1)}, is ${last}; it was ${first} at step ${step[0]}`;
  });
  return `${title}. ${each.join(". ")}.`;
}

/** @param {Curve} curve @param {Scale} x @param {Scale} y */
function path(curve, x, y) {
  let pen = "M";
  let drawn = "";
  curve.value.forEach((value, i) => {
    if (isThere(value)) drawn += `${pen}${x(curve.step[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = isThere(value) ? "L" : "M";
  });
  return drawn;
}

/** @param {number[]} values @param {boolean} log */
function padded(values, log) {
  const least = Math.min(...values);
  const most = Math.max(...values);
  if (log) return [least, most === least ? least * 1.1 : most];
  const space = (most - least || Math.abs(most) || 1) * 0.06;
  return [least >= 0 && least - space < 0 ? 0 : least - space, most + space];
}

/**
 * What places values from `from` to `to` between `start` and `end` of the picture.
 *
 * @param {number} from
 * @param {number} to
 * @param {number} start
 * @param {number} end
 * @param {boolean} [log]
 * @returns {Scale}
 */
function scale(from, to, start, end, log = false) {
  const f = log ? Math.log : (/** @type {number} */ value) => value;
  const span = f(to) - f(from) || 1;
  const place = (/** @type {number} */ value) =>
    start + ((f(value) - f(from)) / span) * (end - start);
  const marks = (/** @type {number} */ count) =>
    log ? logTicks(from, to) : ticks(from, to, count);
  return Object.assign(place, { ticks: marks });
}

/** @param {number} from @param {number} to @param {number} count */
function ticks(from, to, count) {
  const rough = (to - from || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((each) => each * power >= rough) ?? 10);
  const found = [];
  for (let value = Math.ceil(from / step) * step; value <= to + step * 1e-6; value += step)
    found.push(+value.toPrecision(12));
  return found;
}

/** @param {number} from @param {number} to */
function logTicks(from, to) {
  const found = [];
  for (let power = Math.floor(Math.log10(from)); power <= Math.ceil(Math.log10(to)); power++) {
    for (const digit of [1, 2, 5]) found.push(digit * 10 ** power);
  }
  const inside = found.filter((value) => value >= from && value <= to);
  return inside.length > 1 ? inside : ticks(from, to, 3);
}
