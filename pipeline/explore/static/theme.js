// Before anything is drawn: the theme chosen earlier; without one the system's own holds.
try {
  const chosen = localStorage.getItem("sail-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is forbidden: the choice lasts until the page is left.
}
