// The map of the shared space, and what is said beside it.

import { splitChoice, splitOf } from "./address.js";
import { ask, askBytes } from "./api.js";
import { el, fill, heading, noHead, noStore, waiting } from "./dom.js";
import { MapView } from "./mapview.js";
import { count, percent } from "./numbers.js";

/** @import { MapFacts } from "../answers.d.ts" */
/** @import { View } from "./address.js" */
/** @import { Points } from "./mapview.js" */

const TITLE = "Map of the shared space";

/** @type {View} */
export async function showMap(main, parameters, run) {
  const split = splitOf(run, parameters);
  if (!split || !run.head) {
    fill(main, heading(TITLE), split ? noHead(run) : noStore(run));
    return;
  }
  fill(main, waiting("Drawing … the first time the split is embedded."));
  const facts = await ask("/api/map", { split });
  const points = read(await askBytes("/api/map/points", { split }), facts.images + facts.texts);
  const view = new MapView(split, facts, points);
  fill(
    main,
    heading(TITLE, told(facts), splitChoice("map", run, split)),
    view.element,
    el(
      "dl",
      { class: "gap" },
      number(
        "modality gap",
        facts.gap,
        "distance of the mean image from the mean caption; vectors have length 1",
      ),
      number("cosine of pairs", facts.pair_cosine, "mean over images with their own captions"),
    ),
  );
  view.start();
  return () => view.end();
}

/** @param {ArrayBuffer} bytes @param {number} size @returns {Points} */
function read(bytes, size) {
  return {
    places: new Float32Array(bytes, 0, 2 * size),
    rows: new Int32Array(bytes, 8 * size, size),
    labels: new Int32Array(bytes, 12 * size, size),
  };
}

/** @param {MapFacts} facts */
function told(facts) {
  const all = facts.images < facts.rows ? ` of ${count(facts.rows, "row")}` : "";
  const variance = facts.explained.map((part) => percent(part, 0)).join(" and ");
  return (
    `${count(facts.images, "image")} and ${count(facts.texts, "caption")} (field “${facts.field}”)` +
    `${all}, on the two directions of most variance (${variance}).`
  );
}

/** @param {string} name @param {number} value @param {string} explained */
function number(name, value, explained) {
  return el(
    "div",
    {},
    el("dt", {}, name),
    el("dd", {}, value.toFixed(3)),
    el("dd", { class: "soft small" }, explained),
  );
}
