// Chunk maps, as torrent clients show them: a strip for each member, above them the number of copies; and the
// distribution tree of a chosen chunk.

import * as words from "./words.js";

const maps = document.getElementById("maps");
const alone = document.getElementById("alone");
const unknown = document.getElementById("unknown");
const heldInPart = document.getElementById("held-in-part");
const treeBox = document.getElementById("tree");
const strips = new Map();

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["held", "guess", "accent"].map((name) => {
    const [red, green, blue] = style.getPropertyValue(`--${name}`).trim().match(/[0-9a-f]{2}/gi).map((hex) => parseInt(hex, 16));
    return [name, (alpha) => [red, green, blue, Math.round(alpha * 255)]];
  }));
}

let palette = colours();

export function recolour() {
  palette = colours();
  for (const made of strips.values()) made.drawn = "";
}

function strip(key, onCell) {
  let made = strips.get(key);
  if (!made) {
    const box = document.createElement("div");
    box.className = "map";
    const name = document.createElement("span");
    name.className = "map-name";
    const canvas = document.createElement("canvas");
    canvas.height = 1;
    canvas.setAttribute("role", "img");
    const part = document.createElement("span");
    part.className = "map-part";
    box.append(name, canvas, part);
    canvas.addEventListener("click", (event) => onCell(event.offsetX / canvas.clientWidth));
    made = { box, name, canvas, part, drawn: "", visible: false };
    box.strip = made;
    seen.observe(box);
    strips.set(key, made);
  }
  return made;
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.strip.visible = entry.isIntersecting;
    paint(entry.target.strip);
  }
}, { root: maps, rootMargin: "60px" });

