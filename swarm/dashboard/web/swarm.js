// The swarm as a picture: members on a ring, ordered by rack and host; between them links with their rates, or the
// distribution tree of a chosen chunk. Elements are kept and changed, never drawn again.

import * as words from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const NAMED_MAX = 24; // with more members only marked ones show their names
const LINKS_MAX = 250; // the fastest first: more are unreadable; the table has them
const RATES_MAX = 6; // only the fastest links show their rates, if there is room
const SIGNS = {
  origin: "M0-.55V.4M-.4 0 0 .4.4 0", slow: "M-.3-.5H.3L-.3.5H.3z", dead: "M-.5-.5.5.5M.5-.5-.5.5", left: "M-.5-.5.5.5M.5-.5-.5.5", wrong: "M0-.6V.1M0 .5V.55",
};

const svg = document.getElementById("ring");
const layers = Object.fromEntries(["grounds", "links", "labels", "nodes", "rates"].map((name) => [name, add(svg, "g", name)]));
const nodes = new Map(); // id -> {group, ...}
const links = new Map();
let places = new Map(); // id -> {x, y, angle, r}
let arrangement = "";
let centre = { x: 0, y: 0 };
let taken = []; // places of labels that do not move
let named = []; // boxes of the names of members in this picture
let roving = null;

function add(parent, name, kind, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  if (kind) made.setAttribute("class", kind);
  set(made, attributes);
  parent.append(made);
  return made;
}

// Keeps the last values beside the element: to read them from the page costs more.
function set(element, attributes) {
  const written = (element.written ??= {});
  for (const [name, value] of Object.entries(attributes)) {
    if (written[name] === value) continue;
    written[name] = value;
    element.setAttribute(name, typeof value === "number" ? String(Math.round(value * 100) / 100) : value);
  }
}

function write(element, text) {
  if ((element.shownText ?? "") === text) return;
  element.shownText = text;
  element.textContent = text;
}

const { compare } = new Intl.Collator("en", { numeric: true });
const byPlace = ([a, x], [b, y]) =>
  compare(x.rack ?? "", y.rack ?? "") || compare(x.host ?? "~", y.host ?? "~") || compare(x.name, y.name) || compare(a, b);

// Ids in the order of all lists.
export const ordered = (view) => Object.entries(view.members).filter(([, m]) => m.state !== "left" || m.wrong_chunks).sort(byPlace).map(([id]) => id);

function arrange(view, ids) {
  const width = svg.clientWidth || 800;
  const height = svg.clientHeight || 560;
  const now = JSON.stringify([width, height, ids.map((id) => [id, view.members[id].rack, view.members[id].host])]);
  if (now === arrangement) return;
  arrangement = now;
  set(svg, { viewBox: `0 0 ${width} ${height}` });
  const slots = [];
  let at = 0;
  ids.forEach((id, n) => {
    const member = view.members[id];
    const before = n > 0 ? view.members[ids[n - 1]] : null;
    if (before && before.rack !== member.rack) at += 1.1;
    else if (before && before.host !== member.host) at += 0.45;
    slots.push([id, at]);
    at += 1;
  });
  const first = view.members[ids[0]];
  const last = view.members[ids.at(-1)];
  at += ids.length > 1 && first.rack !== last?.rack ? 1.1 : ids.length > 1 && first.host !== last?.host ? 0.45 : 0;
  const narrow = width < 560;
  const margin = ids.length <= NAMED_MAX ? { x: narrow ? 106 : Math.min(218, width * 0.3), y: 74 } : { x: narrow ? 40 : 150, y: 44 };
  const rx = Math.max(60, width / 2 - margin.x);
  const ry = Math.max(60, height / 2 - margin.y);
  centre = { x: width / 2, y: height / 2 };
  const turn = (2 * Math.PI) / Math.max(at, 1);
  const around = Math.PI * (3 * (rx + ry) - Math.sqrt((3 * rx + ry) * (rx + 3 * ry)));
  const r = Math.max(3.5, Math.min(narrow ? 15 : 24, (around / Math.max(at, 1)) * 0.34));
  places = new Map(slots.map(([id, slot]) => {
    const angle = (slot + 0.5) * turn - Math.PI / 2 - turn * 0.5;
    return [id, { x: centre.x + rx * Math.cos(angle), y: centre.y + ry * Math.sin(angle), angle, r }];
  }));
  ground(view, ids, { rx, ry, r, turn });
}

