// Chooses the view by the address behind `#`, and keeps what all views share.

import { ask } from "./api.js";
import { el, prose } from "./dom.js";
import { showMap } from "./map.js";
import { showResults } from "./results.js";
import { showSearch } from "./search.js";
import { showStore } from "./store.js";
import { showTraining } from "./training.js";

const VIEWS = {
  search: ["Search", showSearch],
  map: ["Map", showMap],
  results: ["Results", showResults],
  training: ["Training", showTraining],
  store: ["Store", showStore],
};

const main = document.getElementById("main");
let leave = () => {};
let shown = "";

async function start() {
  themeButton();
  window.addEventListener("hashchange", route);
  try {
    const run = await ask("/api/run");
    document.getElementById("run").textContent = run.name;
    document.title = `${run.name} · SAIL explore`;
  } catch {
    // The view says what is wrong.
  }
  await route();
}

/** Show the view of the address; views are functions (main, parameters, run) that may return what ends them. */
async function route() {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  if (name === "main") return;
  const view = name in VIEWS ? name : "search";
  const isNew = view !== shown;
  shown = view;
  tabs(view);
  leave();
  leave = () => {};
  document.getElementById("row").close();
  if (isNew) main.replaceChildren(el("p", { class: "waiting" }, "Loading …"));
  try {
    const run = await ask("/api/run");
    if (view !== shown) return;
    const end = await VIEWS[view][1](main, new URLSearchParams(query), run);
    if (view === shown) leave = end ?? leave;
    else end?.();
  } catch (error) {
    main.replaceChildren(el("div", { class: "problem", role: "alert" }, el("h1", {}, "This cannot be shown"), el("p", {}, prose(error.message))));
  }
  if (isNew && document.activeElement?.closest("#tabs")) main.focus({ preventScroll: true });
}

function tabs(view) {
  document.getElementById("tabs").replaceChildren(
    ...Object.entries(VIEWS).map(([name, [words]]) =>
      el("a", { href: `#/${name}`, "aria-current": name === view ? "page" : null }, words),
    ),
  );
}

function themeButton() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("sail-theme", root.dataset.theme);
    } catch {
      // See theme.js.
    }
    window.dispatchEvent(new Event("themechange"));
  });
  system.addEventListener("change", () => window.dispatchEvent(new Event("themechange")));
}

start();
