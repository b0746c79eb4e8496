// The columns of one GPU over time, in the shape of /v1/history: `at` ascending, a gap is one entry of nulls.

import { KINDS } from "./colours.js";

const NUMBERS = [
  "taken_bytes",
  "taken_max_bytes",
  "free_bytes",
  "free_min_bytes",
  "leased_bytes",
  "utilization_percent",
  "temperature_celsius",
  "power_watts",
];
// More than any screen shows; what is appended while the page stays open is thinned out to this.
const KEPT = 2400;
// As many as the daemon tells of by name; of more the smallest are shown among the others.
const MOST_TENANTS = 32;
const OTHERS = { tenant: "others", kind: "others" };
// Between two looks of the slowest daemon: a longer silence is drawn as one.
const SILENCE_SECONDS = 30;

/** A GPU of whose past nothing is known. */
export function empty(gpu) {
  const made = { uuid: gpu.uuid, index: gpu.index, name: gpu.name, total_bytes: gpu.total_bytes, at: [], tenants: [] };
  for (const name of NUMBERS) made[name] = [];
  return made;
}

function push(series, at, numbers, sizes) {
  series.at.push(at);
  for (const name of NUMBERS) series[name].push(numbers[name] ?? null);
  for (const column of series.tenants) column.bytes.push(sizes ? (sizes.get(column.tenant) ?? 0) : null);
}

const hasColumn = (series, { tenant }) => series.tenants.some((one) => one.tenant === tenant);

/** The column of a tenant; of one that was not there before, nothing but zeros. */
function column(series, { tenant, kind }) {
  if (!hasColumn(series, { tenant })) {
    series.tenants.push({ tenant, kind, bytes: series.taken_bytes.map((taken) => (taken === null ? null : 0)) });
  }
  return series.tenants.find((one) => one.tenant === tenant);
}

/** Of those that are gone the smallest become others, until a quarter of all places is free. */
function crowded(series, present) {
  const most = ({ bytes }) => bytes.reduce((highest, one) => Math.max(highest, one ?? 0), 0);
  const gone = series.tenants
    .filter(({ tenant }) => tenant !== OTHERS.tenant && !present.has(tenant))
    .map((one) => [most(one), one])
    .sort(([a], [b]) => a - b)
    .slice(0, MOST_TENANTS / 4)
    .map(([, one]) => one);
  if (!gone.length) return;
  const { bytes: others } = column(series, OTHERS);
  for (const { bytes } of gone) bytes.forEach((one, index) => one && (others[index] += one));
  series.tenants = series.tenants.filter((one) => !gone.includes(one));
}

/** What `gpu` of a snapshot says at `at` (epoch seconds) stands at the end. */
export function append(series, gpu, at) {
  const last = series.at.at(-1);
  if (last !== undefined && at <= last) return;
  if (gpu.taken_bytes === null || gpu.taken_bytes === undefined) {
    if (last !== undefined && series.taken_bytes.at(-1) !== null) push(series, at, {}, null);
    return;
  }
  const usual = last === undefined ? 0 : (series.step ?? 0) * 2;
  if (last !== undefined && at - last > Math.max(SILENCE_SECONDS, usual)) push(series, last + 0.001, {}, null);
  const sizes = new Map((gpu.tenants ?? []).map((share) => [share.tenant, share.bytes]));
  for (const share of gpu.tenants ?? []) {
    if (hasColumn(series, share) || share.tenant === OTHERS.tenant) column(series, share);
    else {
      if (series.tenants.length >= MOST_TENANTS) crowded(series, sizes);
      const named = series.tenants.length < MOST_TENANTS;
      if (!named) sizes.set(OTHERS.tenant, (sizes.get(OTHERS.tenant) ?? 0) + share.bytes);
      column(series, named ? share : OTHERS);
    }
  }
  const numbers = { ...gpu, taken_max_bytes: gpu.taken_bytes, free_min_bytes: gpu.free_bytes };
  series.total_bytes = gpu.total_bytes;
  push(series, at, numbers, sizes);
  if (series.at.length > KEPT) keep(series, thin(series, -Infinity, Infinity, KEPT / 2));
}

/** Only the entries at `indices` stay. */
function keep(series, indices) {
  const pick = (column) => indices.map((index) => column[index]);
  series.at = pick(series.at);
  for (const name of NUMBERS) series[name] = pick(series[name]);
  for (const column of series.tenants) column.bytes = pick(column.bytes);
}

/** What is older than `from` is forgotten, but for the one entry that the left edge is drawn from. */
export function forget(series, from) {
  const first = before(series.at, from);
  if (first > 0)
    for (const column of [series.at, ...NUMBERS.map((name) => series[name]), ...series.tenants.map((one) => one.bytes)])
      column.splice(0, first);
}

/** The last index whose time is at most `at`, 0 where there is none. */
function before(times, at) {
  let low = 0;
  let high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] <= at) low = middle + 1;
    else high = middle;
  }
  return Math.max(0, low - 1);
}

/** The index nearest to `at`; -1 where there are none. */
export function nearest(times, at) {
  if (!times.length) return -1;
  const index = before(times, at);
  return index + 1 < times.length && times[index + 1] - at < at - times[index] ? index + 1 : index;
}

/** At most `points` indices of the window: of each stretch of time the lowest and the highest, and every gap. */
export function thin(series, from, to, points) {
  const { at, taken_bytes: taken } = series;
  if (!at.length) return [];
  const first = before(at, from);
  const last = Math.min(at.length - 1, before(at, to) + 1);
  const count = last - first + 1;
  if (count <= points) return Array.from({ length: count }, (_, step) => first + step);
  const buckets = Math.max(1, Math.floor(points / 3));
  const width = (at[last] - at[first]) / buckets || 1;
  const chosen = [];
  for (let index = first; index <= last;) {
    const end = at[first] + (Math.floor((at[index] - at[first]) / width) + 1) * width;
    let [low, high, gap] = [-1, -1, -1];
    for (; index <= last && at[index] < end; index++) {
      if (taken[index] === null) gap = gap < 0 ? index : gap;
      else {
        if (low < 0 || taken[index] < taken[low]) low = index;
        if (high < 0 || taken[index] > taken[high]) high = index;
      }
    }
    if (low < 0 && gap < 0) index++;
    chosen.push(...new Set([low, high, gap].filter((one) => one >= 0).sort((a, b) => a - b)));
  }
  return chosen;
}

/** The tenants in the order in which they are drawn, from the bottom up. */
export function ordered(tenants) {
  return [...tenants].sort(
    (a, b) => KINDS.indexOf(a.kind) - KINDS.indexOf(b.kind) || (a.tenant < b.tenant ? -1 : a.tenant > b.tenant ? 1 : 0),
  );
}
