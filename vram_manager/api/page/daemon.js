// The daemon, asked: JSON with a deadline, and the stream of events.

const DEADLINE_MS = 8000;

/** An answer that is no success; `said` are the daemon's own words. */
export class Refused extends Error {
  constructor(status, said) {
    super(said);
    this.status = status;
  }
}

/** There is no answer, or none that can be read. */
export class Away extends Error {}

/** The JSON at `path`. Throws Refused for an answer that says no, Away where there is none. */
export async function ask(path) {
  try {
    return await asked(path);
  } catch (problem) {
    throw problem instanceof Refused ? problem : new Away(`${path}: ${problem.message}`);
  }
}

async function asked(path) {
  const reply = await fetch(path, {
    signal: AbortSignal.timeout(DEADLINE_MS),
    headers: { Accept: "application/json" },
  });
  // Unwell is an answer too: /health says 503 and why.
  if (reply.ok || path === "health") return reply.json();
  const body = await reply.json().catch(() => null);
  throw new Refused(reply.status, body?.error?.message ?? `${path}: status ${reply.status}`);
}

/** Calls `heard` with each event recorded from now on, until closed. It comes back by itself. */
export function follow(heard) {
  const stream = new EventSource("v1/events");
  stream.addEventListener("message", (message) => heard(JSON.parse(message.data)));
  return stream;
}
