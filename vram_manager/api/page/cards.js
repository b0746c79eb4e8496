// What is right now, beside the charts: models, queue, who waits, leases, other nodes, floors, and what is wrong.

import { clock, duration, el, epoch, put, size, tenantName } from "./words.js";

const note = (text) => el("p", { class: "note", text });
const row = (name, value) => el("p", { class: "row" }, el("span", { text: name }), el("span", { text: value }));

function place(model) {
  if (model.cpu_ratio === null) return "where is not known";
  if (model.cpu_ratio === 0) return "on the GPU";
  return model.cpu_ratio >= 0.99 ? "on the CPU" : `${Math.round(model.cpu_ratio * 100)} % on the CPU`;
}

function expiry(model, now) {
  const at = epoch(model.expires_at);
  if (at === null) return "";
  if (at - now > 30 * 86400) return "stays";
  return at <= now ? "leaves now" : `leaves in ${duration(at - now)}`;
}

function models(list, now) {
  if (!list?.length) return note("No model is loaded.");
  return el(
    "ul",
    { class: "items" },
    ...list.map((model) => {
      const more = [
        model.context_length ? `context ${model.context_length.toLocaleString("en")}` : null,
        model.requests ? `${model.requests} ${model.requests === 1 ? "request" : "requests"} under way` : null,
        expiry(model, now),
      ].filter(Boolean);
      return el(
        "li",
        { class: model.cpu_ratio > 0 ? "warned" : null },
        el("p", { class: "row" }, el("b", { text: model.name }), el("span", { text: size(model.size_vram_bytes) })),
        el("p", { class: "quiet", text: [place(model), ...more].join(" · ") }),
      );
    }),
  );
}

export function ollama(slot, seen, now) {
  if (seen === null) return put(slot, note("Not seen yet."));
  if (seen.state !== "ok") return put(slot, note(`Cannot be read: ${seen.why}`));
  put(
    slot,
    models(seen.models, now),
    seen.version ? el("p", { class: "quiet", text: `version ${seen.version}` }) : null,
  );
}

export function comfyui(slot, seen) {
  if (seen === null) return put(slot, note("Not used here."));
  if (seen.state !== "ok") return put(slot, note(`Cannot be read: ${seen.why}`));
  const busy =
    seen.queue_remaining === null
      ? "not known"
      : seen.queue_remaining > 0
        ? `${seen.queue_remaining} in the queue`
        : `idle for ${duration(seen.idle_seconds)}`;
  const devices = (seen.devices ?? []).flatMap((device) => [
    row("torch has", size(device.torch_total_bytes)),
    row("of it cached", size(device.torch_free_bytes)),
  ]);
  put(
    slot,
    row("queue", busy),
    ...devices,
    seen.version ? el("p", { class: "quiet", text: `version ${seen.version}` }) : null,
  );
}

function inLine(one) {
  const wish = one.required ?? size(one.required_bytes);
  const more = one.eta_seconds === null ? "" : `, perhaps ${duration(one.eta_seconds)} more`;
  return `wants ${wish}, in line for ${duration(one.waited_seconds)}${more} (${one.priority})`;
}

export function waiting(slot, { line = [], held = [], demands = [] }) {
  const items = [
    ...line.map((one) => [`${one.position}. ${one.owner}`, inLine(one)]),
    ...held.map((one) => [
      `${one.upstream}: ${one.what}`,
      `held at the gateway for ${duration(one.waited_seconds)}: ${one.why}`,
    ]),
    ...demands.map((one) => [
      one.kind.replaceAll("_", " "),
      `needs ${size(one.need_free_bytes)} free for ${duration(one.age_seconds)}: ${one.reason}`,
    ]),
  ];
  if (!items.length) return put(slot, note("Nobody waits."));
  const rows = items.map(([name, words]) =>
    el("li", {}, el("b", { text: name }), el("p", { class: "quiet", text: words })),
  );
  put(slot, el("ul", { class: "items" }, ...rows));
}

