// Where a canvas looks at a plane of points: pan and zoom by pointer, wheel, pinch and call.

const MOST = 400; // times the view of all points

/** @typedef {[x: number, y: number]} Place Of the canvas, in CSS pixels from its corner. */
/** @typedef {(i: number) => boolean} IsShown */
/** @typedef {(place: Place | null) => void} OnPoint Where the pointer is, null when it leaves. */
/** @typedef {{ onmove: () => void, onpoint: OnPoint, onclick: () => void }} Told */

export class Camera {
  width = 1;
  height = 1;
  ratio = 1;
  scale = 1;
  left = 0;
  top = 0;
  fitted = 1; // the scale at which all points are seen
  moved = 0; // pixels since a pointer went down
  /** @type {Map<number, Place>} */
  pointers = new Map();

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {Float32Array} places x and y of every point, in turn
   * @param {Told} told
   */
  constructor(canvas, places, { onmove, onpoint, onclick }) {
    this.canvas = canvas;
    this.places = places;
    this.onmove = onmove;
    this.onpoint = onpoint;
    this.onclick = onclick;
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.up(event));
    canvas.addEventListener("pointercancel", (event) => this.up(event));
    canvas.addEventListener("pointerleave", () => this.pointers.size || onpoint(null));
  }

  get magnification() {
    return this.scale / this.fitted;
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    this.ratio = window.devicePixelRatio || 1;
    const [x, y] = [(clientWidth - this.width) / 2, (clientHeight - this.height) / 2];
    [this.width, this.height] = [clientWidth, clientHeight];
    this.canvas.width = Math.round(clientWidth * this.ratio);
    this.canvas.height = Math.round(clientHeight * this.ratio);
    if (this.magnification === 1) this.fit();
    else this.pan(x, y);
  }

  /** Show all points. */
  fit() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < this.places.length; i += 2) {
      x0 = Math.min(x0, this.places[i]);
      x1 = Math.max(x1, this.places[i]);
      y0 = Math.min(y0, this.places[i + 1]);
      y1 = Math.max(y1, this.places[i + 1]);
    }
    const space = 26;
    const scale = Math.min(
      (this.width - 2 * space) / (x1 - x0 || 1),
      (this.height - 2 * space) / (y1 - y0 || 1),
    );
    this.scale = this.fitted = Math.max(scale, 1e-9);
    this.left = this.width / 2 - ((x0 + x1) / 2) * this.scale;
    this.top = this.height / 2 + ((y0 + y1) / 2) * this.scale;
    this.onmove();
  }

  /** @param {number} x @param {number} y */
  pan(x, y) {
    this.left += x;
    this.top += y;
    this.onmove();
  }

  /** @param {number} factor @param {Place} [about] the middle, where none is given */
  zoom(factor, [x, y] = [this.width / 2, this.height / 2]) {
    const scale = Math.max(this.fitted * 0.5, Math.min(this.fitted * MOST, this.scale * factor));
    const by = scale / this.scale;
    this.scale = scale;
    this.left = x + (this.left - x) * by;
    this.top = y + (this.top - y) * by;
    this.onmove();
  }

  /** Where a point is on the canvas. @param {number} i @returns {Place} */
  screen(i) {
    return [
      this.left + this.places[2 * i] * this.scale,
      this.top - this.places[2 * i + 1] * this.scale,
    ];
  }

  /**
   * The point nearest to a place of the canvas, -1 where none is within a distance.
   *
   * @param {Place} place
   * @param {number} within
   * @param {IsShown} isShown
   */
  nearest([x, y], within, isShown) {
    let [best, found] = [within * within, -1];
    for (let i = 0; i < this.places.length / 2; i++) {
      const dx = this.left + this.places[2 * i] * this.scale - x;
      const dy = this.top - this.places[2 * i + 1] * this.scale - y;
      const distance = dx * dx + dy * dy;
      if (distance < best && isShown(i)) [best, found] = [distance, i];
    }
    return found;
  }

  /** The points that are shown, nearest first. @param {Place} place @param {IsShown} isShown */
  outwards([x, y], isShown) {
    /** @type {[distance: number, i: number][]} */
    const found = [];
    for (let i = 0; i < this.places.length / 2; i++) {
      if (!isShown(i)) continue;
      const [px, py] = this.screen(i);
      found.push([(px - x) ** 2 + (py - y) ** 2, i]);
    }
    return found.sort((a, b) => a[0] - b[0]).map(([, i]) => i);
  }

  /** @param {WheelEvent} event */
  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), this.local(event));
  }

  /** @param {PointerEvent} event */
  down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.local(event));
    if (this.pointers.size === 1) this.moved = 0;
  }

  /** @param {PointerEvent} event */
  move(event) {
    const now = this.local(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      this.onpoint(now);
      return;
    }
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, now);
    this.moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (other) {
      const factor =
        Math.hypot(now[0] - other[0], now[1] - other[1]) /
        (Math.hypot(before[0] - other[0], before[1] - other[1]) || 1);
      this.zoom(factor, [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
    } else {
      this.pan(now[0] - before[0], now[1] - before[1]);
    }
  }

  /** @param {PointerEvent} event */
  up(event) {
    const known = this.pointers.delete(event.pointerId);
    if (known && event.type === "pointerup" && this.moved < 5 && !this.pointers.size) {
      this.onpoint(this.local(event));
      this.onclick();
    }
  }

  /** @param {MouseEvent} event @returns {Place} */
  local(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
}