// One pixel for each cell, stretched by the style sheet; strips outside the visible part are skipped.
function paint(made) {
  const drawn = `${made.key}|${made.marked}`;
  if (!made.visible || !made.levels?.length || made.drawn === drawn) return;
  made.drawn = drawn;
  const { canvas, levels, marked } = made;
  if (canvas.width !== levels.length) canvas.width = levels.length;
  const image = new ImageData(levels.length, 1);
  levels.forEach(([colour, alpha], n) => { if (alpha) image.data.set(palette[colour](alpha), 4 * n); });
  if (marked != null) image.data.set(palette.accent(1), 4 * marked);
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function show(made, key, levels, marked) {
  Object.assign(made, { key, levels, marked });
  paint(made);
}

function write(element, text) {
  if (element.shownText === text) return;
  element.shownText = text;
  element.textContent = text;
}

export function draw(view, { digest, chunk, onChunk }) {
  const artifact = view.artifacts[digest];
  const holders = view.order.filter((id) => view.members[id].holds[digest] && view.members[id].state !== "dead" && !view.members[id].wrong_chunks);
  const total = artifact?.chunks_total ?? 0;
  const count = Math.min(total, 256);
  const marked = chunk != null && total ? Math.floor((chunk * count) / total) : null;
  const onCell = (at) => { if (count) onChunk(Math.ceil((Math.floor(at * count) * total) / count)); };
  const copies = new Array(count).fill(0);
  const only = new Array(count).fill(null); // the only member that holds chunks of a cell; "": several do
  let known = true;
  const wanted = [];
  for (const id of holders) {
    const member = view.members[id];
    const hold = member.holds[digest];
    const made = strip(id, onCell);
    let levels;
    const cells = hold.cells ?? (hold.fraction >= 1 ? "9".repeat(count) : null);
    if (cells && cells.length === count) {
      levels = [...cells].map((digit, n) => {
        copies[n] += Number(digit) / 9;
        if (digit !== "0") only[n] = only[n] === null ? member.name : "";
        return ["held", digit === "0" ? 0 : digit === "9" ? 1 : 0.25 + Number(digit) * 0.06];
      });
    } else {
      // Gossip gives the fraction only.
      known = false;
      const filled = Math.round(hold.fraction * Math.max(count, 1));
      levels = Array.from({ length: Math.max(count, 1) }, (_, n) => ["guess", n < filled ? 1 : 0]);
    }
    show(made, `${cells ?? hold.fraction}`, levels, marked);
    write(made.name, member.name);
    write(made.part, words.percent(hold.fraction));
    const label = `${member.name} holds ${words.percent(hold.fraction)}${cells ? "" : "; which chunks is unknown"}`;
    if (made.label !== label) made.canvas.setAttribute("aria-label", label);
    made.label = label;
    wanted.push([id, made.box]);
  }
  if (count) {
    const made = strip("copies", onCell);
    made.box.classList.add("copies");
    const most = Math.max(1, ...copies.map(Math.round));
    const least = Math.min(...copies.map(Math.round));
    show(made, copies.map((n) => n.toFixed(1)).join(), copies.map((n) => ["accent", n ? 0.15 + 0.85 * (n / most) : 0]), null);
    const many = `${least === most ? "" : `${least} to `}${most} ${most === 1 ? "copy" : "copies"}`;
    write(made.name, "in the swarm");
    write(made.part, many);
    made.canvas.setAttribute("aria-label", `Of each chunk there are ${many} in the swarm`);
    wanted.unshift(["copies", made.box]);
  }
  unknown.hidden = known;
  heldInPart.hidden = total <= count;
  write(heldInPart.lastChild, `held in part (a column is ${Math.ceil(total / Math.max(1, count))} chunks)`);
  const atOrigin = artifact?.tier === "promised"; // which can be read again
  warnOfSingleCopies(known && !atOrigin ? only.filter(Boolean) : [], total, count);
  wanted.forEach(([, box], n) => { if (maps.children[n] !== box) maps.insertBefore(box, maps.children[n] ?? null); });
  while (maps.children.length > wanted.length) maps.lastChild.remove();
  const present = new Set(wanted.map(([key]) => key));
  for (const [key, made] of strips) {
    if (present.has(key)) continue;
    seen.unobserve(made.box);
    strips.delete(key);
  }
}

// A member that holds the only copy of chunks must not be stopped. The number is an estimate: cells are counted.
function warnOfSingleCopies(names, total, count) {
  alone.hidden = !names.length;
  if (!names.length) return;
  const holders = [...new Set(names)];
  const some = names.length === count ? `All ${total} chunks` : `About ${Math.max(1, Math.round((names.length * total) / count))} of ${total} chunks`;
  const holder = holders.length === 1 ? `${holders[0]} only` : `one member only (${holders.slice(0, 3).join(", ")}${holders.length > 3 ? " and others" : ""})`;
  write(alone, `${some} are with ${holder}: if it stops, the chunks are lost.`);
}

export async function ask(digest, chunk) {
  const answer = await fetch(`/tree/${digest}/${chunk}`);
  return answer.ok ? answer.json() : null;
}

// The tree as nested lists: each member below its source.
export function list(view, tree) {
  treeBox.replaceChildren();
  if (!tree) return;
  const name = (id) => view.members[id]?.name ?? id;
  const heading = document.createElement("h3");
  const holders = Object.keys(tree.edges).length;
  heading.textContent = `Chunk ${tree.chunk} is with ${holders} member${holders === 1 ? "" : "s"}`;
  treeBox.append(heading);
  const children = new Map();
  for (const [id, edge] of Object.entries(tree.edges)) {
    const parent = edge.source && edge.source in tree.edges ? edge.source : "";
    children.set(parent, [...(children.get(parent) ?? []), [id, edge]]);
  }
  const seen = new Set();
  const below = (parent) => {
    const ul = document.createElement("ul");
    const its = (children.get(parent) ?? []).sort(([, a], [, b]) => (a.at_s ?? 0) - (b.at_s ?? 0));
    for (const [id, edge] of its) {
      if (seen.has(id)) continue; // edges of lying members may make a circle
      seen.add(id);
      const li = document.createElement("li");
      const how = edge.source
        ? `${parent ? "" : ` from ${name(edge.source)},`} after ${words.seconds(edge.at_s)}`
        : " stored it before";
      li.append(Object.assign(document.createElement("strong"), { textContent: name(id) }), how);
      if (children.has(id)) li.append(below(id));
      ul.append(li);
    }
    return ul;
  };
  treeBox.append(below(""));
  if (tree.silent.length) {
    const p = document.createElement("p");
    p.textContent = `No answer from ${tree.silent.map(name).join(", ")}.`;
    treeBox.append(p);
  }
}
