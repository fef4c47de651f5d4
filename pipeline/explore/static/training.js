// The curves of the training; asks again every other second while it goes on.

import { ask } from "./api.js";
import { lineChart, short } from "./chart.js";
import { announce, el, heading, notYet, percent, prose } from "./dom.js";

const MILLISECONDS = 2000;
const PANELS = [
  [
    "Held-out recall",
    /^heldout\/(recall@\d+|mean_recall)$/,
    { format: (value) => percent(value, 0) },
  ],
  ["Loss", /^loss/, {}],
  [
    "Held-out, image to text",
    /^heldout\/.*image_to_text$/,
    { format: (value) => percent(value, 0) },
  ],
  [
    "Held-out, text to image",
    /^heldout\/.*text_to_image$/,
    { format: (value) => percent(value, 0) },
  ],
  ["Learning rate", /^learning_rate$/, {}],
  ["Scale and bias", /^(scale|bias)$/, {}],
  ["Images per second", /per_second$/, { format: short }],
  ["Seconds waited for data, each step", /^wait/, { format: short }],
  ["Gradient norm", /grad/, { log: true }],
];

/** Show the view; return what ends it. */
export async function showTraining(main, parameters, run) {
  const charts = el("div", { class: "charts" });
  const state = el("p", { class: "state" });
  const top = heading("Training");
  top.firstChild.append(state);
  main.replaceChildren(top, charts);
  let seen = 0;
  let wasLive = null;
  let timer = null;
  let ended = false;
  async function look() {
    try {
      const facts = await ask("/api/training", { seen });
      if (ended) return;
      if (facts.curves) {
        const isBegun = facts.step !== null && facts.step !== undefined;
        if (isBegun) charts.replaceChildren(...drawn(facts));
        else if (!charts.firstChild) charts.append(notBegun(run)); // once: its command is copied
        state.replaceChildren(...said(facts));
        seen = facts.bytes;
      }
      if (facts.live !== wasLive) {
        state.classList.toggle("live", facts.live);
        announce(facts.live ? "Training is under way." : "Training is at rest.");
        wasLive = facts.live;
      }
    } catch (error) {
      state.replaceChildren(el("span", {}, prose(error.message)));
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

function notBegun(run) {
  return notYet(
    "Training has made no step yet",
    "The curves appear here as soon as it does.",
    `sail align ${run.run_file}`,
  );
}

function said(facts) {
  if (facts.step === null || facts.step === undefined) return [];
  const parts = [`step ${facts.step.toLocaleString("en")}`];
  if (facts.epoch)
    parts.push(`epoch ${facts.epoch.toFixed(1)}${facts.epochs ? ` of ${facts.epochs}` : ""}`);
  if (facts.best_step !== null)
    parts.push(`best head at step ${facts.best_step.toLocaleString("en")} (dashed)`);
  return [el("span", { class: "pulse", "aria-hidden": "true" }), parts.join(" · ")];
}

function drawn(facts) {
  const left = new Map(Object.entries(facts.curves));
  const panels = [];
  for (const [title, names, options] of PANELS) {
    const curves = [...left].filter(([name]) => names.test(name));
    curves.forEach(([name]) => left.delete(name));
    if (!curves.length) continue;
    const lines = curves.map(([name, curve]) => ({
      name: name.replace("heldout/", "").split("/")[0].replaceAll("_", " "),
      ...curve,
    }));
    panels.push(
      el(
        "section",
        { class: "panel" },
        lineChart(title, lines, {
          ...options,
          mark: names.source.includes("heldout") ? facts.best_step : null,
        }),
      ),
    );
  }
  for (const [name, curve] of left)
    panels.push(el("section", { class: "panel" }, lineChart(name, [{ name: "value", ...curve }])));
  return panels;
}
