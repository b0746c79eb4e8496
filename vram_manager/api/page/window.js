// Which time is shown: up to now, or from one time to another. It stands in the address, so that a link shows the same.

import { epoch, rfc3339 } from "./words.js";

const SHORTEST_SECONDS = 10;
const LONGEST_SECONDS = 400 * 86400;

/** {live, span, from, to, gpu} of an address such as #from=...&to=...&gpu=... or #last=3600; the last hour else. */
export function read(hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const gpu = said.get("gpu") || null;
  const [from, to] = [epoch(said.get("from")), epoch(said.get("to"))];
  if (from !== null && to !== null && from < to) return { live: false, from, to, span: to - from, gpu };
  const last = Number(said.get("last"));
  return { live: true, span: last >= SHORTEST_SECONDS && last <= LONGEST_SECONDS ? last : 3600, gpu };
}

/** The address of a window. */
export function write({ live, span, from, to, gpu }) {
  const said = new URLSearchParams(live ? { last: Math.round(span) } : { from: rfc3339(from), to: rfc3339(to) });
  if (gpu) said.set("gpu", gpu);
  return `#${said.toString().replaceAll("%3A", ":")}`;
}

/** The edges of a window at `now`. */
export const edges = (window, now) =>
  window.live ? { from: now - window.span, to: now } : { from: window.from, to: window.to };

/** From `from` to `to`; a window that reaches now stays with it. */
export function between(window, from, to, now) {
  const span = Math.min(LONGEST_SECONDS, Math.max(SHORTEST_SECONDS, to - from));
  if (to >= now) return { ...window, live: true, span };
  return { ...window, live: false, from: to - span, to, span };
}

/** The window after one of its buttons: back, forward, in, out or live. */
export function moved(window, how, now) {
  const { from, to } = edges(window, now);
  const span = to - from;
  if (how === "live") return { ...window, live: true };
  if (how === "back") return between(window, from - span / 2, to - span / 2, now);
  if (how === "forward") return between(window, from + span / 2, to + span / 2, now);
  const change = how === "in" ? -span / 4 : span / 2;
  return window.live
    ? { ...window, span: Math.min(LONGEST_SECONDS, Math.max(SHORTEST_SECONDS, span + 2 * change)) }
    : between(window, from - change, to + change, now);
}
