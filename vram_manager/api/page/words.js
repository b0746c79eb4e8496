// Sizes, times and elements in the voice of the log. Data becomes text here, and markup nowhere: textContent only.

export const MIB = 2 ** 20;
export const GIB = 2 ** 30;
const UNITS = { b: 1, kb: 1e3, mb: 1e6, gb: 1e9, tb: 1e12, kib: 2 ** 10, mib: MIB, gib: GIB, tib: 2 ** 40 };
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

/** "5.8 GiB", as every line of the daemon says it; what is not known is said so. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return "not known";
  return Math.abs(bytes) < GIB / 10 && bytes !== 0
    ? `${Math.round(bytes / MIB)} MiB`
    : `${(bytes / GIB).toFixed(1)} GiB`;
}

/** The bytes of "24 GiB", "11.5GB" or "512 MiB"; null for what is none. */
export function parseSize(text) {
  const found = /^\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-z]{1,3})\s*$/i.exec(text);
  const factor = found && UNITS[found[2].toLowerCase()];
  const bytes = factor ? Number(found[1]) * factor : 0;
  return bytes > 0 && bytes <= 2 ** 50 ? Math.round(bytes) : null;
}

/** "12 s", "4 min", "3 h 20 min", "2 d". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "not known";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 90) return `${whole} s`;
  const minutes = Math.round(whole / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 720) return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
  if (whole < 172800) return `${Math.round(whole / 3600)} h`;
  return `${Math.round(whole / 86400)} d`;
}

const two = (number) => String(number).padStart(2, "0");

/** "21:04:10" of epoch seconds, in the reader's own time. */
export function clock(at, seconds = true) {
  const date = new Date(at * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}${seconds ? `:${two(date.getSeconds())}` : ""}`;
}

/** "21 Nov". */
export const day = (at) => DAY.format(new Date(at * 1000));

/** "21 Nov 21:04:10". */
export function moment(at, seconds = true) {
  return `${day(at)} ${clock(at, seconds)}`;
}

/** The value of an input of type datetime-local. */
export function localInput(at) {
  const date = new Date(at * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}T${clock(at)}`;
}

/** RFC 3339 in UTC, whole seconds: what the API takes and a link carries. */
export const rfc3339 = (at) => new Date(Math.round(at) * 1000).toISOString().replace(".000Z", "Z");

/** Epoch seconds of a time in RFC 3339, null for what is none. */
export function epoch(text) {
  const at = Date.parse(text ?? "");
  return Number.isNaN(at) ? null : at / 1000;
}

// Controls, and marks that turn the direction of whatever follows them.
const STEERING = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;
const LONGEST = 1000;

/** Text from outside as it is shown: it steers nothing around it, and fills no more than some lines. */
export function plain(text) {
  const said = String(text).replace(STEERING, " ");
  return said.length > LONGEST ? `${said.slice(0, LONGEST)}…` : said;
}

const part = (child) => (typeof child === "string" ? plain(child) : child);

/** An element. `more` are attributes; `class` and `text` as they say. Children are elements or strings. */
export function el(tag, more = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = plain(value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map(part));
  return made;
}

/** A table with one header row; a cell is a string or an element, and numbers stand right where `right` says so. */
export function table(heads, rows, { right = [], caption = null } = {}) {
  const cell = (tag, what, column) => {
    const made = el(tag, { class: right.includes(column) ? "right" : null, scope: tag === "th" ? "col" : null });
    made.append(part(what));
    return made;
  };
  return el(
    "table",
    {},
    caption && el("caption", { class: "unseen", text: caption }),
    el("thead", {}, el("tr", {}, ...heads.map((head, column) => cell("th", head, column)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((what, column) => cell("td", what, column))))),
  );
}

/** `slot` holds these children, and is touched only where that changes what it says. */
export function put(slot, ...children) {
  const made = slot.cloneNode(false);
  made.append(...children.filter((child) => child !== null));
  if (!slot.isEqualNode(made)) slot.replaceChildren(...made.childNodes);
}

/** `slot` says `text`; a live region speaks only what is new. */
export function say(slot, text) {
  const said = plain(text);
  if (slot.textContent !== said) slot.textContent = said;
}

/** "ollama:llama3.1:8b" as people say it. */
export function tenantName(tenant) {
  if (tenant === "comfyui") return "ComfyUI";
  if (tenant === "comfyui in use") return "ComfyUI in use";
  if (tenant === "comfyui cached") return "ComfyUI cached";
  if (tenant === "comfyui unseen") return "ComfyUI beside torch";
  return plain(tenant.replace(/^(ollama|worker|process):/, ""));
}
