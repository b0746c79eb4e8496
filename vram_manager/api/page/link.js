// Whether the daemon answers: a word in the corner, and an alarm while it does not.

import { clock, duration, say } from "./words.js";

const $ = (id) => document.getElementById(id);

/** The word in the corner; `kind` is live, past, paused or lost. */
export function badge(kind, text) {
  $("link").dataset.state = kind;
  say($("link"), text);
}

/** What is shown is the window's. */
export const shows = ({ live }) => (live ? badge("live", "live") : badge("past", "the past"));

/** Nobody answers; what is shown was seen at `seen`, null for nothing. */
export function gone(seen) {
  const since = seen === null ? "Nothing was seen yet." : `What you see is of ${clock(seen)}.`;
  say($("alarm"), `The daemon does not answer. ${since} It is asked again every 2 s.`);
  $("alarm").hidden = false;
  badge("lost", "no answer");
}

/** It answers again, after so many seconds. */
export function returned(away) {
  say($("alarm"), "");
  $("alarm").hidden = true;
  say($("spoken"), `The daemon answers again, after ${duration(away)}.`);
}
