// The live view: a snapshot, then JSON merge patches (RFC 7396). The browser reconnects by itself.

function merge(target, changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === null) delete target[key];
    else if (typeof value !== "object") target[key] = value;
    else target[key] = merge(typeof target[key] === "object" ? target[key] : {}, value);
  }
  return target;
}

// Calls `show(view)` after every change, and `connected(true | false)` when the connection opens or breaks. Returns a
// function that closes it.
export function follow(url, show, connected) {
  let view = null;
  const source = new EventSource(url);
  source.addEventListener("open", () => connected(true));
  source.addEventListener("error", () => connected(false));
  source.addEventListener("snapshot", (event) => { view = merge({}, JSON.parse(event.data)); show(view); });
  source.addEventListener("patch", (event) => { if (view) show(merge(view, JSON.parse(event.data))); });
  addEventListener("pagehide", () => source.close());
  return () => source.close();
}
