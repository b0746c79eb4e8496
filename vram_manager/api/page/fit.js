// Will it fit? An estimate from the last numbers.

import { el, GIB, parseSize, put, size, tenantName } from "./words.js";

// VRAM_SAFETY_MARGIN_MB where the daemon does not say.
const MARGIN_BYTES = 2 * GIB;
const note = (text) => el("p", { class: "note", text });

const $ = (id) => document.getElementById(id);

/** Answers what somebody typed, from a snapshot; `allSeries` know further models. */
export function answer(snapshot, allSeries) {
  const known = knownModels(snapshot, allSeries);
  const names = [...known.keys()].sort();
  if (names.join() !== [...$("fit-models").options].map((one) => one.value).join()) {
    $("fit-models").replaceChildren(...names.map((value) => el("option", { value })));
  }
  fit($("fit-answer"), $("fit").value, snapshot, known);
}

/** Sizes by model: of those loaded, and the most that others had within the window. */
function knownModels(snapshot, allSeries) {
  const found = new Map();
  for (const series of allSeries) {
    for (const { tenant, kind, bytes } of series.tenants) {
      if (kind === "ollama")
        found.set(
          tenantName(tenant),
          bytes.reduce((most, one) => Math.max(most, one ?? 0), found.get(tenantName(tenant)) ?? 0),
        );
    }
  }
  for (const model of snapshot?.ollama?.models ?? []) found.set(model.name, model.size_bytes);
  found.forEach((bytes, name) => bytes > 0 || found.delete(name));
  return found;
}

/** An estimate from the last numbers: only POST /v1/admissions also knows the line, and that needs the token. */
function fit(slot, wish, snapshot, known) {
  if (!wish.trim()) return put(slot, note("Say a size with its unit, such as 24 GiB, 11.5GB or 512 MiB."));
  const bytes = known.get(wish.trim()) ?? parseSize(wish);
  if (bytes === null)
    return put(
      slot,
      note(`${wish.trim()}: must be a size with a unit, such as 24GiB, 11.5GB or 512MiB, or a model from the list.`),
    );
  const loaded = snapshot?.ollama?.models?.some((model) => model.name === wish.trim() && model.cpu_ratio === 0);
  if (loaded) return put(slot, el("p", { class: "answer good", text: `${wish.trim()} is on the GPU already.` }));
  const gpus = (snapshot?.gpus ?? []).filter((gpu) => gpu.free_bytes !== null);
  if (!gpus.length) return put(slot, note("Not known: no GPU can be read."));
  const margin = snapshot.margin_bytes ?? MARGIN_BYTES;
  const lines = gpus.map((gpu) => {
    const spare = gpu.free_bytes - (gpu.leased_bytes ?? 0) - margin;
    const yielding = (gpu.tenants ?? [])
      .filter((one) => one.kind === "ollama" || one.kind.startsWith("comfyui"))
      .reduce((sum, one) => sum + one.bytes, 0);
    const [tone, words] =
      spare >= bytes
        ? ["good", `yes: ${size(spare - bytes)} to spare`]
        : spare + yielding >= bytes
          ? ["warn", `not now: ${size(bytes - spare)} short; yes if Ollama and ComfyUI give way`]
          : ["bad", `no: ${size(bytes - spare)} short, and ${size(yielding)} could be had`];
    return el("p", { class: `answer ${tone}`, text: `GPU ${gpu.index}: ${words}` });
  });
  put(
    slot,
    ...lines,
    el("p", {
      class: "quiet",
      text: `An estimate for ${size(bytes)}: free, less what is leased, less a margin of ${size(margin)}.`,
    }),
  );
}