// The hosts and racks as bands behind their members, each with its name at its beginning; in a crowd the racks' alone.
function ground(view, ids, { rx, ry, r, turn }) {
  layers.grounds.replaceChildren();
  layers.labels.replaceChildren();
  taken = [];
  const at = (angle, inwards = 0) => ({ x: centre.x + (rx - inwards) * Math.cos(angle), y: centre.y + (ry - inwards) * Math.sin(angle) });
  const runs = (of) => ids.reduce((found, id) => {
    const label = of(view.members[id]);
    if (found.at(-1)?.label === label) found.at(-1).ids.push(id);
    else found.push({ label, ids: [id] });
    return found;
  }, []);
  const pace = (angle) => Math.hypot(rx * Math.sin(angle), ry * Math.cos(angle)) || 1; // pixels for a radian, there
  const roomy = (angle) => pace(angle) * turn > 44;
  const before = new Map(); // id -> how far before it on the ring the last name ends
  const discs = [...places.values()];
  const clear = (p) => taken.every((q) => Math.abs(p.x - q.x) > 64 || Math.abs(p.y - q.y) > 15) && discs.every((q) => Math.abs(p.x - q.x) > q.r + 26 || Math.abs(p.y - q.y) > q.r + 7);
  // Before its first member where there is room, else further inside the ring, at its first or its middle member.
  const names = (kind, text, first, angle, middle) => {
    const label = add(layers.labels, "text", `band-name ${kind}`);
    label.textContent = text;
    const reach = (text.length * 3.6 * rx * Math.abs(Math.sin(angle)) + 8 * ry * Math.abs(Math.cos(angle))) / pace(angle);
    const distance = (before.get(first) ?? r + 3) + reach;
    const outside = roomy(angle) ? [at(angle - distance / pace(angle))] : [];
    const inside = [angle, middle].flatMap((where) => [40, 56, 72].map((by) => at(where, r + by)));
    const place = [...outside, ...inside].find(clear) ?? inside[0];
    set(label, { x: place.x, y: place.y + 4 });
    taken.push(place);
    if (place !== outside[0]) return 0;
    before.set(first, distance + reach);
    return distance + reach;
  };
  const band = (kind, found, name, beyond) => {
    for (const run of found) {
      if (!run.label) continue;
      const [first, last] = [places.get(run.ids[0]).angle, places.get(run.ids.at(-1)).angle];
      const named = found.length <= 16 && (kind === "rack" || roomy(first));
      const reach = named ? names(kind, name(run.label), run.ids[0], first, (first + last) / 2) : 0;
      const from = first - Math.max(0, reach + 3 - r - beyond) / pace(first);
      const steps = Math.max(2, Math.ceil((last - from) / 0.05));
      const points = Array.from({ length: steps + 1 }, (_, n) => at(from + ((last - from) * n) / steps));
      const d = `M${points.map(({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}`;
      layers.grounds.prepend(add(layers.grounds, "path", `band ${kind}`, { d, "stroke-width": 2 * (r + beyond) }));
    }
  };
  const hosts = runs((m) => (m.host ? `${m.rack ?? ""}\u0000${m.host}` : ""));
  if (hosts.length > 1) band("host", hosts, (label) => words.shortened(label.split("\u0000").pop(), 10), 8);
  band("rack", runs((m) => m.rack ?? ""), (label) => `${label.startsWith("rack") ? "" : "rack "}${words.shortened(label, 10)}`, 18);
}

function node(id, chosen) {
  let made = nodes.get(id);
  if (!made) {
    const group = add(layers.nodes, "g", "node", { role: "button", tabindex: "-1", "data-node": id });
    made = {
      group, plate: add(group, "path", "plate"), rim: add(group, "circle", "rim"), disc: add(group, "circle", "disc"),
      arc: add(group, "path", "arc"), core: add(group, "circle", "core"), sign: add(group, "path", "sign"),
      name: add(group, "text", "name"), note: add(group, "text", "note"),
    };
    group.addEventListener("click", () => chosen(id));
    group.addEventListener("keydown", (event) => steer(event, id, chosen));
    group.addEventListener("focus", () => { rove(id); });
    nodes.set(id, made);
  }
  return made;
}

