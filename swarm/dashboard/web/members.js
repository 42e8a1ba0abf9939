// The tables: members, links and warnings. They hold all values of the picture, for screen readers too.

import * as words from "./words.js";

const rows = document.getElementById("rows");
const linkRows = document.getElementById("link-rows");
const warningList = document.getElementById("warnings-list");
const announcement = document.getElementById("announcement");
const linksMore = document.getElementById("links-more");
const LINKS_MAX = 200, LINKS_FIRST = 5;
const LITTLE_ROOM = 0.05; // of a disk
const order = { by: null, backwards: false, filter: "" };
let allLinks = false;
let announced = new Set();

function write(element, text) {
  if (element.shownText === text) return;
  element.shownText = text;
  element.textContent = text;
}

function made(name, kind, parent) {
  const element = document.createElement(name);
  if (kind) element.className = kind;
  parent?.append(element);
  return element;
}

// Gives `parent` one child for each key, in order, and fills each.
function keyed(parent, keys, make, fill) {
  const have = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  keys.forEach((key, n) => {
    let child = have.get(key);
    if (!child) {
      child = make(key);
      child.dataset.key = key;
    }
    have.delete(key);
    if (parent.children[n] !== child) parent.insertBefore(child, parent.children[n] ?? null);
    fill(child, key);
  });
  for (const child of have.values()) child.remove();
}

function row(chosen) {
  return (id) => {
    const tr = document.createElement("tr");
    const head = made("th", "", tr);
    head.scope = "row";
    const button = made("button", "plain", head);
    button.type = "button";
    button.addEventListener("click", () => chosen(id));
    made("span", "address", head);
    made("span", "state under", head); // replaces its column on a narrow screen
    made("span", "state", made("td", "beside", tr));
    const holds = made("td", "holds", tr);
    made("i", "", made("span", "bar", holds));
    made("span", "part", holds);
    for (const kind of ["number ready", "number", "number", "number room", "place", "what-runs"]) made("td", kind, tr);
    return tr;
  };
}

// What a column is sorted by: numbers the greatest first, words from the beginning of the alphabet.
const KEYS = {
  member: (m) => m.name, state: (m, digest) => words.STATES[words.condition(m, digest)], holds: (m, digest) => part(m, digest),
  ready: (m, digest) => -(words.running(m, digest)?.eta_s ?? -1), down: (m) => m.down_bytes_per_s, up: (m) => m.up_bytes_per_s,
  room: (m) => -(m.disk_free_bytes ?? Infinity), place: (m) => `${m.rack ?? "~"} ${m.host ?? "~"}`, version: (m, _, view) => words.contents(m, view.artifacts).join(" "),
};
const { compare } = new Intl.Collator("en", { numeric: true });

function part(member, digest) {
  const fetch = words.running(member, digest);
  return fetch ? fetch.done_bytes / Math.max(1, fetch.bytes) : words.fraction(member, digest);
}

function sorted(view, ids, digest) {
  if (!order.by) return ids;
  const values = new Map(ids.map((id) => [id, KEYS[order.by](view.members[id], digest, view)]));
  const by = (a, b) => (typeof values.get(a) === "string" ? compare(values.get(a), values.get(b)) : values.get(b) - values.get(a));
  return [...ids].sort((a, b) => (order.backwards ? -1 : 1) * by(a, b));
}

// Every word must be in what the row says.
function matching(view, ids, digest) {
  const wanted = order.filter.toLowerCase().split(/\s+/).filter(Boolean);
  if (!wanted.length) return ids;
  return ids.filter((id) => {
    const m = view.members[id];
    const text = [m.name, m.address, words.place(m), words.STATES[words.condition(m, digest)], ...words.contents(m, view.artifacts)].join(" ").toLowerCase();
    return wanted.every((word) => text.includes(word));
  });
}

export function onOrder(changed) {
  document.getElementById("filter").addEventListener("input", (event) => { order.filter = event.target.value; changed(); });
  for (const button of document.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => {
      const by = button.dataset.sort;
      if (order.by !== by) Object.assign(order, { by, backwards: false });
      else if (!order.backwards) order.backwards = true;
      else order.by = null; // as in the picture again
      for (const other of document.querySelectorAll("[data-sort]")) {
        other.closest("th").setAttribute("aria-sort", other.dataset.sort !== order.by ? "none" : order.backwards ? "descending" : "ascending");
      }
      changed();
    });
  }
}

