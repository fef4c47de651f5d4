// What stands behind `#` in the address: the view, and what it shows.

import { asQuery } from "./api.js";
import { choice } from "./dom.js";

/** @import { Run } from "../answers.d.ts" */
/** @import { Parameters } from "./api.js" */

/**
 * A view fills a place, and may return what ends it.
 *
 * @callback View
 * @param {HTMLElement} place
 * @param {URLSearchParams} parameters
 * @param {Run} run
 * @returns {Promise<(() => void) | void>}
 */

/** @param {string} view @param {Parameters} parameters */
export function address(view, parameters) {
  return `#/${view}?${asQuery(parameters)}`;
}

/**
 * The split that the address names, or else the first; undefined where nothing is encoded yet.
 *
 * @param {Run} run
 * @param {URLSearchParams} parameters
 */
export function splitOf(run, parameters) {
  const splits = Object.keys(run.splits);
  return splits.find((name) => name === parameters.get("split")) ?? splits.at(0);
}

/**
 * A choice of the split that a view shows.
 *
 * @param {string} view
 * @param {Run} run
 * @param {string} split
 */
export function splitChoice(view, run, split) {
  return choice("split", Object.keys(run.splits), split, (name) => {
    location.hash = address(view, { split: name });
  });
}