function steer(event, id, chosen) {
  const ids = [...places.keys()];
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  let to = null;
  if (step) to = ids[(ids.indexOf(id) + step + ids.length) % ids.length];
  else if (event.key === "Home") to = ids[0];
  else if (event.key === "End") to = ids.at(-1);
  else if (event.key === "Enter" || event.key === " ") chosen(id);
  else if (event.key === "Escape") chosen(null);
  else return;
  event.preventDefault();
  if (to) nodes.get(to)?.group.focus();
}

function rove(id) {
  if (roving && nodes.has(roving)) nodes.get(roving).group.setAttribute("tabindex", "-1");
  roving = id;
  nodes.get(id)?.group.setAttribute("tabindex", "0");
}

function ring(part, r) {
  if (part <= 0) return "";
  const angle = Math.min(part, 0.9999) * 2 * Math.PI;
  return `M0${-r}A${r} ${r} 0 ${angle > Math.PI ? 1 : 0} 1 ${(r * Math.sin(angle)).toFixed(2)} ${(-r * Math.cos(angle)).toFixed(2)}`;
}

// The line below a name.
export function note(member, digest, short = false) {
  const condition = words.condition(member, digest);
  const fetch = words.running(member, digest);
  const done = fetch ? words.percent(fetch.bytes ? fetch.done_bytes / fetch.bytes : 1) : "";
  const left = fetch?.eta_s == null ? "nothing arrives" : `ready in ${words.seconds(fetch.eta_s)}`;
  const progress = short ? `${done} · ${words.soon(fetch?.eta_s)}` : `${done} · ${left}`;
  const banned = Object.keys(member.banned_by).length;
  switch (condition) {
    case "dead": return "dead";
    case "left": return "left";
    case "silent": return short ? "lost" : "lost: does not answer";
    case "wrong": return short ? `wrong chunks${banned ? " · banned" : ""}` : `sent ${member.wrong_chunks} wrong chunk${member.wrong_chunks === 1 ? "" : "s"}${banned ? ` · banned by ${banned} of ${Object.keys(member.wrong_to).length}` : ""}`;
    case "slow": return short ? `slow · ${words.soon(fetch?.eta_s)}` : `slow · ${done} · ${fetch?.eta_s == null ? left : `ready in ${words.soon(fetch.eta_s)}`}`;
    case "fetching": return progress;
    case "unknown": return "reported by others";
    case "origin": return short ? words.bytes(member.origin.bytes) : `${words.bytes(member.origin.bytes)} read · ${words.asked(member.origin)}`;
    case "wanted": return `has its part: ${words.percent(words.fraction(member, digest))} of all`;
    case "part": return `has ${words.percent(words.fraction(member, digest))}`;
    case "other": return short ? "other content" : words.running(member) ? `fetches ${words.shortened(words.running(member).model_id, 18)}` : "has other content";
    case "idle": return "holds nothing";
    default: return member.up_bytes_per_s && short ? words.rate(member.up_bytes_per_s) : member.up_bytes_per_s ? `has all · sends ${words.rate(member.up_bytes_per_s)}` : "has all";
  }
}

function drawNode(id, member, { digest, selected, crowd, dim, chosen }) {
  const { x, y, angle, r } = places.get(id);
  const made = node(id, chosen);
  const condition = words.condition(member, digest);
  const fetch = words.running(member, digest);
  const part = fetch ? fetch.done_bytes / Math.max(1, fetch.bytes) : words.fraction(member, digest);
  set(made.group, {
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    class: `node is-${condition}${selected === id ? " selected" : ""}${member.self ? " self" : ""}${dim ? " dim" : ""}`,
    "aria-pressed": String(selected === id),
    "aria-label": `${member.name}: ${words.STATES[condition]}, ${note(member, digest)}, ${words.place(member)}, receives ${words.rate(member.down_bytes_per_s)}, sends ${words.rate(member.up_bytes_per_s)}`,
  });
  const whole = part >= 1 && condition !== "dead";
  const plates = { wrong: `M0${-r * 1.35} ${r * 1.35} 0 0 ${r * 1.35} ${-r * 1.35} 0z`, origin: `M${-r} ${-r}H${r}V${r}H${-r}z` };
  set(made.plate, { d: plates[condition] ?? "" });
  set(made.rim, { r: plates[condition] ? 0 : r });
  set(made.disc, { r: whole && condition !== "wrong" ? r : 0 });
  set(made.arc, { d: plates[condition] || whole ? "" : ring(part, r), "stroke-width": Math.max(2, r * 0.26) });
  set(made.core, { r: whole && condition !== "wrong" ? r * 0.42 : 0 });
  set(made.sign, { d: SIGNS[condition] ?? "", transform: `scale(${r})` });
  const matters = ["wrong", "dead", "silent", "slow"].includes(condition) || selected === id || roving === id && crowd;
  const shown = !crowd || matters;
  const narrow = svg.clientWidth < 560;
  const side = Math.abs(Math.cos(angle)) < 0.25 ? "middle" : Math.cos(angle) > 0 ? "start" : "end";
  const away = r + (condition === "wrong" ? 14 : 9);
  const tx = side === "middle" ? 0 : Math.sign(Math.cos(angle)) * away;
  const name = shown ? words.shortened(member.name, narrow ? 11 : 26) : "";
  const said = shown ? note(member, digest, narrow || crowd) : "";
  const width = Math.max(8.8 * name.length, 7.4 * said.length); // names are bold
  made.shown = shown;
  const into = inwards(x + tx, side, width);
  const beside = side === "middle" ? (Math.sin(angle) < 0 ? -away - 17 : away + 12) : into ? away + 12 : -3;
  const up = apart({ x: x + into, y, tx, side, width }, beside);
  set(made.name, { x: tx + into, y: up, "text-anchor": side });
  set(made.note, { x: tx + into, y: up + 15, "text-anchor": side });
  write(made.name, name);
  write(made.note, said);
}

