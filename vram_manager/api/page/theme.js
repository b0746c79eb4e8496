// Light or dark: as the system says, or as the reader chose. Paper is light.

import { say } from "./words.js";

const THEMES = ["system", "light", "dark"];
const KEY = "vram-theme";

function stored() {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function store(name) {
  try {
    localStorage.setItem(KEY, name);
  } catch {
    // Without storage it is forgotten with the page.
  }
}

/** `button` goes through the themes; `repaint(all)` draws the charts anew, also those out of sight. */
export function themes(button, repaint) {
  let chosen = THEMES.includes(stored()) ? stored() : "system";

  function dress(name, all = false) {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    repaint(all);
  }

  function show() {
    say(button, `Theme: ${chosen}`);
    dress(chosen);
  }

  button.addEventListener("click", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    store(chosen);
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  addEventListener("beforeprint", () => dress("light", true));
  addEventListener("afterprint", show);
  show();
}
