// The curves of the training; asks again every other second while it goes on.

import { ask } from "./api.js";
import { lineChart } from "./chart.js";
import { announce, el, fill, heading, messageOf, notYet, prose } from "./dom.js";
import { grouped, percent } from "./numbers.js";

/** @import { Curve, Training } from "../answers.d.ts" */
/** @import { View } from "./address.js" */
/** @import { NamedCurve, Options } from "./chart.js" */

const MILLISECONDS = 2000;
const AS_PERCENT = { format: (/** @type {number} */ value) => percent(value, 0) };
/** @type {[title: string, names: RegExp, options: Options][]} */
const PANELS = [
  ["Held-out recall", /^heldout\/(recall@\d+|mean_recall)$/, AS_PERCENT],
  ["Loss", /^loss/, {}],
  ["Held-out, image to text", /^heldout\/.*image_to_text$/, AS_PERCENT],
  ["Held-out, text to image", /^heldout\/.*text_to_image$/, AS_PERCENT],
  ["Learning rate", /^learning_rate$/, {}],
  ["Scale and bias", /^(scale|bias)$/, {}],
  ["Images per second", /per_second$/, {}],
  ["Seconds waited for data, each step", /^wait/, {}],
  ["Gradient norm", /grad/, { log: true }],
];

/** @type {View} */
export async function showTraining(main, _parameters, run) {
  const charts = el("div", { class: "charts" });
  const state = el("p", { class: "state" });
  const top = heading("Training");
  top.firstElementChild?.append(state);
  fill(main, top, charts);
  const notBegun = notYet(
    "Training has made no step yet",
    "The curves appear here as soon as it does.",
    `sail align ${run.run_file}`,
  );
  let seen = 0;
  /** @type {boolean | null} */
  let wasLive = null;
  let timer = 0;
  let ended = false;
  async function look() {
    try {
      const facts = await ask("/api/training", { seen });
      if (ended) return;
      if (facts.curves) {
        const isBegun = typeof facts.step === "number";
        if (isBegun) fill(charts, drawn(facts.curves, facts.best_step));
        else if (!charts.firstChild) charts.append(notBegun); // once: its command is copied
        fill(state, said(facts));
        seen = facts.bytes;
      }
      if (facts.live !== wasLive) {
        state.classList.toggle("live", facts.live);
        announce(facts.live ? "Training is under way." : "Training is at rest.");
        wasLive = facts.live;
      }
    } catch (error) {
      fill(state, el("span", {}, prose(messageOf(error))));
      state.classList.remove("live");
      wasLive = null;
      seen = 0; // so that all is drawn again when the server is back
    }
    if (!ended) timer = setTimeout(look, MILLISECONDS);
  }
  await look();
  return () => {
    ended = true;
    clearTimeout(timer);
  };
}

/** @param {Training} facts */
function said({ step, epoch, epochs, best_step: best }) {
  if (typeof step !== "number") return null;
  const parts = [`step ${grouped(step)}`];
  if (epoch) parts.push(`epoch ${epoch.toFixed(1)}${epochs ? ` of ${epochs}` : ""}`);
  if (best !== null) parts.push(`best head at step ${grouped(best)} (dashed)`);
  return [el("span", { class: "pulse", "aria-hidden": "true" }), parts.join(" · ")];
}

/** @param {{ [name: string]: Curve }} all @param {number | null} best */
function drawn(all, best) {
  const left = new Map(Object.entries(all));
  const panels = PANELS.map(([title, names, options]) => {
    const curves = [...left].filter(([name]) => names.test(name));
    curves.forEach(([name]) => left.delete(name));
    const mark = names.source.includes("heldout") ? best : null;
    return panel(title, curves.map(named), { ...options, mark });
  });
  const others = [...left].map(([name, curve]) => panel(name, [{ name: "value", ...curve }]));
  return [panels, others];
}

/** @param {string} title @param {NamedCurve[]} curves @param {Options} [options] */
function panel(title, curves, options) {
  if (!curves.length) return null;
  return el("section", { class: "panel" }, lineChart(title, curves, options));
}

/** @param {[name: string, curve: Curve]} each @returns {NamedCurve} */
function named([name, curve]) {
  return { name: name.replace("heldout/", "").split("/")[0].replaceAll("_", " "), ...curve };
}