const leftOf = (x, side, width) => x - { start: 0, middle: width / 2, end: width }[side];

// How far a label has to be moved so that none of it is beyond the picture.
function inwards(x, side, width) {
  const left = leftOf(x, side, width);
  return Math.min(0, svg.clientWidth - 2 - (left + width)) + Math.max(0, 2 - left);
}

// Where the lines of a label begin, as near to `up` as no other label is in the way. Labels of two lines are 32 high.
function apart({ x, y, tx, side, width }, up) {
  if (!width) return up;
  const left = leftOf(x + tx, side, width);
  const free = (at) =>
    named.every((box) => box.left >= left + width || box.left + box.width <= left || Math.abs(box.top - (y + at)) >= 32) &&
    taken.every((place) => place.x - 26 >= left + width || place.x + 26 <= left || place.y + 8 <= y + at - 12 || place.y - 7 >= y + at + 20);
  const found = [0, 1, -1, 2, -2, 3, -3, 4, -4].map((step) => up + 11 * step).find(free) ?? up;
  named.push({ left, width, top: y + found });
  return found;
}

function curve(from, to) {
  // Bent towards the centre; the two directions of a link are kept apart.
  const mx = (from.x + to.x) / 2, my = (from.y + to.y) / 2;
  const dx = to.x - from.x, dy = to.y - from.y;
  const length = Math.hypot(dx, dy) || 1;
  const cx = mx + (centre.x - mx) * 0.42 - (dy / length) * 16;
  const cy = my + (centre.y - my) * 0.42 + (dx / length) * 16;
  const start = towards(from, { x: cx, y: cy }, from.r + 3);
  const end = towards(to, { x: cx, y: cy }, to.r + 7);
  return { start, end, control: { x: cx, y: cy } };
}

function along({ start, end, control }, t) {
  const a = (1 - t) * (1 - t), b = 2 * t * (1 - t), c = t * t;
  return { x: a * start.x + b * control.x + c * end.x, y: a * start.y + b * control.y + c * end.y };
}

function towards(a, b, by) {
  const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
  return { x: a.x + ((b.x - a.x) / length) * by, y: a.y + ((b.y - a.y) / length) * by };
}

