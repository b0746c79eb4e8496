// One panel for each GPU: its numbers now, its chart, and who has it. The table of who has it is the legend too.

import { swatch } from "./colours.js";
import { Cursor } from "./cursor.js";
import { Plot } from "./plot.js";
import { ordered } from "./series.js";
import { el, put, size, table, tenantName } from "./words.js";

const CERTAINTY = {
  measured: "somebody counts it",
  learned: "learned from an earlier free",
  perhaps: "what nobody accounts for",
};

const FRAME_MS = 12;

/** A GPU that only its past is known of, as one of a snapshot. */
const goneGpu = ({ uuid, index, name, total_bytes }) => ({
  ...{ uuid, index, name, total_bytes, gone: true },
  ...{ taken_bytes: null, free_bytes: null, used_percent: null },
});

/** Those of now, and those that were here within the window and cannot be seen any more. */
export function knownGpus(snapshot, allSeries) {
  const seen = snapshot?.gpus ?? [];
  const gone = allSeries.filter(({ at, uuid }) => at.length && !seen.some((gpu) => gpu.uuid === uuid));
  return [...seen, ...gone.map(goneGpu)];
}

/** The one that was chosen, or all. */
export function wishedGpus(all, chosen) {
  const one = all.filter((gpu) => gpu.uuid === chosen);
  return one.length ? one : all;
}

/** What a GPU is called. */
export const gpuName = (gpu) => `GPU ${gpu.index}`;

export class Panel {
  constructor(gpu, hooks) {
    this.uuid = gpu.uuid;
    this.head = el("div", { class: "head" });
    this.who = el("div", { class: "who" });
    this.empty = el("p", { class: "note over", hidden: true });
    const canvas = el("canvas", { "aria-hidden": "true" });
    this.box = el(
      "div",
      {
        class: "plot",
        tabindex: "0",
        role: "application",
        "aria-describedby": "keys",
        "aria-roledescription": "chart",
      },
      canvas,
      el("div", { class: "hair", hidden: true }),
      el("div", { class: "dragged", hidden: true }),
      el("div", { class: "tip", hidden: true }),
      this.empty,
    );
    this.node = el(
      "article",
      { class: "panel", "data-gpu": gpu.uuid },
      this.head,
      el("div", { class: "body" }, this.box, this.who),
    );
    this.plot = new Plot(canvas);
    this.cursor = new Cursor(this.box, this.plot, hooks);
    this.near = null;
    this.watch = new IntersectionObserver(([seen]) => this.seen(seen.isIntersecting), { rootMargin: "25%" });
    this.watch.observe(this.box);
  }

  /** The numbers of now, and the table; `series` adds who was there within the window. */
  tell(gpu, series, compact) {
    this.box.setAttribute("aria-label", `Memory of ${gpuName(gpu)} over time`);
    put(this.head, el("h3", {}, gpuName(gpu), el("span", { text: gpu.name })), chips(gpu), figures(gpu));
    if (gpu.taken_bytes === null) {
      const why = gpu.gone ? "It cannot be seen now." : `Its memory is not known now: ${gpu.why ?? "no reading yet"}`;
      return put(this.who, el("p", { class: "note", text: why }));
    }
    const legend = whoHasIt(gpu, series);
    if (!compact) return put(this.who, bar(gpu), legend);
    if (!this.who.querySelector("details")) {
      this.who.replaceChildren(el("div"), el("details", {}, el("summary", { text: "Who has it" }), el("div")));
    }
    put(this.who.firstElementChild, bar(gpu));
    put(this.who.querySelector("details > div"), legend);
  }

  /** Draws the window. Without the chart library the words say what to install. */
  draw(view) {
    const nothing =
      view.series === null ||
      view.series.total_bytes === null ||
      !view.series.at.some((at) => at >= view.from && at <= view.to);
    this.empty.hidden = !nothing && Boolean(globalThis.Chart);
    this.empty.textContent = globalThis.Chart
      ? "Nothing is known of this time."
      : "No chart: its library is not installed beside the daemon (pip install chartkick).";
    this.view = globalThis.Chart && view.series !== null && view.series.total_bytes !== null ? view : null;
    // The observer tells only after a first picture without it.
    this.near ??= this.box.getBoundingClientRect().top < innerHeight;
    if (this.near) soon(this);
  }

