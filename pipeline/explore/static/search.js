// Search by words, by an image that is sent, or by a row.

import { address, splitOf } from "./address.js";
import { ask, isAbort, picture } from "./api.js";
import {
  announce,
  button,
  choice,
  el,
  fill,
  heading,
  noHead,
  noStore,
  problem,
  segments,
  waiting,
} from "./dom.js";
import { grid } from "./grid.js";
import { count, grouped } from "./numbers.js";
import { openRow } from "./row.js";

/** @import { Found, Run } from "../answers.d.ts" */
/** @import { View } from "./address.js" */
/** @import { Parameters } from "./api.js" */
/**
 * What the address asks for: `text`, `row` or `sent` at most is there.
 *
 * @typedef {{
 *   split: string,
 *   among: "images" | "captions",
 *   score: string | null,
 *   text: string | null,
 *   row: string | null,
 *   sent: { file: File, url: string } | null,
 * }} State
 */

const TOP = 24;
const COSINE = "cosine";
const SCORES = ["csls", "inverted-softmax", "dual-bank"]; // against hubness
/** @type {State["sent"]} */
let sent = null; // the image that was sent last, for changes of split or of what is found

/** @type {View} */
export async function showSearch(main, parameters, run) {
  const split = splitOf(run, parameters);
  if (!split) {
    fill(main, heading("Search"), noStore(run));
    return;
  }
  /** @type {State} */
  const state = {
    split,
    among: parameters.get("among") === "captions" ? "captions" : "images",
    score: SCORES.find((score) => score === parameters.get("score")) ?? null,
    text: parameters.get("text"),
    row: parameters.get("row"),
    sent: parameters.has("sent") ? sent : null,
  };
  const results = el("section", { class: "results", "aria-label": "Results" });
  fill(main, form(state, run), results);
  const controller = new AbortController();
  show(results, state, run, controller.signal).catch((error) => {
    if (!isAbort(error)) fill(results, problem(error));
  });
  return () => controller.abort();
}

/** @param {State} state @param {Run} run */
function form(state, run) {
  const words = el("input", {
    type: "search",
    id: "words",
    name: "words",
    placeholder: "Describe a picture …",
    autocomplete: "off",
    dir: "auto",
    maxlength: 2000,
    value: state.text ?? "",
  });
  const file = el("input", {
    type: "file",
    id: "file",
    accept: "image/*",
    class: "hidden",
    onchange: () => {
      send(file.files, state);
    },
  });
  const all = el(
    "form",
    {
      class: "search",
      role: "search",
      onsubmit: (event) => {
        event.preventDefault();
        if (words.value.trim()) go(state, { text: words.value.trim() });
      },
      ondragover: (event) => {
        event.preventDefault();
        all.classList.add("dropping");
      },
      ondragleave: () => {
        all.classList.remove("dropping");
      },
      ondrop: (event) => {
        event.preventDefault();
        all.classList.remove("dropping");
        send(event.dataTransfer?.files, state);
      },
    },
    el("h1", { class: "hidden" }, "Search"),
    el(
      "div",
      { class: "field" },
      el("label", { class: "hidden", for: "words" }, "What to search for"),
      words,
      el("label", { class: "button quiet", for: "file" }, "By image …"),
      file,
      button({ class: "button main", type: "submit" }, "Search"),
    ),
    el(
      "div",
      { class: "options" },
      segments(
        "What to find",
        "among",
        [
          ["images", "Images"],
          ["captions", "Captions"],
        ],
        state.among,
        (among) => again(state, { among }),
      ),
      choice("in", Object.keys(run.splits), state.split, (split) =>
        again(state, { split, row: null }),
      ),
      choice("by", [COSINE, ...SCORES], state.score ?? COSINE, (score) =>
        again(state, { score: score === COSINE ? null : score }),
      ),
      el("p", { class: "soft hint" }, "or drop an image here"),
    ),
  );
  return all;
}

/** @param {Element} results @param {State} state @param {Run} run @param {AbortSignal} signal */
async function show(results, state, run, signal) {
  const { split, among } = state;
  const question = run.head && asked(state);
  if (!question) return look(results, split, run, signal);
  fill(
    results,
    question.title,
    waiting("Searching … the first search of a split embeds it, once."),
  );
  const found = await question.ask(signal);
  const searched = count(found.searched, among === "images" ? "image" : "caption");
  const how = `${searched}, ${found.method}, ${found.milliseconds.toFixed(1)} ms`;
  announce(`${count(found.hits.length, "result")} of ${searched}.`);
  fill(
    results,
    question.title,
    el("p", { class: "soft small" }, `${count(found.hits.length, "result")} of ${how}`),
    grid(split, found.hits, openRow),
  );
}

/**
 * What asks the server, and what was asked with as words or a picture; null where nothing was.
 *
 * @param {State} state
 * @returns {{ title: Element, ask: (signal: AbortSignal) => Promise<Found> } | null}
 */
function asked({ split, among, score, text, row, sent }) {
  const common = { split, among, score, top: TOP };
  if (text)
    return {
      title: el("h2", { class: "asked", dir: "auto" }, `“${text}”`),
      ask: (signal) => ask("/api/search", { ...common, text }, { signal }),
    };
  if (row !== null)
    return {
      title: like(picture(split, row), `row ${row} of ${split}`),
      ask: (signal) => ask("/api/similar", { ...common, row }, { signal }),
    };
  if (sent)
    return {
      title: like(sent.url, sent.file.name || "your image"),
      ask: (signal) => ask("/api/search", common, { method: "POST", body: sent.file, signal }),
    };
  return null;
}

/** @param {string} src @param {string} words */
function like(src, words) {
  return el("h2", { class: "query" }, el("img", { src, alt: "" }), `Like ${words}`);
}

/**
 * Before anything is asked: some rows, and words to try.
 *
 * @param {Element} results
 * @param {string} split
 * @param {Run} run
 * @param {AbortSignal} signal
 */
async function look(results, split, run, signal) {
  const { rows } = await ask("/api/rows", { split, count: TOP }, { signal });
  const shortest = rows.map(
    (row) => Object.values(row.captions).sort((a, b) => a.length - b.length)[0],
  );
  const tries = [...new Set(shortest)].filter((words) => words && words.length < 80).slice(0, 4);
  fill(
    results,
    run.head
      ? el(
          "p",
          { class: "tries" },
          el("span", { class: "soft" }, "Try"),
          tries.map((text) => {
            const href = address("search", { split, among: "images", text });
            return el("a", { class: "chip", href }, text);
          }),
        )
      : noHead(run),
    el("h2", {}, `A look into ${split}`),
    el(
      "p",
      { class: "soft small" },
      `${count(rows.length, "row")} of ${grouped(run.splits[split].rows)}, evenly spaced`,
    ),
    grid(split, rows, openRow),
  );
}

/** @param {FileList | null | undefined} files @param {State} state */
function send(files, state) {
  const file = files?.[0];
  if (!file) return;
  if (sent) URL.revokeObjectURL(sent.url);
  sent = { file, url: URL.createObjectURL(file) };
  go(state, { sent: named(sent) });
}

/** Ask anew, for something else. @param {State} state @param {Parameters} question */
function go({ split, among, score }, question) {
  location.hash = address("search", { split, among, score, ...question });
}

/** Ask the same, but for a change. @param {State} state @param {Parameters} change */
function again({ split, among, score, text, row, sent }, change) {
  const now = { split, among, score, text, row, sent: sent && named(sent), ...change };
  location.hash = address("search", now);
}

/** What tells images that were sent apart in the address. @param {{ url: string }} image */
function named(image) {
  return image.url.slice(-8);
}
