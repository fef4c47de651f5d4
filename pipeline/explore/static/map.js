// The map of the shared space, and what is said beside it.

import { ask, askBytes } from "./api.js";
import { choice, count, el, heading, noHead, noStore, percent } from "./dom.js";
import { MapView } from "./mapview.js";

const TITLE = "Map of the shared space";

/** Show the view; return what ends it. */
export async function showMap(main, parameters, run) {
  const splits = Object.keys(run.splits);
  const split = splits.includes(parameters.get("split")) ? parameters.get("split") : splits[0];
  if (!split || !run.head) {
    main.replaceChildren(heading(TITLE), split ? noHead(run) : noStore(run));
    return;
  }
  main.replaceChildren(
    el("p", { class: "waiting" }, "Drawing … the first time the split is embedded."),
  );
  const facts = await ask("/api/map", { split });
  const points = read(await askBytes("/api/map/points", { split }), facts.images + facts.texts);
  const view = new MapView(split, facts, points);
  main.replaceChildren(
    heading(
      TITLE,
      told(facts),
      choice(
        "split",
        splits,
        split,
        (name) => (location.hash = `#/map?${new URLSearchParams({ split: name })}`),
      ),
    ),
    view.element,
    gap(facts),
  );
  view.start();
  return () => view.end();
}

function read(bytes, size) {
  return {
    places: new Float32Array(bytes, 0, 2 * size),
    rows: new Int32Array(bytes, 8 * size, size),
    labels: new Int32Array(bytes, 12 * size, size),
  };
}

function told(facts) {
  const all = facts.images < facts.rows ? ` of ${count(facts.rows, "row")}` : "";
  const variance = facts.explained.map((part) => percent(part, 0)).join(" and ");
  return (
    `${count(facts.images, "image")} and ${count(facts.texts, "caption")} (field “${facts.field}”)` +
    `${all}, on the two directions of most variance (${variance}).`
  );
}

function gap(facts) {
  return el(
    "dl",
    { class: "gap" },
    el(
      "div",
      {},
      el("dt", {}, "modality gap"),
      el("dd", {}, facts.gap.toFixed(3)),
      el(
        "dd",
        { class: "soft small" },
        "distance of the mean image from the mean caption; vectors have length 1",
      ),
    ),
    el(
      "div",
      {},
      el("dt", {}, "cosine of pairs"),
      el("dd", {}, facts.pair_cosine.toFixed(3)),
      el("dd", { class: "soft small" }, "mean over images with their own captions"),
    ),
  );
}