  /** Of eight charts four are in sight: the others are drawn when somebody scrolls to them. */
  seen(near) {
    this.near = near;
    if (near) soon(this);
  }

  paint() {
    if (!this.view) return;
    this.plot.show(this.view);
    this.cursor.refresh();
  }

  end() {
    this.watch.disconnect();
    waiting.delete(this);
    this.plot.end();
    this.node.remove();
  }
}

const waiting = new Set();

/** Drawn with the next picture, or the one after: as many as there is time for, so that the page never stands still. */
function soon(panel) {
  if (waiting.size === 0) requestAnimationFrame(someOfThem);
  waiting.add(panel);
}

function someOfThem(began) {
  try {
    for (const panel of waiting) {
      waiting.delete(panel);
      panel.paint();
      if (performance.now() - began > FRAME_MS) break;
    }
  } finally {
    if (waiting.size > 0) requestAnimationFrame(someOfThem);
  }
}

function chips(gpu) {
  const made = [];
  if (gpu.trust && gpu.trust !== "measured") made.push(`${gpu.trust}: ${gpu.source}`);
  if (gpu.unified) made.push("shares the CPU's memory");
  if (gpu.asleep) made.push("asleep");
  return made.length ? el("ul", { class: "chips" }, ...made.map((text) => el("li", { text }))) : null;
}

function figures(gpu) {
  if (gpu.taken_bytes === null) return null;
  const rest = [
    ["busy", gpu.utilization_percent, "%"],
    ["", gpu.temperature_celsius, "°C"],
    ["", gpu.power_watts, "W"],
  ].filter(([, number]) => number !== null && number !== undefined);
  return el(
    "p",
    { class: "figures" },
    "now ",
    el("strong", { text: size(gpu.taken_bytes) }),
    ` of ${size(gpu.total_bytes)} taken (${Math.round(gpu.used_percent)} %), `,
    el("strong", { text: size(gpu.free_bytes) }),
    gpu.leased_bytes > 0 ? ` free, ${size(gpu.leased_bytes)} leased` : " free",
    el("span", {
      class: "quiet",
      text: rest.map(([word, number, unit]) => ` · ${Math.round(number)} ${unit}${word ? ` ${word}` : ""}`).join(""),
    }),
  );
}

/** The same as one bar; the table beside it says it in words. */
function bar(gpu) {
  const part = (band, bytes, more) => {
    const made = band ? swatch(document, band) : el("span", { class: more, "aria-hidden": "true" });
    made.style.setProperty("flex-grow", String(bytes / gpu.total_bytes));
    return made;
  };
  const bands = ordered(gpu.tenants ?? []).filter((share) => share.bytes > 0);
  const leased = Math.min(gpu.leased_bytes ?? 0, gpu.free_bytes);
  return el(
    "div",
    { class: "whole", "aria-hidden": "true" },
    ...bands.map((band) => part(band, band.bytes)),
    leased > 0 ? part(null, leased, "swatch leased") : null,
    part(null, gpu.free_bytes - leased, "room"),
  );
}

function whoHasIt(gpu, series) {
  const now = new Map((gpu.tenants ?? []).map((share) => [share.tenant, share]));
  const gone = (series?.tenants ?? []).filter((one) => !now.has(one.tenant) && one.bytes.some((bytes) => bytes > 0));
  const name = (band) =>
    el("span", { class: "name" }, swatch(document, band), el("span", { text: tenantName(band.tenant) }));
  const rows = ordered([...now.values(), ...gone]).map((band) => [
    name(band),
    now.has(band.tenant) ? size(band.bytes) : "–",
    now.has(band.tenant) ? el("span", { title: CERTAINTY[band.certainty], text: band.certainty }) : "earlier",
  ]);
  const plain = (mark, text) =>
    el("span", { class: "name" }, el("span", { class: `swatch ${mark}`, "aria-hidden": "true" }), el("span", { text }));
  if (gpu.leased_bytes > 0) rows.push([plain("leased", "leased, not taken"), size(gpu.leased_bytes), "promised"]);
  rows.push([plain("room", "free"), size(gpu.free_bytes), ""]);
  return table(["Who has it", "Now", "How sure"], rows, {
    right: [1],
    caption: `Who has the memory of ${gpuName(gpu)}`,
  });
}
