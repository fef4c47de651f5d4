// Tens of thousands of points on a canvas: zoomed, panned, looked into.

import { ask } from "./api.js";
import { Camera } from "./camera.js";
import { announce, button, choice, el, fill } from "./dom.js";
import { bestCaption, photo } from "./grid.js";
import { grouped } from "./numbers.js";
import { openRow } from "./row.js";

/** @import { MapFacts, Row } from "../answers.d.ts" */
/** @import { Place } from "./camera.js" */
/** @typedef {"image" | "text"} Kind */
/** @typedef {{ [Name in Kind]: string }} Colors */
/** @typedef {CanvasRenderingContext2D} Context */
/**
 * Of the images, then of the captions: x and y in turn, the row, the class or -1.
 *
 * @typedef {{ places: Float32Array, rows: Int32Array, labels: Int32Array }} Points
 */

const KEYS =
  "Arrow keys move, plus and minus zoom, 0 shows all, N goes from point to point near the " +
  "middle, Enter opens the point.";
const NEAR = 14; // pixels within which a point is under the pointer
const MILLISECONDS = 90; // that the pointer rests before words and picture are asked for

export class MapView {
  /** @type {number | null} */
  frame = null; // that is asked for
  /** @type {number | undefined} */
  timer;
  /** @type {number | null} */
  label = null; // the class that is shown, null for all
  at = -1; // the point under the pointer
  /** @type {Map<number, Row>} */
  known = new Map();
  shown = { image: true, text: true };