export function draw(view, { digest, selected, chosen }) {
  const shown = sorted(view, matching(view, view.order, digest), digest);
  write(document.getElementById("filtered"), shown.length === view.order.length ? "" : `${shown.length} of ${view.order.length}`);
  keyed(rows, shown, row(chosen), (tr, id) => {
    const member = view.members[id];
    const condition = words.condition(member, digest);
    const fetch = words.running(member, digest);
    const [head, state, holds, ready, down, up, room, place, runs] = tr.children;
    tr.className = `is-${condition}${selected === id ? " selected" : ""}`;
    write(head.firstChild, member.name);
    write(head.children[1], member.origin ? words.asked(member.origin) : member.address);
    head.firstChild.setAttribute("aria-pressed", String(selected === id));
    write(state.firstChild, words.STATES[condition]);
    write(head.lastChild, words.STATES[condition]);
    write(place, [member.rack, member.host].filter(Boolean).join(", ") || "–");
    holds.firstChild.hidden = Boolean(member.origin);
    const has = part(member, digest);
    const width = `${(has * 100).toFixed(1)}%`;
    if (holds.firstChild.firstChild.style.width !== width) holds.firstChild.firstChild.style.width = width;
    const none = condition === "other" || condition === "idle";
    write(holds.lastChild, member.origin ? `${words.bytes(member.origin.bytes)} read` : none ? "–" : words.percent(has));
    write(room, words.bytes(member.disk_free_bytes));
    tr.classList.toggle("full", Boolean(member.disk_bytes) && member.disk_free_bytes < LITTLE_ROOM * member.disk_bytes);
    const contents = words.contents(member, view.artifacts);
    write(runs, contents.slice(0, 3).join("\n") + (contents.length > 3 ? `\n${contents.length - 3} more` : ""));
    if (runs.title !== contents.join("\n")) runs.title = contents.join("\n");
    write(ready, fetch ? words.seconds(fetch.eta_s) : condition === "seed" || condition === "wanted" ? "ready" : "–");
    write(down, words.rate(member.down_bytes_per_s));
    write(up, words.rate(member.up_bytes_per_s));
  });
  const moving = Object.entries(view.links).filter(([, link]) => link.rate_bytes_per_s > 0);
  write(document.getElementById("links-count"), String(moving.length));
  if (document.getElementById("links-twin").open) {
    moving.sort(([, a], [, b]) => b.rate_bytes_per_s - a.rate_bytes_per_s);
    const fill = (tr, key) => {
      const link = view.links[key];
      const cells = [view.members[link.source]?.name, view.members[link.target]?.name, words.rate(link.rate_bytes_per_s), words.bytes(link.bytes)];
      cells.forEach((text, n) => write(tr.children[n], text ?? "–"));
    };
    const make = () => {
      const tr = document.createElement("tr");
      ["", "", "number", "number"].forEach((kind) => made("td", kind, tr));
      return tr;
    };
    keyed(linkRows, moving.slice(0, allLinks ? LINKS_MAX : LINKS_FIRST).map(([key]) => key), make, fill);
    const more = Math.min(moving.length, LINKS_MAX) - LINKS_FIRST;
    linksMore.hidden = more <= 0 && !allLinks;
    write(linksMore, allLinks ? `Only the first ${LINKS_FIRST}` : `Show ${more} more`);
  }
}

// Switches between all links and the first few.
export function toggleLinks() {
  allLinks = !allLinks;
}

// Warnings; new ones are announced to screen readers.
export function warn(view, chosen) {
  const keys = Object.keys(view.warnings).sort();
  document.getElementById("warnings").classList.toggle("well", keys.length === 0);
  const make = (key) => {
    const li = document.createElement("li");
    made("span", "level", li);
    const text = made("span", "what", li);
    made("strong", "", text);
    text.append(" ");
    made("span", "do", text);
    const node = view.warnings[key].node;
    if (node) {
      const button = made("button", "small", li);
      button.type = "button";
      button.textContent = "Show";
      button.setAttribute("aria-label", `Show ${view.members[node]?.name ?? node}`);
      button.addEventListener("click", () => chosen(node));
    }
    return li;
  };
  keyed(warningList, keys.length ? keys : ["none"], (key) => {
    if (key !== "none") return make(key);
    const li = document.createElement("li");
    li.className = "none";
    li.textContent = "No warnings.";
    return li;
  }, (li, key) => {
    if (key === "none") return;
    const warning = view.warnings[key];
    li.className = `level-${warning.level}`;
    write(li.querySelector(".level"), warning.level === "bad" ? "!" : "?");
    write(li.querySelector("strong"), warning.what + ".");
    write(li.querySelector(".do"), warning.do);
  });
  const fresh = keys.filter((key) => !announced.has(key));
  if (fresh.length) write(announcement, fresh.slice(0, 5).map((key) => view.warnings[key].what).join(". "));
  announced = new Set(keys);
}
