// Chooses the view by the address behind `#`, and keeps what all views share.

import { ask } from "./api.js";
import { announce, byId, el, fill, problem, waiting } from "./dom.js";
import { showMap } from "./map.js";
import { showResults } from "./results.js";
import { showSearch } from "./search.js";
import { showStore } from "./store.js";
import { showTraining } from "./training.js";

/** @import { View } from "./address.js" */

/** @type {{ [name: string]: [words: string, show: View] }} */
const VIEWS = {
  search: ["Search", showSearch],
  map: ["Map", showMap],
  results: ["Results", showResults],
  training: ["Training", showTraining],
  store: ["Store", showStore],
};

const main = byId("main");
const dialog = /** @type {HTMLDialogElement} */ (byId("row"));
let leave = () => {};
let shown = "";
let turns = 0;

function start() {
  themeButton();
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address says which view is shown
    main.focus();
  });
  window.addEventListener("hashchange", route);
  route();
}

/** Show the view of the address, in a place of its own: one that is late overwrites no other. */
async function route() {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const view = name in VIEWS ? name : "search";
  const [words, show] = VIEWS[view];
  const turn = ++turns;
  const place = el("div", {}, waiting("Loading …"));
  tabs(view);
  leave();
  leave = () => {};
  dialog.close();
  if (view !== shown) {
    fill(main, place);
    announce(words);
  }
  shown = view;
  try {
    const run = await ask("/api/run");
    if (turn !== turns) return;
    fill(byId("run"), run.name);
    document.title = `${words} · ${run.name} · SAIL explore`;
    const end = await show(place, new URLSearchParams(query), run);
    if (turn !== turns) {
      end?.();
      return;
    }
    leave = end ?? leave;
  } catch (error) {
    if (turn !== turns) return;
    fill(place, problem(error, "This cannot be shown"));
  }
  const focused = document.activeElement?.id;
  if (!place.isConnected) fill(main, place);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

/** @param {string} view */
function tabs(view) {
  const list = byId("tabs");
  if (!list.childElementCount)
    fill(
      list,
      Object.entries(VIEWS).map(([name, [words]]) => el("a", { href: `#/${name}` }, words)),
    );
  for (const tab of list.children) {
    if (tab.getAttribute("href") === `#/${view}`) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

function themeButton() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  byId("theme").addEventListener("click", () => {
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