function arrow({ end, control }, size) {
  const length = Math.hypot(end.x - control.x, end.y - control.y) || 1;
  const ux = (end.x - control.x) / length, uy = (end.y - control.y) / length;
  const tip = { x: end.x + ux * 3, y: end.y + uy * 3 };
  const left = { x: tip.x - ux * size - uy * size * 0.5, y: tip.y - uy * size + ux * size * 0.5 };
  const right = { x: tip.x - ux * size + uy * size * 0.5, y: tip.y - uy * size - ux * size * 0.5 };
  const f = (p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
  return `M${f(tip)}L${f(left)}L${f(right)}z`;
}

function drawLinks(wanted, selected) {
  const most = Math.max(1, ...wanted.map((link) => link.weight));
  const written = [...taken];
  const thin = Math.min(1, Math.sqrt(60 / Math.max(1, wanted.length))); // many must not hide each other
  const few = svg.clientWidth < 560 ? 3 : RATES_MAX;
  const discs = [...places.values()];
  const off = (p) => named.every((box) => p.x + 30 < box.left || p.x - 30 > box.left + box.width || Math.abs(p.y - box.top - 4) > 26);
  const clear = (p) => off(p) && written.every((q) => Math.abs(p.x - q.x) > 60 || Math.abs(p.y - q.y) > 20) && discs.every((q) => Math.abs(p.x - q.x) > q.r + 28 || Math.abs(p.y - q.y) > q.r + 9);
  const present = new Set(wanted.map((link) => link.key));
  for (const [key, made] of links) {
    if (!present.has(key)) {
      made.group.remove();
      made.label.remove();
      links.delete(key);
    }
  }
  for (const [rank, link] of [...wanted].sort((a, b) => b.weight - a.weight).entries()) {
    let made = links.get(link.key);
    if (!made) {
      const group = add(layers.links, "g", "link");
      made = { group, line: add(group, "path", "line"), head: add(group, "path", "head"), label: add(layers.rates, "text", "rate") };
      links.set(link.key, made);
    }
    if (made.arrangement !== arrangement) {
      made.arrangement = arrangement;
      made.shape = curve(places.get(link.source), places.get(link.target));
    }
    const { shape } = made;
    const strength = (link.weight / most) ** 1.5;
    const width = link.tree ? 3 : Math.round(10 * thin * strength) / 2 + 0.75;
    const touched = !selected || link.source === selected || link.target === selected;
    const f = (p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
    set(made.group, { class: `link${link.tree ? " tree" : ""}${touched ? "" : " dim"}${link.wrong ? " is-wrong" : ""}`, opacity: link.tree || link.wrong ? 1 : Math.round(20 * thin * (0.25 + 0.75 * strength)) / 20 });
    if (made.width !== width || made.drawn !== shape) {
      made.width = width;
      made.drawn = shape;
      set(made.line, { d: `M${f(shape.start)}Q${f(shape.control)} ${f(shape.end)}`, "stroke-width": width });
      set(made.head, { d: arrow(shape, 6 + width * 1.2) });
    }
    const wants = link.tree || (touched && (Boolean(selected) || rank < few));
    const free = wants && [0.5, 0.4, 0.6, 0.3, 0.7].map((t) => along(shape, t)).find(clear);
    if (free) {
      written.push(free);
      set(made.label, { x: free.x, y: free.y + 4 });
    }
    write(made.label, free ? link.words : "");
  }
}

// Puts members with a label above the discs of their neighbours, once each.
function raise() {
  for (const made of nodes.values()) {
    if (made.shown && !made.raised && document.activeElement !== made.group) {
      layers.nodes.append(made.group);
      made.raised = true;
    }
  }
}

// `tree`: {node: {source, at_s}} of a chosen chunk, instead of the links.
export function draw(view, { digest, selected, tree, chosen }) {
  const ids = view.order;
  if (!ids.length) return;
  arrange(view, ids);
  const crowd = ids.length > NAMED_MAX;
  for (const [id, made] of nodes) {
    if (!places.has(id)) {
      if (made.group === document.activeElement) nodes.get(ids[0])?.group.focus();
      made.group.remove();
      nodes.delete(id);
    }
  }
  const wanted = [];
  if (tree) {
    for (const [target, edge] of Object.entries(tree)) {
      if (places.has(target) && places.has(edge.source)) {
        const after = edge.at_s == null ? "" : `after ${words.seconds(edge.at_s)}`;
        wanted.push({ key: `tree ${target}`, source: edge.source, target, weight: 1, tree: true, words: after });
      }
    }
  } else {
    for (const [key, link] of Object.entries(view.links)) {
      if (link.rate_bytes_per_s > 0 && places.has(link.source) && places.has(link.target)) {
        wanted.push({ ...link, key, weight: link.rate_bytes_per_s, words: words.rate(link.rate_bytes_per_s), wrong: view.members[link.source].wrong_chunks > 0 });
      }
    }
  }
  named = [];
  for (const id of ids) {
    drawNode(id, view.members[id], { digest, selected, crowd, chosen, dim: Boolean(tree) && !tree[id] });
  }
  if (crowd) raise();
  if (!roving || !nodes.has(roving)) rove(ids[0]);
  if (wanted.length > LINKS_MAX) wanted.sort((a, b) => b.weight - a.weight);
  drawLinks(wanted.slice(0, LINKS_MAX), tree ? null : selected);
}
