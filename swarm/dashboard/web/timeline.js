// One fetch over time: its phases above, a lane for each source below, wrong chunks marked.

import * as words from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const box = document.getElementById("lanes");
const LANE = 30, LEFT = 150, TOP = 46, RIGHT = 92;
const PHASES = { transfer: "receiving", verify: "receiving", seal: "sealing" }; // all others: waiting

function add(parent, name, kind, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  made.setAttribute("class", kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, typeof value === "number" ? value.toFixed(2) : value);
  if (text) made.textContent = text;
  parent.append(made);
  return made;
}

export async function ask(node, digest) {
  const answer = await fetch(`/timeline/${digest}/of/${node}`);
  const found = answer.ok ? await answer.json() : null;
  return found?.silent ? null : found;
}

function ticks(seconds, most) {
  const step = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600].find((s) => seconds / s <= most) ?? 7200;
  return [...Array.from({ length: Math.ceil(seconds / step) }, (_, n) => n * step).filter((s) => seconds - s > seconds / most / 2), seconds];
}

let shown;

export const again = () => { if (shown !== undefined) draw(shown); };

export function draw(found) {
  shown = found;
  const open = box.querySelector("details")?.open ?? false;
  box.replaceChildren();
  if (!found) {
    box.append(Object.assign(document.createElement("p"), { className: "hint", textContent: "No fetch yet, or its member does not answer." }));
    return;
  }
  const width = Math.max(320, box.clientWidth || 700);
  const left = width < 560 ? 92 : LEFT;
  const inner = width - left - RIGHT;
  const height = TOP + found.lanes.length * LANE + 30;
  const total = Math.max(found.seconds, 1e-3);
  const x = (s) => left + (Math.min(s, total) / total) * inner;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${found.model_id}: ${found.running ? "running for" : "took"} ${words.seconds(found.seconds)}, from ${found.lanes.length} sources; the table below has the values`);
  let at = 0;
  for (const [name, seconds] of Object.entries(found.phases)) {
    if (seconds <= 0) continue;
    const kind = PHASES[name] ?? "waiting";
    add(svg, "rect", `phase ${kind}`, { x: x(at), y: 8, width: Math.max(1.5, x(at + seconds) - x(at)), height: 18, rx: 3 });
    const text = `${name} ${words.seconds(seconds)}`;
    if (x(at + seconds) - x(at) > text.length * 6.6) add(svg, "text", `phase-name ${kind}`, { x: x(at) + 7, y: 21 }, text);
    at += seconds;
  }
  for (const s of ticks(total, Math.max(2, Math.min(8, inner / 50)))) {
    add(svg, "line", "tick", { x1: x(s), x2: x(s), y1: TOP - 12, y2: height - 24 });
    add(svg, "text", "tick-name", { x: x(s), y: height - 8, "text-anchor": "middle" }, words.seconds(s).replace(".0 s", " s"));
  }
  const most = Math.max(1, ...found.lanes.flatMap((lane) => lane.buckets));
  found.lanes.forEach((lane, n) => {
    const base = TOP + n * LANE + LANE - 6;
    add(svg, "text", `lane-name${lane.banned ? " is-wrong" : ""}`, { x: left - 8, y: base - 6, "text-anchor": "end" }, words.shortened(lane.name, Math.floor((left - 10) / 8.4)));
    add(svg, "line", "lane-base", { x1: left, x2: left + inner, y1: base, y2: base });
    let d = "";
    lane.buckets.forEach((size, k) => {
      if (size) d += `M${(left + (k / lane.buckets.length) * inner).toFixed(1)} ${base}v${(-(size / most) * (LANE - 10) - 1).toFixed(1)}h${(inner / lane.buckets.length).toFixed(2)}V${base}z`;
    });
    if (d) add(svg, "path", "lane-bytes", { d });
    for (const s of lane.rejected_at_s) add(svg, "path", "lane-wrong", { d: `M${(x(s) - 4).toFixed(1)} ${base - 14}l8 8m0-8l-8 8` });
    add(svg, "text", "lane-sum", { x: left + inner + 8, y: base - 6 }, lane.rejected_chunks ? `${lane.rejected_chunks} wrong` : words.bytes(lane.bytes));
  });
  box.append(svg);
  const key = Object.assign(document.createElement("ul"), { className: "key" });
  const item = (swatch, text) => {
    const li = document.createElement("li");
    if (swatch) li.append(Object.assign(document.createElement("i"), { className: `swatch ${swatch}` }));
    li.append(text);
    key.append(li);
  };
  for (const [name, seconds] of Object.entries(found.phases)) {
    if (seconds >= 0.05) item(PHASES[name] ?? "waiting", `${name} ${words.seconds(seconds)}`);
  }
  item("", `A bar: verified bytes from that member within ${found.bucket_s < 1 ? `${Math.ceil(found.bucket_s * 1000)} ms` : words.seconds(found.bucket_s)}; the highest is ${words.bytes(most)}`);
  if (found.lanes.some((lane) => lane.rejected_chunks)) item("", "✕ a wrong chunk");
  box.append(key);
  const details = document.createElement("details");
  details.innerHTML = "<summary>The same as a table</summary><table><thead><tr><th scope=col>source</th><th scope=col class=number>bytes</th><th scope=col class=number>chunks</th><th scope=col class=number>wrong chunks</th></tr></thead><tbody></tbody></table>";
  for (const lane of found.lanes) {
    const tr = details.querySelector("tbody").insertRow();
    [lane.name + (lane.banned ? " (banned)" : ""), words.bytes(lane.bytes), lane.chunks, lane.rejected_chunks].forEach((text, n) => {
      const cell = tr.insertCell();
      cell.textContent = text;
      if (n) cell.className = "number";
    });
  }
  if (found.error) item("", `failed: ${found.error}`);
  details.open = open;
  box.append(details);
}
