// The cursor over a chart, by pointer and by keyboard: what was, at that time; and the drag that zooms.

import { swatch } from "./colours.js";
import { sentence, told } from "./marks.js";
import { nearest, ordered } from "./series.js";
import { el, moment, size, tenantName } from "./words.js";

const NEAR_PIXELS = 7;
const DRAG_PIXELS = 6;

/** What `series` says at `index`, in words for the ear. */
function aloud(series, index, events) {
  const { taken_bytes: taken, free_bytes: free, leased_bytes: leased } = series;
  const time = moment(series.at[index]);
  if (taken[index] === null) return `${time}: not known.`;
  const parts = ordered(series.tenants)
    .filter(({ bytes }) => bytes[index] > 0)
    .map(({ tenant, bytes }) => `${tenantName(tenant)} ${size(bytes[index])}`);
  const more = leased[index] > 0 ? `, leased ${size(leased[index])}` : "";
  const happened = events.map((event) => ` ${sentence(event)}`).join("");
  return `${time}: ${size(taken[index])} taken, ${size(free[index])} free${more}. ${parts.join(", ")}.${happened}`;
}

function lines(series, index) {
  const { taken_bytes: taken, taken_max_bytes: peak, free_bytes: free, leased_bytes: leased } = series;
  const line = (mark, name, value) =>
    el(
      "div",
      { class: "line" },
      mark ?? el("span", { class: "swatch none" }),
      el("span", { text: name }),
      el("b", { text: value }),
    );
  if (taken[index] === null) return [el("p", { text: "Not known: nothing was recorded here." })];
  const made = ordered(series.tenants)
    .filter(({ bytes }) => bytes[index] > 0)
    .reverse()
    .map((band) => line(swatch(document, band), tenantName(band.tenant), size(band.bytes[index])));
  made.push(line(null, "taken", size(taken[index])));
  if (peak[index] > taken[index] * 1.01) made.push(line(null, "taken at most", size(peak[index])));
  if (leased[index] > 0) made.push(line(null, "leased", size(leased[index])));
  made.push(line(null, "free", size(free[index])));
  const rest = [
    [series.utilization_percent[index], "% busy"],
    [series.temperature_celsius[index], "°C"],
    [series.power_watts[index], "W"],
  ].filter(([number]) => number !== null && number !== undefined);
  if (rest.length)
    made.push(
      el("p", { class: "quiet", text: rest.map(([number, unit]) => `${Math.round(number)} ${unit}`).join(" · ") }),
    );
  return made;
}

/**
 * Makes `box` (with its canvas, hair, drag and tip inside) answer to pointer and keyboard.
 * `hooks`: moved(at or null) for the other charts, zoomed(from, to), scaled("in" or "out"), spoken(words).
 */
export class Cursor {
  constructor(box, plot, hooks) {
    Object.assign(this, { box, plot, hooks, time: null, began: null, keyboard: false });
    this.hair = box.querySelector(".hair");
    this.tip = box.querySelector(".tip");
    this.dragged = box.querySelector(".dragged");
    box.addEventListener("pointermove", (event) => this.pointed(event));
    box.addEventListener("pointerdown", (event) => this.pressed(event));
    box.addEventListener("pointerup", (event) => this.released(event));
    box.addEventListener("pointercancel", () => this.leave());
    box.addEventListener("pointerleave", (event) => this.left(event));
    box.addEventListener("keydown", (event) => this.typed(event));
    box.addEventListener("blur", () => this.leave());
  }

  place(event) {
    const { left, right } = this.plot.area;
    return Math.min(right, Math.max(left, event.clientX - this.plot.canvas.getBoundingClientRect().left));
  }

  pressed(event) {
    if (!this.plot.area || event.button !== 0) return;
    this.began = this.place(event);
    this.box.setPointerCapture(event.pointerId);
    this.pointed(event);
  }

