// The page: asks every two seconds while it is looked at, and keeps the window in the address.

import * as cards from "./cards.js";
import { ask, Away, follow, Refused } from "./daemon.js";
import { answer } from "./fit.js";
import * as frame from "./frame.js";
import * as link from "./link.js";
import { Log } from "./log.js";
import { knownGpus, Panel, wishedGpus } from "./panels.js";
import * as past from "./series.js";
import { themes } from "./theme.js";
import { epoch, rfc3339, say } from "./words.js";
import * as windows from "./window.js";

const BEAT_MS = 2000;
// Sensors and decisions are many words: they are asked for more seldom, and at once after an event.
const SLOW_BEATS = 5;
// A clock that is put back by less only delays the next moment. Whoever has not looked for so long has slept, or was
// too busy: the daemon knows what was missed.
const [SLEW_SECONDS, ASLEEP_MS] = [5, 20000];
const $ = (id) => document.getElementById(id);

const state = {
  window: windows.read(location.hash),
  snapshot: null,
  series: new Map(),
  panels: new Map(),
  health: null,
  skew: 0,
  lostAt: null,
  asked: 0,
  lookedAt: Infinity,
  recorded: true,
};
let [beat, timer, stream] = [0, null, null];

const now = () => Date.now() / 1000 + state.skew;
const log = new Log({
  events: $("events"),
  decisions: $("decisions"),
  filter: $("filter"),
  nothing: $("no-events"),
  noDecisions: $("no-decisions"),
  find: async (id) =>
    (await ask("v1/decisions?limit=500").catch(() => null))?.decisions.find((one) => one.id === id) ?? null,
});

// ---- asking ----

async function look() {
  try {
    const snapshot = await ask("v1/snapshot");
    if (state.lostAt !== null) await back();
    const [taken, before] = [snapshot, state.snapshot].map((one) => epoch(one?.taken_at));
    if (taken !== null) state.skew = taken + snapshot.age_seconds - Date.now() / 1000;
    state.snapshot = snapshot;
    // Its clock was put back: what was seen since then has not been yet, and would keep out what comes.
    const putBack = taken !== null && taken < before - SLEW_SECONDS;
    if (putBack) state.series.clear();
    if (putBack || Date.now() - state.lookedAt > ASLEEP_MS) await history();
    state.lookedAt = Date.now();
    append(snapshot, taken);
    tell();
    if (state.asked === 0) {
      // What is now stands there while the past is still on its way.
      await history();
      append(snapshot, taken);
      tell();
    }
    if (beat++ % SLOW_BEATS === 0) await slowly();
  } catch (problem) {
    lost(problem);
  }
}

async function slowly() {
  if (state.recorded === null) await history();
  const [health, { decisions }] = await Promise.all([ask("health"), ask("v1/decisions?limit=50")]);
  state.health = health;
  say($("version"), `version ${health.version}`);
  cards.troubles($("troubles"), health, state.snapshot);
  log.decisions(decisions);
}

/** The window's past: one answer for all GPUs. An answer that was overtaken by another wish is dropped. */
async function history() {
  const asked = ++state.asked;
  state.lookedAt = Date.now();
  const { from, to } = windows.edges(state.window, now());
  document.body.classList.add("asking");
  try {
    const answer = await ask(`v1/history?${query(from, to)}`);
    if (asked !== state.asked) return;
    state.recorded = true;
    $("no-history").hidden = true;
    state.series = new Map(answer.gpus.map((series) => [series.uuid, { ...series, step: answer.step_seconds }]));
    log.add(answer.events ?? []);
  } catch (problem) {
    if (!(problem instanceof Refused)) throw problem;
    // What cannot be read just now is asked for again.
    state.recorded = problem.status >= 500 ? null : false;
    say($("no-history"), `The past is not shown: ${problem.message}. The charts begin with what is seen from now on.`);
    $("no-history").hidden = false;
    log.add((await ask("v1/events?limit=500")).events);
  } finally {
    if (asked === state.asked) document.body.classList.remove("asking");
  }
}

function query(from, to) {
  const points = (state.snapshot?.gpus.length ?? 1) > 4 && !state.window.gpu ? 300 : 600;
  return new URLSearchParams({
    from: rfc3339(from),
    to: rfc3339(Math.ceil(to)),
    step: Math.max(1, Math.ceil((to - from) / points)),
  });
}

function append(snapshot, taken) {
  if (!state.window.live || taken === null) return;
  for (const gpu of allGpus()) {
    if (!state.series.has(gpu.uuid)) state.series.set(gpu.uuid, past.empty(gpu));
    const series = state.series.get(gpu.uuid);
    past.append(series, gpu, taken);
    if (state.recorded) past.forget(series, windows.edges(state.window, now()).from);
  }
}

// ---- the daemon away and back ----

function lost(problem) {
  if (!(problem instanceof Away || problem instanceof Refused)) throw problem;
  state.lostAt ??= now();
  link.gone(state.snapshot === null ? null : state.lostAt);
}

async function back() {
  link.returned(now() - state.lostAt);
  state.lostAt = null;
  listen();
  await history();
}

function listen() {
  stream?.close();
  stream = follow((event) => {
    log.add([event]);
    beat = 0;
    soon();
  });
}

let told = true;

/** Many events at once are told together. */
function soon() {
  if (told) requestAnimationFrame(() => (told = true) && tell());
  told = false;
}

