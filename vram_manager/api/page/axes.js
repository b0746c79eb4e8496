// The ticks of the axes: round sizes, and round times on the reader's clock.

import { clock, day, GIB } from "./words.js";

const DAY_SECONDS = 86400;

/** Round steps up to `total`. */
export function sizes(total, most) {
  const rounds = [0.5, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 256, 512].map((number) => number * GIB);
  const step = rounds.find((one) => total / one <= most) ?? total;
  // A card of 24 GiB has 23.99: its uppermost step is none too many.
  return Array.from({ length: Math.floor((total * 1.005) / step) + 1 }, (_, place) => ({
    value: Math.min(place * step, total),
  }));
}

const TIME_STEPS = [
  1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 432000, 864000,
  2592000,
];

/** At most `most` round times between two, round on the reader's clock. */
export function times(from, to, most) {
  const step = TIME_STEPS.find((one) => (to - from) / one <= most) ?? to - from;
  const ahead = new Date(from * 1000).getTimezoneOffset() * -60;
  const first = Math.ceil((from + ahead) / step) * step - ahead;
  return Array.from({ length: Math.max(0, Math.floor((to - first) / step) + 1) }, (_, place) => ({
    value: (first + place * step) * 1000,
  }));
}

/** Midnight is a day. */
export function timeWord(at, span) {
  return clock(at) === "00:00:00" && span > DAY_SECONDS / 2 ? day(at) : clock(at, span < 600);
}
