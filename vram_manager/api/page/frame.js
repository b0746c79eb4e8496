// Around the charts: which time is shown, which GPU, the link to its CSV, and the same numbers as a table.

import { numbersTable } from "./numbers.js";
import { gpuName } from "./panels.js";
import { thin } from "./series.js";
import { duration, el, localInput, moment, say } from "./words.js";

const $ = (id) => document.getElementById(id);
const TABLE_ROWS = 60;

/** Says which time is shown. */
export function times({ live, span }, { from, to }) {
  const words = `${moment(from)} to ${moment(to)} (${duration(to - from)}).`;
  say($("window"), live ? `The last ${duration(span)}, up to now.` : words);
  for (const button of $("spans").children) {
    button.setAttribute("aria-pressed", String(live && Number(button.dataset.span) === span));
  }
  document.querySelector("[data-move=live]").disabled = live;
  document.querySelector("[data-move=forward]").disabled = live;
  for (const [id, at] of [
    ["from", from],
    ["to", to],
  ]) {
    if (document.activeElement !== $(id)) $(id).value = localInput(at);
  }
}

/** The times that somebody typed, null while they are none. */
export function typed() {
  const [from, to] = ["from", "to"].map((id) => new Date($(id).value).getTime() / 1000);
  if (Number.isNaN(from) || Number.isNaN(to)) return null;
  $("to").setCustomValidity(from < to ? "" : "must be after the other time");
  return $("to").reportValidity() ? { from, to } : null;
}

/** Offers `gpus`, of which the one called `chosen` is shown, or all. */
export function chooser(gpus, chosen) {
  $("chooser").hidden = gpus.length < 2;
  const wished = ["", ...gpus.map((gpu) => gpu.uuid)];
  if (wished.join() !== [...$("gpu").options].map((one) => one.value).join()) {
    const named = gpus.map((gpu) => el("option", { value: gpu.uuid, text: `${gpuName(gpu)} ${gpu.name}` }));
    $("gpu").replaceChildren(el("option", { value: "", text: `all ${gpus.length}` }), ...named);
  }
  $("gpu").value = gpus.some((gpu) => gpu.uuid === chosen) ? chosen : "";
}

/** The window shown as a file. */
export function csv(query, gpu) {
  query.set("format", "csv");
  if (gpu) query.set("gpu", gpu);
  $("csv").href = `v1/history?${query}`;
}

/** The numbers of `shown` between two times, where somebody has opened them. */
export function numbers(shown, { from, to }) {
  if (!$("table").open) return;
  $("table")
    .querySelector("div")
    .replaceChildren(
      ...shown.flatMap((series) => [
        el("h4", { text: `${gpuName(series)} ${series.name}` }),
        numbersTable(series, thin(series, from, to, TABLE_ROWS).reverse()),
      ]),
      el("p", {
        class: "quiet",
        text: "Newest first; of a long time the lowest and highest of each stretch. All of it is in the CSV.",
      }),
    );
}
