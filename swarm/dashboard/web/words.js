// Numbers and states as text. Must not know: elements of the page.

export function bytes(n) {
  if (n == null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (n >= 999.5 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return `${n >= 99.5 || unit === 0 ? Math.round(n) : n.toFixed(1)} ${units[unit]}`;
}

export const rate = (n) => (n > 0 ? `${bytes(n)}/s` : "–");

export function seconds(s) {
  if (s == null) return "–";
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
  return `${(s / 3600).toFixed(1)} h`;
}

// The same, shorter.
export const soon = (s) => (s >= 100 && s < 5400 ? `${Math.round(s / 60)} min` : seconds(s));

// Rounded down: only a complete artifact has 100 %.
export const percent = (fraction) => `${Math.floor(fraction * 100)} %`;

// The running fetch of this artifact; without `digest` of any.
export const running = (member, digest) => Object.entries(member.fetches).find(([of, fetch]) => fetch.running && (!digest || of === digest))?.[1];

// The fraction of an artifact that a member holds; without `digest` the least of all its artifacts.
export function fraction(member, digest) {
  if (digest) return member.holds[digest]?.fraction ?? 0;
  const held = Object.values(member.holds).map((hold) => hold.fraction);
  return held.length ? Math.min(...held) : 0;
}

// The state to show, most urgent first: what the member is to the artifact `digest`, since a seed of one model is none
// of another.
export function condition(member, digest) {
  if (member.origin) return "origin";
  if (member.state === "dead") return "dead";
  if (member.wrong_chunks) return "wrong"; // must be stopped, even without a link to it
  if (member.state === "left") return "left";
  if (member.state === "suspect" || member.state === "silent") return "silent";
  if (member.slow && running(member, digest)) return "slow";
  if (running(member, digest)) return "fetching";
  if (member.state === "unknown") return "unknown";
  const holds = Object.entries(member.holds).filter(([of]) => !digest || of === digest).map(([, hold]) => hold);
  if (!holds.length) return Object.keys(member.holds).length || running(member) ? "other" : "idle";
  if (holds.every((hold) => hold.fraction >= 1)) return "seed";
  return holds.every((hold) => hold.fraction >= 1 || hold.wanted >= 1) ? "wanted" : "part"; // may be fetching without a report
}

export const shortened = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export const STATES = {
  dead: "dead", left: "left", wrong: "wrong chunks", silent: "lost: no answer", slow: "slow", fetching: "fetching",
  unknown: "reported by others", origin: "origin", seed: "seed", wanted: "has what it wants", part: "has a part", other: "other content", idle: "holds nothing",
};

// How often members have asked an origin.
export function asked({ requests, retries }) {
  const again = retries ? ` · ${retries} ${retries === 1 ? "retry" : "retries"}` : "";
  return `${requests} request${requests === 1 ? "" : "s"}${again}`;
}

// What a member runs and holds: the version of swarm, then each artifact by revision and the first digits of its digest.
export function contents(member, artifacts) {
  const held = Object.keys({ ...member.holds, ...member.fetches }).map((digest) => {
    const { model_id, revisions } = artifacts[digest] ?? {};
    const revision = revisions?.[0];
    return `${model_id ?? "?"}${revision ? `@${revision.length === 40 ? revision.slice(0, 12) : revision}` : ""} ${digest.slice(0, 12)}`;
  });
  return [member.version && `swarm ${member.version}`, ...held].filter(Boolean);
}

export function place(member) {
  return [member.rack && `rack ${member.rack}`, member.host && `host ${member.host}`].filter(Boolean).join(", ") || "–";
}
