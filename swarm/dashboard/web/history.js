// What happened since the page was opened: throughput over time, and a log of events. Both come from successive views.

import * as words from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const KEPT_S = 600, EVENTS_MAX = 200, EVERY_MS = 1000;
const chart = document.getElementById("throughput");
const log = document.getElementById("log");
const samples = []; // {at, rate}
let before = null;
let drawnAt = 0;

const moving = (view) => Object.values(view.links).reduce((sum, link) => sum + link.rate_bytes_per_s, 0);

function made(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

// What `changes` compares, copied: patches change a view in its place.
function remembered({ members, warnings }) {
  const kept = ({ name, state, banned_by, fetches }) => {
    const running = Object.entries(fetches).map(([digest, fetch]) => [digest, { running: fetch.running }]);
    return { name, state, banned_by: { ...banned_by }, fetches: Object.fromEntries(running) };
  };
  return { members: Object.fromEntries(Object.entries(members).map(([id, member]) => [id, kept(member)])), warnings: { ...warnings } };
}

// The differences of two views, as sentences with the member that they are about.
export function changes(old, now) {
  const found = [];
  const say = (node, level, text) => found.push({ node, level, text });
  for (const [id, member] of Object.entries(now.members)) {
    const was = old.members[id];
    if (!was) say(id, "", member.origin ? `${member.name} is read` : `${member.name} joined`);
    else if (was.state !== member.state) {
      const gone = ["dead", "silent"].includes(member.state);
      say(id, gone ? "bad" : "", `${member.name} is ${member.state === "silent" ? "lost" : member.state}${member.state === "alive" ? " again" : ""}`);
    }
    for (const by of Object.keys(member.banned_by)) {
      if (!was?.banned_by[by]) say(id, "bad", `${now.members[by]?.name ?? by} banned ${member.name}`);
    }
    for (const [digest, fetch] of Object.entries(member.fetches)) {
      const had = was?.fetches[digest];
      if (fetch.running && !had?.running) say(id, "", `${member.name} fetches ${fetch.model_id}`);
      if (!fetch.running && had?.running) {
        say(id, fetch.error ? "bad" : "good", fetch.error ? `${member.name}: ${fetch.model_id} failed: ${fetch.error}` : `${member.name} has ${fetch.model_id} after ${words.seconds(fetch.seconds)}`);
      }
    }
  }
  for (const [id, member] of Object.entries(old.members)) {
    if (!now.members[id]) say(id, "", `${member.name} is no longer shown`);
  }
  for (const [key, warning] of Object.entries(now.warnings)) {
    if (!old.warnings[key] && !found.some((each) => each.node === warning.node)) say(warning.node, warning.level, warning.what);
  }
  return found;
}

export function follow(view, chosen) {
  const at = Date.now();
  if (before) for (const event of changes(before, view)) tell(at, event, chosen);
  before = remembered(view);
  if (samples.length && at - samples.at(-1).at < EVERY_MS) return;
  samples.push({ at, rate: moving(view) });
  while (at - samples[0].at > KEPT_S * 1000) samples.shift();
  draw();
}

// A recording that is sought has no history.
export function forget() {
  samples.length = 0;
  before = null;
  log.replaceChildren();
  draw();
}

function tell(at, { node, level, text }, chosen) {
  const li = document.createElement("li");
  li.className = level ? `event-${level}` : "";
  const time = document.createElement("time");
  time.textContent = new Date(at).toLocaleTimeString([], { hour12: false });
  const what = document.createElement("button");
  what.type = "button";
  what.className = "plain";
  what.textContent = text;
  what.addEventListener("click", () => chosen(node));
  li.append(time, what);
  log.prepend(li);
  while (log.children.length > EVENTS_MAX) log.lastChild.remove();
}

export function draw() {
  const width = chart.clientWidth || 400, height = 120, left = 62, bottom = 18, top = 8;
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const most = Math.max(1, ...samples.map((s) => s.rate));
  const end = samples.at(-1)?.at ?? Date.now();
  const span = Math.max(60, (end - (samples[0]?.at ?? end)) / 1000);
  const x = (at) => left + (width - left - 6) * (1 - (end - at) / 1000 / span);
  const y = (rate) => height - bottom - (height - bottom - top) * (rate / most);
  const line = samples.map((s) => `${x(s.at).toFixed(1)} ${y(s.rate).toFixed(1)}`).join("L");
  const parts = [0, 0.5, 1].map((part) => made("path", { class: "tick", d: `M${left} ${y(part * most)}H${width - 6}` }));
  if (samples.length > 1) {
    parts.push(made("path", { class: "flow-area", d: `M${x(samples[0].at)} ${y(0)}L${line}L${x(end)} ${y(0)}z` }), made("path", { class: "flow-line", d: `M${line}` }));
  }
  for (const part of most > 1 ? [0.5, 1] : []) parts.push(made("text", { class: "tick-name", x: left - 6, y: y(part * most) + 4, "text-anchor": "end" }, words.rate(part * most)));
  parts.push(made("text", { class: "tick-name", x: left, y: height - 4 }, `${words.seconds(span)} ago`), made("text", { class: "tick-name", x: width - 6, y: height - 4, "text-anchor": "end" }, "now"));
  chart.replaceChildren(...parts);
  const peak = `now ${words.rate(samples.at(-1)?.rate ?? 0)}, at most ${words.rate(most > 1 ? most : 0)}`;
  const label = document.getElementById("throughput-now");
  if (label.textContent !== peak) label.textContent = peak;
}
