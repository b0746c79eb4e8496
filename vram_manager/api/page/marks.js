// Events as marks above a chart and as words: what, who, how much, why.

import { duration, el, moment, size } from "./words.js";

const GOOD = ["freed", "repaired", "warmed_back", "sensor_back"];
const BAD = ["leak", "hard_limit", "sensor_lost", "ollama_stuck", "worker_dead", "repair_failed"];
const WARN = [
  "cpu_fallback",
  "soft_limit",
  "refused",
  "free_unconfirmed",
  "free_refused",
  "lease_expired",
  "readings_disagree",
];
const SHAPES = { good: "●", warn: "▲", bad: "◆", plain: "·" };
const SPEAK = {
  __proto__: null,
  free_asked: "asked to free",
  freed: "freed",
  free_unconfirmed: "free not confirmed",
  free_refused: "free not asked",
  model_detected: "model detected",
  cpu_fallback: "CPU fallback",
  repaired: "repaired",
  repair_failed: "not repaired",
  warmed_back: "warmed back",
  ollama_stuck: "stuck",
  pressure_began: "pressure",
  pressure_ended: "pressure is over",
  admitted: "admitted",
  refused: "refused",
  lease_ended: "lease ended",
  lease_expired: "lease expired",
  soft_limit: "soft limit",
  hard_limit: "hard limit",
  leak: "leak",
  dry_run: "dry run",
  worker_dead: "ComfyUI hangs",
  readings_disagree: "readings disagree",
  sensor_lost: "cannot be read",
  sensor_back: "can be read",
};
const SENSORS = { __proto__: null, nvml: "GPU", ollama: "Ollama", comfyui: "ComfyUI" };

/** "good", "warn", "bad", or "plain" for what is told in the list only. */
export function tone(type) {
  if (GOOD.includes(type)) return "good";
  if (BAD.includes(type)) return "bad";
  return WARN.includes(type) ? "warn" : "plain";
}

/** The type in words. */
export const typeName = (type) => SPEAK[type] ?? type.replaceAll("_", " ");

/** Who it is about. */
export function who(target) {
  if (!target) return "";
  return SENSORS[target] ?? target.replace(/^(ollama|worker):/, "");
}

/** "7.9 GiB in 2.1 s, used 91 % → 58 %": what is measured of it. */
export function measure(event) {
  const parts = [];
  if (event.freed_bytes)
    parts.push(`${size(event.freed_bytes)}${event.took_seconds ? ` in ${event.took_seconds.toFixed(1)} s` : ""}`);
  else if (event.took_seconds) parts.push(`after ${duration(event.took_seconds)}`);
  const { used_percent_before: before, used_percent_after: after } = event;
  if (typeof before === "number" && typeof after === "number")
    parts.push(`used ${before.toFixed(0)} % → ${after.toFixed(0)} %`);
  return parts.join(", ");
}

/** One event as one sentence. */
export function sentence(event) {
  const subject = [who(event.target), typeName(event.type)].filter(Boolean).join(": ");
  const much = measure(event);
  const stage = event.stage ? `(${event.stage})` : "";
  const what = [subject, much, stage].filter(Boolean).join(" ");
  return event.reason ? `${what}. ${event.reason}` : what;
}

/** The sign of an event's tone, as it also stands above the charts. */
export const sign = (type) =>
  el("span", { class: `sign ${tone(type)}`, "aria-hidden": "true", text: SHAPES[tone(type)] });

/** Marks that would touch become one: [{x, tone, events}], from left to right. `events` have `epoch`, ascending. */
export function clusters(events, x, area) {
  const made = [];
  const order = ["plain", "good", "warn", "bad"];
  for (const event of events) {
    const kind = tone(event.type);
    const place = x(event.epoch);
    if (kind === "plain" || place < area.left - 1 || place > area.right + 1) continue;
    const last = made.at(-1);
    if (last && place - last.from < 12) {
      last.events.push(event);
      if (order.indexOf(kind) > order.indexOf(last.tone)) last.tone = kind;
    } else made.push({ x: place, from: place, tone: kind, events: [event] });
  }
  return made;
}

/** Draws them in the lane above `area`, with a hair down through it. */
export function drawMarks(pen, marks, area, colours) {
  const y = area.top - 9;
  for (const mark of marks) {
    pen.strokeStyle = pen.fillStyle = colours[mark.tone];
    pen.lineWidth = 1;
    pen.globalAlpha = 0.5;
    pen.setLineDash([2, 3]);
    pen.beginPath();
    pen.moveTo(mark.x, area.top);
    pen.lineTo(mark.x, area.bottom);
    pen.stroke();
    pen.globalAlpha = 1;
    pen.setLineDash([]);
    pen.beginPath();
    if (mark.tone === "good") pen.arc(mark.x, y, 4, 0, 7);
    if (mark.tone === "warn")
      corners(pen, [
        [mark.x, y - 5],
        [mark.x + 5, y + 4],
        [mark.x - 5, y + 4],
      ]);
    if (mark.tone === "bad")
      corners(pen, [
        [mark.x, y - 6],
        [mark.x + 5, y],
        [mark.x, y + 6],
        [mark.x - 5, y],
      ]);
    pen.fill();
  }
}

function corners(pen, places) {
  places.forEach(([x, y], place) => (place ? pen.lineTo(x, y) : pen.moveTo(x, y)));
  pen.closePath();
}

/** The events of a mark as lines: at most five, and how many more. */
export function told(events) {
  const lines = events
    .slice(-5)
    .reverse()
    .map((event) =>
      el("p", { class: "event" }, sign(event.type), ` ${moment(event.epoch).slice(-8)} ${sentence(event)}`),
    );
  if (events.length > 5)
    lines.push(el("p", { class: "event quiet", text: `and ${events.length - 5} more in the list below` }));
  return lines;
}
