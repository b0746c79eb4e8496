// What happened, and what was decided: lists that only grow at the top, so that what is open stays open.

import { measure, sign, typeName, who } from "./marks.js";
import { clock, el, epoch, moment, say, size } from "./words.js";

// So many rows are shown, of so many events that a history has at most.
const SHOWN = 200;
const MOST = 500;

const UNIT = /_(bytes|seconds|percent)$/;

/** The numbers a decision was made on, as nested lists. */
function numbers(value, name = "") {
  if (Array.isArray(value))
    return value.length
      ? el("ul", {}, ...value.map((one) => el("li", {}, numbers(one, name))))
      : el("span", { text: "none" });
  if (value !== null && typeof value === "object") {
    return el(
      "dl",
      {},
      ...Object.entries(value).flatMap(([key, one]) => [
        el("dt", { text: key.replace(UNIT, "").replaceAll("_", " ") }),
        el("dd", {}, numbers(one, UNIT.test(key) ? key : name)),
      ]),
    );
  }
  if (typeof value === "number" && name.endsWith("_bytes")) return el("span", { text: size(value) });
  const unit = name.endsWith("_seconds") ? " s" : name.endsWith("_percent") ? " %" : "";
  const words = typeof value === "number" ? `${value}${unit}` : String(value ?? "not known");
  return el("span", { text: words });
}

function why(decision) {
  if (!decision) return el("p", { class: "quiet", text: "The numbers of this decision are no longer kept." });
  const action = decision.action
    ? ` Then asked: ${decision.action.target}${decision.action.stage ? ` (${decision.action.stage})` : ""}.`
    : "";
  return el(
    "div",
    { class: "why" },
    el("p", { text: `${decision.id}: ${decision.reason}.${action}` }),
    numbers(decision.inputs),
  );
}

export class Log {
  /** `find(id)` promises the decision of that id, or null. */
  constructor({ events, decisions, filter, nothing, noDecisions, find }) {
    Object.assign(this, { list: events, decided: decisions, filter, nothing, noDecisions, find });
    this.events = new Map();
    this.rows = new Map();
    this.folded = new Map();
    filter.addEventListener("change", () => this.show(this.window));
  }

  /** Adds events, in any order, each once; those of `/v1/events` and of a history. */
  add(events) {
    for (const event of events) {
      const at = epoch(event.at);
      if (at !== null && !this.events.has(event.id + event.at))
        this.events.set(event.id + event.at, { ...event, epoch: at });
    }
    if (this.events.size > 4000)
      this.events = new Map([...this.events].sort((a, b) => b[1].epoch - a[1].epoch).slice(0, 2000));
  }

  /** The events of a window, oldest first. */
  within(from, to) {
    return [...this.events.values()]
      .filter((event) => event.epoch >= from && event.epoch <= to)
      .sort((a, b) => a.epoch - b.epoch);
  }

  /** The list of a window, newest first. */
  show(window) {
    this.window = window;
    const within = this.within(window.from, window.to).reverse();
    this.types(within);
    const wanted = within.filter((event) => !this.filter.value || event.type === this.filter.value).slice(0, SHOWN);
    const rows = wanted.map((event) => {
      const key = event.id + event.at;
      if (!this.rows.has(key)) this.rows.set(key, this.row(event));
      return this.rows.get(key);
    });
    if (rows.length !== this.list.children.length || rows.some((row, place) => row !== this.list.children[place])) {
      // A row that stays is not moved: what has the focus keeps it.
      const keep = new Set(rows);
      [...this.list.children].forEach((row) => keep.has(row) || row.remove());
      rows.forEach(
        (row, place) =>
          this.list.children[place] === row || this.list.insertBefore(row, this.list.children[place] ?? null),
      );
    }
    if (this.rows.size > 1000) this.rows = new Map(wanted.map((event, place) => [event.id + event.at, rows[place]]));
    const more = within.length >= MOST || rows.length === SHOWN;
    say(
      this.nothing,
      rows.length === 0 ? "Nothing happened in this time." : "There are older ones: choose a shorter time to see them.",
    );
    this.nothing.hidden = rows.length > 0 && !more;
  }

