// Numbers as words.

/** With a comma at each thousand. @param {number} value */
export function grouped(value) {
  return value.toLocaleString("en");
}

/** @param {number} value @param {string} one @param {string} [many] */
export function count(value, one, many = `${one}s`) {
  return `${grouped(value)} ${value === 1 ? one : many}`;
}

/** @param {number} value a fraction @param {number} [digits] */
export function percent(value, digits = 1) {
  return `${(100 * value).toFixed(digits)}\u00a0%`;
}

/** As short as it can be told from its neighbours. @param {number} value */
export function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  if (size !== 0 && size < 1e-3) return value.toExponential(0);
  return String(+value.toPrecision(3));
}

/** As a part of a bar: in [0, 1]. @param {number} value */
export function clamp(value) {
  return Math.max(0, Math.min(1, value));
}
