// Joins the parts: passes each view to them, and keeps the choices of the user.

import * as chunks from "./chunks.js";
import * as history from "./history.js";
import * as members from "./members.js";
import * as replay from "./replay.js";
import { follow } from "./stream.js";
import * as swarm from "./swarm.js";
import * as timeline from "./timeline.js";
import * as words from "./words.js";

const element = (id) => document.getElementById(id);
const chosen = { digest: null, selected: null, chunk: null, tree: null, fetch: null };
let view = null;
let due = false;

function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (view) draw();
  });
}

function draw() {
  view.order = swarm.ordered(view);
  if (!view.artifacts[chosen.digest]) chosen.digest = mostWanted();
  swarm.draw(view, { digest: chosen.digest, selected: chosen.selected, tree: chosen.tree?.edges ?? null, chosen: select });
  members.draw(view, { digest: chosen.digest, selected: chosen.selected, chosen: select });
  members.warn(view, select);
  chunks.draw(view, { digest: chosen.digest, chunk: chosen.chunk, onChunk: (chunk) => { element("chunk").value = chunk; showTree(); } });
  head();
  replay.draw(view.replay);
  history.follow(view, select);
  const models = Object.keys(view.artifacts);
  element("model").hidden = models.length < 2;
  const of = view.artifacts[chosen.digest]?.model_id ?? "";
  if (element("chunks-of").textContent !== of) element("chunks-of").textContent = of;
  options(element("artifact"), Object.entries(view.artifacts).map(([digest, a]) => [digest, `${a.model_id} (${words.bytes(a.bytes)})`]), chosen.digest);
  fetches();
}

// The artifact that most members are fetching, or else hold.
function mostWanted() {
  const votes = new Map();
  for (const member of Object.values(view.members)) {
    for (const digest of Object.keys(member.holds)) votes.set(digest, (votes.get(digest) ?? 0) + 1);
    for (const [digest, fetch] of Object.entries(member.fetches)) votes.set(digest, (votes.get(digest) ?? 0) + (fetch.running ? 100 : 0));
  }
  return [...votes].sort((a, b) => b[1] - a[1])[0]?.[0] ?? null;
}

function head() {
  const all = Object.values(view.members).filter((m) => !m.origin);
  const here = all.filter((m) => !["dead", "left"].includes(m.state));
  const fetching = here.filter((m) => words.running(m));
  const moving = Object.values(view.links).reduce((sum, link) => sum + link.rate_bytes_per_s, 0);
  const last = Math.max(-1, ...fetching.map((m) => words.running(m).eta_s ?? -1));
  const sums = [
    ["members", String(here.length)], ["fetching", String(fetching.length)], ["moving", words.rate(moving)],
    ["all ready in", fetching.length && last >= 0 ? words.seconds(last) : "–"],
  ];
  const list = element("sums");
  if (!list.children.length) {
    list.innerHTML = sums.map(() => "<div><dt></dt><dd></dd></div>").join("");
  }
  sums.forEach(([name, value], n) => {
    const [dt, dd] = list.children[n].children;
    if (dt.textContent !== name) dt.textContent = name;
    if (dd.textContent !== value) dd.textContent = value;
  });
  const from = `seen from ${view.node.name} at ${view.node.address}`;
  if (element("seen-from").textContent !== from) element("seen-from").textContent = from;
  document.title = `${Object.keys(view.warnings).length ? "(!) " : ""}swarm · ${here.length} members`;
  const quiet = here.filter((m) => !m.reports).map((m) => m.name);
  const named = quiet.slice(0, 5).join(", ") + (quiet.length > 5 ? ` and ${quiet.length - 5} more` : "");
  const asked = quiet.length ? `${here.length - quiet.length} of ${here.length} members answered. ${named} did not: the page shows what gossip and links know of ${quiet.length > 1 ? "them" : "it"}.` : `All ${here.length} members answered.`;
  if (element("asked").textContent !== asked) element("asked").textContent = asked;
}

function options(select, wanted, value) {
  const now = JSON.stringify(wanted);
  if (select.dataset.wanted !== now) {
    select.dataset.wanted = now;
    select.replaceChildren(...wanted.map(([key, text]) => Object.assign(document.createElement("option"), { value: key, textContent: text })));
  }
  if (value != null && select.value !== value) select.value = value;
}

