// Who is drawn how: a colour that stays with its tenant, and a pattern by kind, so that colour is not all there is.
// The colours are Okabe and Ito's, which the colour-blind can tell apart.

const PALETTE = ["#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#d8c81c", "#8a6fd1", "#8c6d46"];
const COMFYUI = "#2f86c6";
const OTHERS = "#8b949e";
const PATTERNS = {
  comfyui_cached: "hatch",
  comfyui_unseen: "dots",
  worker: "stripes",
  process: "cross",
};
const KEY = "vram-colours";
export const KINDS = ["ollama", "comfyui_in_use", "comfyui_cached", "comfyui_unseen", "worker", "process", "others"];

function remembered() {
  try {
    return new Map(Object.entries(JSON.parse(localStorage.getItem(KEY) ?? "{}")));
  } catch {
    return new Map();
  }
}

const given = remembered();

function hash(text) {
  let sum = 2166136261;
  for (const letter of text) sum = Math.imul(sum ^ letter.codePointAt(0), 16777619);
  return sum >>> 0;
}

/** The place in the palette: by the name, or the next one while others have that. Remembered, so it never changes. */
function place(tenant) {
  const has = given.get(tenant);
  if (Number.isInteger(has) && has >= 0 && has < PALETTE.length) return has;
  const first = hash(tenant) % PALETTE.length;
  const uses = PALETTE.map((_, slot) => [...given.values()].filter((taken) => taken === slot).length);
  const least = Math.min(...uses);
  const slot = PALETTE.map((_, step) => (first + step) % PALETTE.length).find((one) => uses[one] === least);
  if (given.size > 200) given.clear();
  given.set(tenant, slot);
  try {
    localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(given)));
  } catch {
    // Without storage the colour comes from the name alone, next time too.
  }
  return slot;
}

/** The colour of a tenant. */
export function colour({ kind, tenant }) {
  if (kind.startsWith("comfyui")) return COMFYUI;
  return kind === "others" ? OTHERS : PALETTE[place(tenant)];
}

/** The name of its pattern: "solid", "hatch", "dots", "stripes" or "cross". */
export const patternName = ({ kind }) => PATTERNS[kind] ?? "solid";

/** Black or white, whichever can be read on the colour. */
export function inkOn(background) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(background.slice(at, at + 2), 16) / 255);
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const light = 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  return light > 0.18 ? "#000000" : "#ffffff";
}

const made = new Map();

/** What a canvas fills with: `paint`, with its pattern in `ink` over it. */
export function fill(context, { paint, pattern }, ink) {
  const key = `${paint} ${pattern} ${ink}`;
  if (!made.has(key)) made.set(key, pattern === "solid" ? paint : tiled(context, paint, pattern, ink));
  return made.get(key);
}

function tiled(context, paint, name, ink) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.fillStyle = paint;
  pen.fillRect(0, 0, 8, 8);
  pen.strokeStyle = pen.fillStyle = ink;
  pen.lineWidth = 1.6;
  pen.globalAlpha = 0.75;
  pen.beginPath();
  if (name === "hatch") for (const from of [-8, 0, 8]) (pen.moveTo(from - 1, 9), pen.lineTo(from + 9, -1));
  if (name === "stripes" || name === "cross") (pen.moveTo(0, 4), pen.lineTo(8, 4));
  if (name === "cross") (pen.moveTo(4, 0), pen.lineTo(4, 8));
  if (name === "dots") (pen.arc(4, 4, 1.4, 0, 7), pen.fill());
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

/** The small square beside a name. */
export function swatch(document, band) {
  const made = document.createElement("span");
  made.className = `swatch ${patternName(band)}`;
  made.setAttribute("aria-hidden", "true");
  made.style.setProperty("--colour", colour(band));
  return made;
}