  pointed(event) {
    if (!this.plot.area) return;
    const x = this.place(event);
    this.keyboard = false;
    this.show(this.plot.nearest(this.plot.at(x)), x);
    const wide = this.began !== null && Math.abs(x - this.began) >= DRAG_PIXELS;
    this.dragged.hidden = !wide;
    if (wide) {
      this.dragged.style.left = `${Math.min(x, this.began)}px`;
      this.dragged.style.width = `${Math.abs(x - this.began)}px`;
    }
  }

  released(event) {
    if (this.began === null) return;
    const [from, to] = [this.began, this.place(event)].sort((a, b) => a - b);
    this.began = null;
    this.dragged.hidden = true;
    if (to - from >= DRAG_PIXELS) this.hooks.zoomed(this.plot.at(from), this.plot.at(to));
  }

  /** What a finger has pointed at stays when it is lifted, until it taps elsewhere. */
  left(event) {
    if (event.pointerType === "mouse" && this.began === null && !this.keyboard) this.leave();
  }

  typed(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    const { indices, times } = this.plot.drawn ?? { indices: [] };
    if (!indices.length || event.ctrlKey || event.altKey || event.metaKey) return;
    const now = this.time === null ? indices.length : nearest(times, this.time);
    let next = null;
    if (event.key in steps) next = now + steps[event.key] * (event.shiftKey ? 10 : 1);
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = indices.length - 1;
    else if (event.key === "PageUp" || event.key === "PageDown")
      return this.jump(event, times[Math.min(now, times.length - 1)]);
    else if (event.key === "+" || event.key === "=") this.hooks.scaled("in");
    else if (event.key === "-") this.hooks.scaled("out");
    else if (event.key === "Escape") this.leave();
    else return;
    event.preventDefault();
    if (next !== null) this.speak(indices[Math.min(indices.length - 1, Math.max(0, next))]);
  }

  /** To the mark before or after `at`. */
  jump(event, at) {
    event.preventDefault();
    const x = this.plot.x(at);
    const mark =
      event.key === "PageUp"
        ? this.plot.marks.findLast((one) => one.x < x - NEAR_PIXELS)
        : this.plot.marks.find((one) => one.x > x + NEAR_PIXELS);
    if (mark) this.speak(this.plot.nearest(this.plot.at(mark.x)), mark);
    else this.hooks.spoken("No further event on this side.");
  }

  speak(index, mark = null) {
    const { series } = this.plot.view;
    this.keyboard = true;
    const events = this.show(index, mark ? mark.x : this.plot.x(series.at[index]));
    this.hooks.spoken(aloud(series, index, events));
  }

  /** Shows what was at `index` of the series, with the cursor at `x`; the events that are near. */
  show(index, x) {
    if (index < 0) return [];
    const { series } = this.plot.view;
    this.time = series.at[index];
    const events = this.plot.marks.filter((mark) => Math.abs(mark.x - x) <= NEAR_PIXELS).flatMap((mark) => mark.events);
    this.tip.replaceChildren(
      el("p", { class: "when", text: moment(series.at[index]) }),
      ...lines(series, index),
      ...told(events),
    );
    this.tip.hidden = false;
    const room = this.box.clientWidth;
    const width = this.tip.offsetWidth;
    const left = x + 14 + width <= room ? x + 14 : Math.max(0, x - 14 - width);
    this.tip.style.left = `${Math.min(left, Math.max(0, room - width))}px`;
    this.hooks.moved(this.plot.at(x));
    return events;
  }

  /** After the chart was drawn anew: what is said is of the same time still. */
  refresh() {
    if (this.time !== null) this.show(this.plot.nearest(this.time), this.plot.x(this.time));
  }

  /** The hair alone: the cursor is over another chart, or nowhere. */
  follow(at) {
    const { area } = this.plot;
    const x = at === null || !area ? -1 : this.plot.x(at);
    this.hair.hidden = !area || x < area.left || x > area.right;
    if (this.hair.hidden) return;
    this.hair.style.left = `${x}px`;
    this.hair.style.top = `${area.top}px`;
    this.hair.style.height = `${area.bottom - area.top}px`;
  }

  leave() {
    this.time = this.began = null;
    this.keyboard = false;
    this.tip.hidden = this.dragged.hidden = true;
    this.hooks.moved(null);
  }
}
