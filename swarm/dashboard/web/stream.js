// The view as it changes: a snapshot, then JSON merge patches (RFC 7396). The browser reconnects by itself.

function merge(target, changes) {
  for (const [key, value] of Object.entries(changes)) {
    if (value === null) delete target[key];
    else if (typeof value !== "object") target[key] = value;
    else target[key] = merge(typeof target[key] === "object" ? target[key] : {}, value);
  }
  return target;
}

// `show(view)` is called with every change; `tell(connected)` when the connection comes or goes. Returns
// what ends it.
export function follow(url, show, tell) {
  let view = null;
  const source = new EventSource(url);
  source.addEventListener("open", () => tell(true));
  source.addEventListener("error", () => tell(false));
  source.addEventListener("snapshot", (event) => { view = merge({}, JSON.parse(event.data)); show(view); });
  source.addEventListener("patch", (event) => { if (view) show(merge(view, JSON.parse(event.data))); });
  addEventListener("pagehide", () => source.close());
  return () => source.close();
}