export function leases(slot, list, now) {
  if (!list?.length) return put(slot, note("Nothing is promised to anybody."));
  put(
    slot,
    el(
      "ul",
      { class: "items" },
      ...list.map((lease) => {
        const at = epoch(lease.expires_at);
        const until = lease.held
          ? "while its connection is open"
          : at === null
            ? ""
            : at <= now
              ? "expires now"
              : `expires in ${duration(at - now)}`;
        const used = lease.used_bytes
          ? `has ${size(lease.used_bytes)}`
          : `${size(lease.outstanding_bytes)} not yet taken`;
        const over = lease.overclaimed_bytes > 0 ? `, ${size(lease.overclaimed_bytes)} more than promised` : "";
        return el(
          "li",
          { class: over ? "warned" : null },
          el("p", { class: "row" }, el("b", { text: lease.owner }), el("span", { text: size(lease.bytes) })),
          el("p", { class: "quiet", text: [used + over, until, lease.priority].filter(Boolean).join(" · ") }),
        );
      }),
    ),
  );
}

const VERDICTS = {
  gpu: "on its GPU",
  cpu: "on its CPU",
  split: "partly on its CPU",
  idle: "idle",
  unknown: "where is not known",
};

function nodeSaid(node) {
  if (node.state !== "ok") return [node.why, node.remedy].filter(Boolean).join(". ");
  const ram = node.ram_bytes ? `, ${size(node.ram_bytes)} in RAM` : "";
  return `${VERDICTS[node.verdict] ?? node.verdict} · ${size(node.vram_bytes)} on the GPU${ram}`;
}

export function nodes(slot, list, now) {
  slot.closest(".card").hidden = !list?.length;
  const rows = (list ?? []).map((node) => {
    const well = node.state === "ok";
    return el(
      "li",
      { class: well && !["cpu", "split"].includes(node.verdict) ? null : "warned" },
      el("b", { text: node.url }),
      el("p", { class: "quiet", text: nodeSaid(node) }),
      well && node.models?.length ? models(node.models, now) : null,
    );
  });
  put(slot, el("ul", { class: "items" }, ...rows));
}

function floorSaid(floor) {
  const last = floor.points?.at(-1);
  const at = typeof last?.at === "number" ? last.at : epoch(last?.at);
  const kept = `keeps ${size(floor.floor_bytes)} when idle, ${size(floor.baseline_bytes)} at first`;
  const ran = last?.ran?.length ? ` Last after ${last.ran.join(", ")}${at === null ? "" : ` at ${clock(at)}`}.` : "";
  return `${floor.leak ? "Looks like a leak: " : ""}${kept}; ${floor.generations} runs.${ran}`;
}

export function floors(slot, list) {
  slot.closest(".card").hidden = !list?.length;
  const rows = (list ?? []).map((floor) =>
    el(
      "li",
      { class: floor.leak ? "warned" : null },
      el(
        "p",
        { class: "row" },
        el("b", { text: tenantName(floor.tenant) }),
        el("span", { text: `+${size(floor.growth_bytes)}` }),
      ),
      el("p", { class: "quiet", text: floorSaid(floor) }),
    ),
  );
  put(slot, el("ul", { class: "items" }, ...rows));
}

/** Everything that cannot be read, with what to do. */
export function troubles(slot, health, snapshot) {
  const made = [];
  if (health?.monitoring === false) made.push("Monitoring is off (ENABLE_VRAM_MONITORING=false): nothing is freed.");
  if (health?.dry_run) made.push("Dry run: the daemon only says what it would do.");
  for (const [name, sensor] of Object.entries(health?.sensors ?? {})) {
    if (sensor.state === "missing")
      made.push(`${name} cannot be read: ${sensor.why}${sensor.remedy ? `. ${sensor.remedy}` : ""}`);
  }
  if (snapshot?.gpus_why) made.push(`No GPU: ${snapshot.gpus_why}`);
  if (snapshot?.second_hand) made.push("The GPU's numbers are ComfyUI's: its driver cannot be read here.");
  if (snapshot?.settling) made.push(`A free is waited for: ${snapshot.settling}`);
  for (const words of snapshot?.gpus_left_out ?? []) made.push(words);
  for (const [uuid, bytes] of Object.entries(snapshot?.unreclaimable_bytes ?? {})) {
    const name = snapshot.gpus.find((gpu) => gpu.uuid === uuid)?.name ?? uuid;
    if (bytes > 0) made.push(`${size(bytes)} on ${name} stay in use although everybody was asked.`);
  }
  put(slot, ...made.map((text) => el("p", { class: "trouble", text })));
}
