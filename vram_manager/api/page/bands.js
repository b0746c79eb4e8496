// What is drawn of a series: its bands, stacked, and the place in each where its name fits.

import { ordered } from "./series.js";
import { MIB, tenantName } from "./words.js";

// What was taken at most is a line of its own where a point stands for more than this.
const PEAK_STEP_SECONDS = 30;

/** The bands from the bottom up as points (ms, bytes); a gap is NaN. Those that are nowhere in sight are left out. */
export function bands(series, indices) {
  const { at, taken_bytes: taken, leased_bytes: leased, free_bytes: free, taken_max_bytes: peak } = series;
  const tops = indices.map((index) => (taken[index] === null ? NaN : 0));
  const points = (values) => indices.map((index, place) => ({ x: at[index] * 1000, y: values[place] }));
  const raised = (more) => {
    indices.forEach((index, place) => (tops[place] += Math.max(0, more(index, place) ?? 0)));
    return points([...tops]);
  };
  const made = [];
  for (const { tenant, kind, bytes } of ordered(series.tenants)) {
    if (indices.some((index) => bytes[index] > 0)) {
      made.push({ tenant, kind, word: tenantName(tenant), points: raised((index) => bytes[index]) });
    }
  }
  if (indices.some((index, place) => taken[index] - tops[place] > 64 * MIB)) {
    const word = "not told apart";
    made.push({ tenant: word, kind: "others", word, points: raised((index, place) => taken[index] - tops[place]) });
  }
  if (indices.some((index) => leased[index] > 0)) {
    made.push({ leased: true, points: raised((index) => Math.min(leased[index], free[index])) });
  }
  made.push({ free: true, points: raised((index, place) => taken[index] + free[index] - tops[place]) });
  made.push({ reserve: true, points: raised((index, place) => series.total_bytes - tops[place]) });
  if (series.step >= PEAK_STEP_SECONDS && indices.some((index) => peak[index] - taken[index] > 64 * MIB)) {
    made.push({ line: true, points: points(indices.map((index) => peak[index] ?? NaN)) });
  }
  return made;
}

/** Does it go up and down from point to point? */
export function isRough({ taken_bytes: taken, total_bytes: total }, indices) {
  const jumps = indices.filter(
    (index, place) => place > 0 && Math.abs(taken[index] - taken[indices[place - 1]]) > total / 20,
  );
  return jumps.length > indices.length / 4;
}

/** The middle of the highest place in a band that is `need` wide and high enough for a word, or null. */
export function widest(xs, tops, bottoms, scale, area, need) {
  let best = null;
  const above = tops.map((point) => scale.getPixelForValue(point.y));
  const below = tops.map((point, place) => scale.getPixelForValue(bottoms ? bottoms[place].y : 0));
  for (let first = 0; first < xs.length; first++) {
    if (!(below[first] - above[first] >= 14) || xs[first] < area.left) continue;
    let [low, high, last] = [Infinity, -Infinity, first];
    while (last < xs.length && xs[last] - xs[first] < need && below[last] - above[last] >= 14) {
      low = Math.min(low, below[last]);
      high = Math.max(high, above[last]);
      last++;
    }
    if (last >= xs.length || xs[last] - xs[first] < need || xs[first] + need > area.right) continue;
    const room = low - high;
    if (room >= 14 && room > (best?.room ?? 0) + 2) best = { room, x: xs[first] + need / 2, y: (low + high) / 2 };
  }
  return best;
}
