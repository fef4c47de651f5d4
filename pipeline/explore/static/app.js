// Chooses the view by the address behind `#`, and keeps what all views share.

import { ask } from "./api.js";
import { announce, el, prose } from "./dom.js";
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
let turns = 0;

function start() {
  themeButton();
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address says which view is shown
    main.focus();
  });
  window.addEventListener("hashchange", route);
  route();
}

/**
 * Show the view of the address. Views are functions (place, parameters, run) that may return what
 * ends them; each fills a place of its own, so that one that is late cannot overwrite the next.
 */
async function route() {
  const [name, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const view = name in VIEWS ? name : "search";
  const turn = ++turns;
  const place = el("div", {}, el("p", { class: "waiting" }, "Loading …"));
  tabs(view);
  leave();
  leave = () => {};
  document.getElementById("row").close();
  if (view !== shown) {
    main.replaceChildren(place);
    announce(VIEWS[view][0]);
  }
  shown = view;
  try {
    const run = await ask("/api/run");
    if (turn !== turns) return;
    document.getElementById("run").textContent = run.name;
    document.title = `${VIEWS[view][0]} · ${run.name} · SAIL explore`;
    const end = await VIEWS[view][1](place, new URLSearchParams(query), run);
    if (turn !== turns) return end?.();
    leave = end ?? leave;
  } catch (error) {
    if (turn !== turns) return;
    place.replaceChildren(
      el(
        "div",
        { class: "problem", role: "alert" },
        el("h1", {}, "This cannot be shown"),
        el("p", {}, prose(error.message)),
      ),
    );
  }
  const focused = document.activeElement?.id;
  if (!place.isConnected) main.replaceChildren(place);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

function tabs(view) {
  const list = document.getElementById("tabs");
  if (!list.childElementCount)
    list.append(
      ...Object.entries(VIEWS).map(([name, [words]]) => el("a", { href: `#/${name}` }, words)),
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