  types(within) {
    const count = new Map();
    for (const { type } of within) count.set(type, (count.get(type) ?? 0) + 1);
    if (this.filter.value && !count.has(this.filter.value)) count.set(this.filter.value, 0);
    const wished = [
      ["", `everything (${within.length})`],
      ...[...count].sort().map(([type, times]) => [type, `${typeName(type)} (${times})`]),
    ];
    const has = [...this.filter.options].map((one) => one.value);
    if (has.length === wished.length && has.every((type, place) => type === wished[place][0])) {
      return wished.forEach(([, words], place) => say(this.filter.options[place], words));
    }
    const chosen = this.filter.value;
    this.filter.replaceChildren(...wished.map(([value, text]) => el("option", { value, text })));
    this.filter.value = chosen;
  }

  row(event) {
    const measured = measure(event);
    const what = el(
      "p",
      { class: "what" },
      sign(event.type),
      " ",
      el("b", { text: [who(event.target), typeName(event.type)].filter(Boolean).join(": ") }),
      measured ? ` ${measured}` : null,
      event.stage ? ` (${event.stage})` : null,
    );
    const time = el("time", { datetime: event.at, title: event.id, text: moment(event.epoch) });
    const row = el(
      "li",
      { "data-type": event.type },
      time,
      el("div", {}, what, event.reason ? el("p", { class: "reason", text: event.reason }) : null),
    );
    if (event.decision_id || event.action_id) {
      const label = `Why: ${typeName(event.type)} at ${clock(event.epoch)}`;
      row.lastElementChild.append(this.opened("why", label, async () => why(await this.behind(event))));
    }
    return row;
  }

  /** The decision behind an event: of a free that of the asking, as the proof comes many turns later. */
  async behind(event) {
    const asked = [...this.events.values()].find((one) => one.id === event.action_id && one.epoch <= event.epoch);
    const { decision_id: id, epoch: at } = asked ?? event;
    const decision = id ? await this.find(id) : null;
    // After a restart the daemon counts its decisions from one again: a later one of that name is another.
    return decision && epoch(decision.at) <= at + 1 ? decision : null;
  }

  /** Something that is filled when it is opened for the first time. */
  opened(word, label, content) {
    const summary = el("summary", { "aria-label": label, text: word });
    const made = el("details", {}, summary);
    made.addEventListener(
      "toggle",
      async () => made.open && made.children.length === 1 && made.append(await content()),
      { once: true },
    );
    return made;
  }

  /** Decisions, newest first; equal neighbours are one, with how often. */
  decisions(list) {
    this.noDecisions.hidden = list.length > 0;
    const rows = list.map((decision) => {
      const kept = this.folded.get(decision.id) ?? this.decision(decision);
      this.folded.set(decision.id, kept);
      kept.newest = decision;
      const [from, to] = [epoch(decision.at), epoch(decision.until)];
      say(kept.time, decision.count > 1 && to - from >= 1 ? `${moment(from)} – ${clock(to)}` : moment(from));
      say(kept.words, decision.reason);
      say(kept.times, decision.count > 1 ? `${decision.count.toLocaleString("en")} times` : "");
      return kept.row;
    });
    const ids = new Set(list.map((one) => one.id));
    for (const id of this.folded.keys()) if (!ids.has(id)) this.folded.delete(id);
    if (rows.length !== this.decided.children.length || rows[0] !== this.decided.children[0])
      this.decided.replaceChildren(...rows);
  }

  decision(decision) {
    const time = el("time", { datetime: decision.at });
    const words = el("p", { class: decision.action ? "what acted" : "what" });
    const times = el("p", { class: "quiet" });
    const kept = { time, words, times, newest: decision };
    const numbersOf = this.opened("its numbers", `The numbers of ${decision.id}`, async () => why(kept.newest));
    kept.row = el("li", { "data-decision": decision.id }, time, el("div", {}, words, times, numbersOf));
    return kept;
  }
}
