// Search by words, by an image that is sent, or by a row.

import { ask, picture } from "./api.js";
import { announce, choice, count, el, heading, noHead, noStore, prose, segments } from "./dom.js";
import { grid } from "./grid.js";

const TOP = 24;
let sent = null; // the image that was sent last, for changes of split or of what is found

/** Show the view. */
export async function showSearch(main, parameters, run) {
  const splits = Object.keys(run.splits);
  const state = {
    split: splits.includes(parameters.get("split")) ? parameters.get("split") : splits[0],
    among: parameters.get("among") === "captions" ? "captions" : "images",
    text: parameters.get("text"),
    row: parameters.get("row"),
    sent: parameters.has("sent"),
  };
  if (!splits.length) {
    main.replaceChildren(heading("Search"), noStore(run));
    return;
  }
  const results = el("section", { class: "results", "aria-label": "Results" });
  main.replaceChildren(form(state, splits), results);
  const controller = new AbortController();
  show(results, state, run, controller.signal).catch((error) => {
    if (error.name !== "AbortError")
      results.replaceChildren(el("p", { class: "problem", role: "alert" }, prose(error.message)));
  });
  return () => controller.abort();
}

function form(state, splits) {
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
    onchange: () => send(file.files[0], state),
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
      ondragleave: () => all.classList.remove("dropping"),
      ondrop: (event) => {
        event.preventDefault();
        all.classList.remove("dropping");
        if (event.dataTransfer.files.length) send(event.dataTransfer.files[0], state);
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
      el("button", { class: "button main", type: "submit" }, "Search"),
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
      choice("in", splits, state.split, (split) => again(state, { split, row: null })),
      el("p", { class: "soft hint" }, "or drop an image here"),
    ),
  );
  return all;
}

async function show(results, state, run, signal) {
  const { split, among } = state;
  const question = asked(state);
  if (!question || !run.head) return look(results, split, run, signal);
  results.replaceChildren(
    query(state),
    el("p", { class: "waiting" }, "Searching … the first search of a split embeds it, once."),
  );
  const found = await question(signal);
  const searched = count(found.searched, among === "images" ? "image" : "caption");
  const how = `${searched}, ${found.method}, ${found.milliseconds.toFixed(1)} ms`;
  announce(`${count(found.hits.length, "result")} of ${searched}.`);
  results.replaceChildren(
    query(state),
    el("p", { class: "soft small" }, `${count(found.hits.length, "result")} of ${how}`),
    grid(split, found.hits),
  );
}

/** Return what asks the server, null where nothing was asked. */
function asked(state) {
  const common = { split: state.split, among: state.among, top: TOP };
  if (state.text)
    return (signal) => ask("/api/search", { ...common, text: state.text }, { signal });
  if (state.row !== null)
    return (signal) => ask("/api/similar", { ...common, row: state.row }, { signal });
  if (state.sent && sent)
    return (signal) => ask("/api/search", common, { method: "POST", body: sent.file, signal });
  return null;
}

/** What was asked with, as words or a picture. */
function query(state) {
  if (state.text) return el("h2", { class: "asked", dir: "auto" }, `“${state.text}”`);
  const source = state.sent ? sent.url : picture(state.split, state.row);
  const words = state.sent
    ? `Like ${sent.file.name || "your image"}`
    : `Like row ${state.row} of ${state.split}`;
  return el("h2", { class: "query" }, el("img", { src: source, alt: "" }), words);
}

/** Before anything is asked: some rows, and words to try. */
async function look(results, split, run, signal) {
  const { rows } = await ask("/api/rows", { split, count: TOP }, { signal });
  const tries = [
    ...new Set(
      rows.map((row) =>
        Object.values(row.captions).reduce(
          (a, b) => (b.length < a.length ? b : a),
          Object.values(row.captions)[0] ?? "",
        ),
      ),
    ),
  ];
  results.replaceChildren(
    run.head
      ? el(
          "p",
          { class: "tries" },
          el("span", { class: "soft" }, "Try"),
          tries
            .filter((words) => words && words.length < 80)
            .slice(0, 4)
            .map((text) =>
              el("a", { class: "chip", href: address({ split, among: "images", text }) }, text),
            ),
        )
      : noHead(run),
    el("h2", {}, `A look into ${split}`),
    el(
      "p",
      { class: "soft small" },
      `${count(rows.length, "row")} of ${run.splits[split].rows.toLocaleString("en")}, evenly spaced`,
    ),
    grid(split, rows),
  );
}

function send(file, state) {
  if (!file) return;
  if (sent) URL.revokeObjectURL(sent.url);
  sent = { file, url: URL.createObjectURL(file) };
  go(state, { sent: sent.url.slice(-8) });
}

/** Ask anew, for something else. */
function go(state, question) {
  location.hash = address({ split: state.split, among: state.among, ...question });
}

/** Ask the same elsewhere, or for the other kind. */
function again(state, change) {
  const { split, among, text, row } = { ...state, ...change };
  location.hash = address({
    split,
    among,
    text,
    row,
    sent: state.sent && sent ? sent.url.slice(-8) : null,
  });
}

function address(parameters) {
  const given = Object.entries(parameters).filter(
    ([, value]) => value !== null && value !== undefined && value !== false,
  );
  return `#/search?${new URLSearchParams(given)}`;
}