  /** @param {string} split @param {MapFacts} facts @param {Points} points */
  constructor(split, facts, points) {
    this.split = split;
    this.facts = facts;
    this.points = points;
    this.canvas = el("canvas", {
      tabindex: "0",
      role: "application",
      "aria-label": `Map of ${facts.images} images and ${facts.texts} captions. ${KEYS}`,
    });
    this.tip = el("div", { class: "tip", hidden: true });
    this.camera = new Camera(this.canvas, points.places, {
      onmove: () => this.draw(),
      onpoint: (place) => this.point(place),
      onclick: () => this.open(),
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.element = el(
      "div",
      { class: "map" },
      this.tools(),
      el("div", { class: "map-frame" }, this.canvas, this.tip, this.buttons()),
    );
    this.redraw = () => this.draw();
    this.observer = new ResizeObserver(() => this.camera.resize());
  }

  start() {
    this.observer.observe(this.canvas);
    window.addEventListener("themechange", this.redraw);
    this.camera.fit();
  }

  end() {
    this.observer.disconnect();
    if (this.frame !== null) cancelAnimationFrame(this.frame);
    clearTimeout(this.timer);
    window.removeEventListener("themechange", this.redraw);
  }

  tools() {
    const { classes } = this.facts;
    return el(
      "div",
      { class: "map-tools" },
      this.switch("image", "images"),
      this.switch("text", "captions"),
      classes.length
        ? choice("class", ["all", ...classes], "all", (name) => {
            this.label = name === "all" ? null : classes.indexOf(name);
            this.draw();
          })
        : null,
    );
  }

  /** @param {Kind} name @param {string} words */
  switch(name, words) {
    const box = el("input", {
      type: "checkbox",
      checked: true,
      onchange: () => {
        this.shown[name] = box.checked;
        this.draw();
      },
    });
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    return el("label", { class: `kind ${name}` }, box, swatch, words);
  }

  buttons() {
    /** @type {[label: string, sign: string, act: () => void][]} */
    const all = [
      ["Zoom in", "+", () => this.camera.zoom(1.5)],
      ["Zoom out", "−", () => this.camera.zoom(1 / 1.5)],
      ["Show all", "⤢", () => this.camera.fit()],
    ];
    return el(
      "div",
      { class: "map-buttons" },
      all.map(([label, sign, onclick]) =>
        button({ class: "icon-button", "aria-label": label, onclick }, sign),
      ),
    );
  }

  /** Draw before the next picture of the screen, however often it is asked for until then. */
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  paint() {
    const { canvas, camera, points, facts } = this;
    const context = /** @type {Context} */ (canvas.getContext("2d"));
    const ratio = camera.ratio;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, camera.width, camera.height);
    const colors = { image: color(canvas, "--accent"), text: color(canvas, "--warm") };
    const size = Math.max(
      1.6,
      Math.min(5, 1.7 + 0.9 * camera.magnification ** 0.5 + 900 / (points.rows.length + 400)),
    );
    /** @type {[name: Kind, from: number, to: number][]} */
    const parts = [
      ["text", facts.images, points.rows.length],
      ["image", 0, facts.images],
    ];
    for (const strong of this.label === null ? [true] : [false, true]) {
      for (const [name, from, to] of parts) {
        if (!this.shown[name]) continue;
        const dot = stamp(colors[name], strong ? size : size * 0.8, ratio);
        context.globalAlpha = this.label === null ? 0.62 : strong ? 0.95 : 0.08;
        this.dots(context, dot, from, to, strong);
      }
    }
    context.globalAlpha = 1;
    if (this.at >= 0) this.mark(context, size, colors);
  }

  /**
   * Draw the points of a kind; `strong`: those of the chosen class, or else the others.
   *
   * @param {Context} context
   * @param {OffscreenCanvas} dot
   * @param {number} from
   * @param {number} to
   * @param {boolean} strong
   */
  dots(context, dot, from, to, strong) {
    const { places, labels } = this.points;
    const { scale, left, top, width, height, ratio } = this.camera;
    const half = dot.width / 2;
    const edge = half / ratio;
    context.save();
    context.resetTransform(); // whole pixels of the screen: far faster than a path each
    for (let i = from; i < to; i++) {
      if (this.label !== null && (labels[i] === this.label) !== strong) continue;
      const x = left + places[2 * i] * scale;
      const y = top - places[2 * i + 1] * scale;
      if (x < -edge || y < -edge || x > width + edge || y > height + edge) continue;
      context.drawImage(dot, Math.round(x * ratio - half), Math.round(y * ratio - half));
    }
    context.restore();
  }

  /** @param {Context} context @param {number} size @param {Colors} colors */
  mark(context, size, colors) {
    const [x, y] = this.camera.screen(this.at);
    context.strokeStyle = color(this.canvas, "--ink");
    context.lineWidth = 2;
    context.fillStyle = colors[this.kind(this.at)];
    context.beginPath();
    context.arc(x, y, size + 3, 0, 6.2832);
    context.fill();
    context.stroke();
  }

  /** @param {number} i @returns {Kind} */
  kind(i) {
    return i < this.facts.images ? "image" : "text";
  }

  /** @param {number} i */
  isShown(i) {
    return (
      this.shown[this.kind(i)] && (this.label === null || this.points.labels[i] === this.label)
    );
  }

  /** The pointer is at a place of the canvas, or has left it. @param {Place | null} place */
  point(place) {
    this.select(place ? this.camera.nearest(place, NEAR, (i) => this.isShown(i)) : -1);
  }

  /** @param {number} i */
  select(i) {
    if (i === this.at) return;
    this.at = i;
    this.canvas.style.cursor = i < 0 ? "grab" : "pointer";
    this.draw();
    clearTimeout(this.timer);
    if (i < 0) this.tip.hidden = true;
    else this.timer = setTimeout(() => this.tell(i), MILLISECONDS);
  }

  /** @param {number} i */
  async tell(i) {
    const row = this.points.rows[i];
    const facts =
      this.known.get(row) ??
      (await ask("/api/shown", { split: this.split, row }).catch(() => undefined));
    if (!facts) return;
    this.known.set(row, facts);
    if (this.at !== i) return;
    const isImage = this.kind(i) === "image";
    fill(
      this.tip,
      photo(this.split, row, "", 96),
      el(
        "div",
        {},
        el("b", {}, isImage ? "image" : "caption"),
        el("span", { class: "soft" }, ` row ${grouped(row)} `),
        el(
          "span",
          { class: "tip-words", dir: "auto" },
          (isImage ? null : facts.captions[this.facts.field]) || bestCaption(facts),
        ),
      ),
    );
    this.tip.hidden = false;
    if (document.activeElement === this.canvas) announce(this.tip.textContent);
    const [x, y] = this.camera.screen(i);
    Object.assign(this.tip.dataset, { x, y });
    const { offsetWidth, offsetHeight } = this.tip;
    const fits = y + 16 + offsetHeight <= this.camera.height; // below the point, or else above it
    const left = Math.min(x + 14, this.camera.width - offsetWidth - 6);
    this.tip.style.left = `${Math.max(6, left)}px`;
    this.tip.style.top = `${Math.max(6, fits ? y + 16 : y - offsetHeight - 14)}px`;
  }

  open() {
    if (this.at >= 0) openRow(this.split, this.points.rows[this.at]);
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    /** @type {{ [key: string]: [x: number, y: number] }} */
    const moves = {
      ArrowLeft: [60, 0],
      ArrowRight: [-60, 0],
      ArrowUp: [0, 60],
      ArrowDown: [0, -60],
    };
    if (event.key in moves) this.camera.pan(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.camera.zoom(1.5);
    else if (event.key === "-") this.camera.zoom(1 / 1.5);
    else if (event.key === "0") this.camera.fit();
    else if (event.key === "n" || event.key === "N") this.next();
    else if (event.key === "Enter") this.open();
    else return;
    event.preventDefault();
  }

  /** Go to the next point outwards from the middle. */
  next() {
    const { width, height } = this.camera;
    const middle = /** @type {Place} */ ([width / 2, height / 2]);
    const order = this.camera.outwards(middle, (i) => this.isShown(i)).slice(0, 200);
    this.select(order[(order.indexOf(this.at) + 1) % order.length] ?? -1);
  }
}

/** A picture of a dot. @param {string} fill @param {number} size @param {number} ratio */
function stamp(fill, size, ratio) {
  const side = Math.ceil(2 * size * ratio) + 2;
  const dot = new OffscreenCanvas(side, side);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (dot.getContext("2d"));
  context.fillStyle = fill;
  context.beginPath();
  context.arc(side / 2, side / 2, size * ratio, 0, 2 * Math.PI);
  context.fill();
  return dot;
}

/**
 * A colour of the style sheet as the canvas can use it: `light-dark()` is resolved for the element.
 *
 * @param {HTMLElement} element
 * @param {string} name
 */
function color(element, name) {
  const before = element.style.color;
  element.style.color = `var(${name})`;
  const resolved = getComputedStyle(element).color;
  element.style.color = before;
  return resolved;
}