function select(id) {
  chosen.selected = chosen.selected === id ? null : id;
  const fetched = chosen.selected && Object.keys(view.members[chosen.selected]?.fetches ?? {})[0];
  if (fetched) showTimeline(`${chosen.selected}/${fetched}`);
  redraw();
}

async function showTree() {
  chosen.chunk = Number(element("chunk").value);
  const { digest, chunk } = chosen;
  const tree = await chunks.ask(digest, chunk);
  if (digest !== chosen.digest || chunk !== chosen.chunk) return;
  chosen.tree = tree;
  element("chunk-close").hidden = false;
  element("tree-twin").hidden = false;
  element("tree-twin").href = `/tree/${digest}/${chunk}`;
  element("picture-title").textContent = `Distribution tree of chunk ${chunk}`;
  chunks.list(view, tree);
  redraw();
}

function closeTree() {
  chosen.tree = chosen.chunk = null;
  element("chunk-close").hidden = element("tree-twin").hidden = true;
  element("picture-title").textContent = "Transfers between members";
  chunks.list(view, null);
  redraw();
}

function fetches() {
  const found = [];
  for (const id of view.order) {
    const member = view.members[id];
    for (const [digest, fetch] of Object.entries(member.fetches)) {
      const how = fetch.running ? "running" : fetch.error ? "failed" : words.seconds(fetch.seconds);
      found.push([`${id}/${digest}`, `${member.name}: ${fetch.model_id} (${how})`, fetch.running]);
    }
  }
  options(element("fetch"), found.map(([key, text]) => [key, text]), chosen.fetch);
  if (!chosen.fetch && found.length) showTimeline(found[0][0]);
  else if (!found.length && !element("lanes").children.length) timeline.draw(null);
}

async function showTimeline(key) {
  chosen.fetch = key;
  const [node, digest] = key.split("/");
  const found = await timeline.ask(node, digest).catch(() => null);
  if (chosen.fetch !== key) return;
  element("fetch").value = key;
  const name = view.members[node]?.name;
  element("timeline-title").textContent = found && name ? `Fetch of ${name}` : "Timeline of a fetch";
  element("timeline-twin").hidden = false;
  element("timeline-twin").href = `/timeline/${digest}/of/${node}`;
  if (!element("lanes").contains(document.activeElement)) timeline.draw(found);
}

setInterval(() => {
  if (!chosen.fetch || document.hidden) return;
  const [node, digest] = chosen.fetch.split("/");
  const running = view?.members[node]?.fetches[digest]?.running;
  if (running || element("timeline").dataset.running === "true") showTimeline(chosen.fetch);
  element("timeline").dataset.running = String(Boolean(running));
}, 1500);

element("chunk-form").addEventListener("submit", (event) => { event.preventDefault(); showTree(); });
element("chunk-close").addEventListener("click", closeTree);
element("artifact").addEventListener("change", (event) => { chosen.digest = event.target.value; closeTree(); });
element("fetch").addEventListener("change", (event) => showTimeline(event.target.value));
element("links-twin").addEventListener("toggle", redraw);
members.onOrder(redraw);
element("links-more").addEventListener("click", () => { members.toggleLinks(); redraw(); });
addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen.tree) closeTree(); });

const dark = matchMedia("(prefers-color-scheme: dark)");
function theme() {
  const wanted = localStorage.getItem("theme") ?? "";
  element("theme").value = wanted;
  document.documentElement.dataset.theme = wanted || (dark.matches ? "dark" : "light");
  chunks.recolour();
  redraw();
}
element("theme").addEventListener("change", (event) => { localStorage.setItem("theme", event.target.value); theme(); });
dark.addEventListener("change", theme);
new ResizeObserver(redraw).observe(element("ring"));
new ResizeObserver(history.draw).observe(element("throughput"));
let lanesWidth = 0;
new ResizeObserver(([entry]) => {
  if (entry.contentRect.width === lanesWidth) return;
  lanesWidth = entry.contentRect.width;
  timeline.again();
}).observe(element("lanes"));
theme();

let leave = null;
function watch(url) {
  leave?.();
  history.forget();
  leave = follow(url, (changed) => { view = changed; redraw(); }, (connected) => {
    const place = element("connection");
    place.textContent = connected ? "live" : "not connected; trying again";
    place.className = connected ? "live" : "lost";
  });
}

replay.follow(watch);
watch("/events");