// ---- telling ----

function tell() {
  const snapshot = state.snapshot;
  if (snapshot === null) return;
  if (state.lostAt === null && !document.hidden) link.shows(state.window);
  const undecided = snapshot.taken_at === null ? "The daemon has not looked yet." : "Nothing was decided yet.";
  say($("now"), snapshot.now ? `Now: ${snapshot.now}` : undecided);
  const fullest = Math.max(...snapshot.gpus.map((gpu) => gpu.used_percent ?? -1));
  document.title = fullest >= 0 ? `${Math.round(fullest)} % · vram-manager` : "vram-manager";
  const at = now();
  cards.ollama($("ollama"), snapshot.ollama, at);
  cards.comfyui($("comfyui"), snapshot.comfyui);
  cards.waiting($("waiting"), snapshot);
  cards.leases($("leases"), snapshot.leases, at);
  cards.nodes($("nodes"), snapshot.nodes, at);
  cards.floors($("floors"), snapshot.floors);
  cards.troubles($("troubles"), state.health, snapshot);
  answer(snapshot, [...state.series.values()]);
  draw();
}

const allGpus = () => knownGpus(state.snapshot, [...state.series.values()]);
const shownGpus = () => wishedGpus(allGpus(), state.window.gpu);

function draw() {
  const gpus = shownGpus();
  const edges = windows.edges(state.window, now());
  const compact = gpus.length > 2;
  $("gpus").classList.toggle("many", compact);
  $("no-gpu").hidden = gpus.length > 0 || state.snapshot.taken_at === null;
  for (const [uuid, panel] of state.panels) {
    if (!gpus.some((gpu) => gpu.uuid === uuid) || panel.compact !== compact) {
      panel.end();
      state.panels.delete(uuid);
    }
  }
  for (const [place, gpu] of gpus.entries()) {
    if (!state.panels.has(gpu.uuid)) state.panels.set(gpu.uuid, Object.assign(new Panel(gpu, hooks), { compact }));
    const { node } = state.panels.get(gpu.uuid);
    if ($("gpus").children[place] !== node) $("gpus").insertBefore(node, $("gpus").children[place] ?? null);
    state.panels.get(gpu.uuid).tell(gpu, state.series.get(gpu.uuid) ?? null, compact);
  }
  const events = log.within(edges.from, edges.to);
  for (const gpu of gpus) {
    const mine = events.filter((event) => event.gpu === null || event.gpu === undefined || event.gpu === gpu.uuid);
    state.panels
      .get(gpu.uuid)
      .draw({ series: state.series.get(gpu.uuid) ?? null, ...edges, limits: gpu.limits, events: mine, compact });
  }
  frame.times(state.window, edges);
  frame.chooser(allGpus(), state.window.gpu);
  frame.csv(query(edges.from, edges.to), state.window.gpu);
  log.show(edges);
  numbers();
}

function numbers() {
  const shown = shownGpus()
    .map((gpu) => state.series.get(gpu.uuid))
    .filter((series) => series?.at.length);
  frame.numbers(shown, windows.edges(state.window, now()));
}

// ---- wishes ----

/** A wish for another window: it goes through the address, so that the browser's own back button takes it back. */
function wish(window) {
  location.hash = windows.write(window);
}

const hooks = {
  moved: (at) => state.panels.forEach((panel) => panel.cursor.follow(at)),
  zoomed: (from, to) => wish(windows.between(state.window, from, to, now() + 1)),
  scaled: (how) => wish(windows.moved(state.window, how, now())),
  spoken: (words) => say($("spoken"), words),
};

async function changed() {
  state.window = windows.read(location.hash);
  tell();
  try {
    await history();
    tell();
  } catch (problem) {
    lost(problem);
  }
}

function typed() {
  const times = frame.typed();
  if (times) wish({ ...state.window, live: false, ...times, span: times.to - times.from });
}

function controls() {
  $("spans").addEventListener(
    "click",
    ({ target }) => target.dataset.span && wish({ ...state.window, live: true, span: Number(target.dataset.span) }),
  );
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => wish(windows.moved(state.window, button.dataset.move, now())));
  }
  for (const id of ["from", "to"]) $(id).addEventListener("change", typed);
  $("gpu").addEventListener("change", () =>
    wish({ ...state.window, ...windows.edges(state.window, now()), gpu: $("gpu").value || null }),
  );
  $("fit").addEventListener("input", () => state.snapshot && answer(state.snapshot, [...state.series.values()]));
  // Its answer changes with every look: it is spoken once, to whoever has asked.
  $("fit").addEventListener("change", () => say($("spoken"), $("fit-answer").textContent));
  $("table").addEventListener("toggle", numbers);
  themes($("theme"), (all) => state.panels.forEach((panel) => (all || panel.near) && panel.paint()));
  addEventListener("hashchange", changed);
  document.addEventListener("visibilitychange", seen);
}

/** Nobody looks: nothing is asked. Whoever comes back sees what was missed. */
function seen() {
  clearTimeout(timer);
  if (document.hidden) {
    stream?.close();
    link.badge("paused", "paused");
    return;
  }
  listen();
  const missed = state.snapshot === null ? Promise.resolve() : history().catch(lost);
  missed.then(turn);
}

async function turn() {
  clearTimeout(timer);
  try {
    await look();
  } finally {
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(turn, BEAT_MS);
  }
}

controls();
seen();
