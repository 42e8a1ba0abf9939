// Position and speed of a recording. Both are in the path of its events: pause, seek and speed switch to another path.

import * as words from "./words.js";

const element = (id) => document.getElementById(`replay-${id}`);
const bar = document.getElementById("replay");
let now = null; // `replay` of the view
let watch = null;
let held = false; // the user drags the slider

const atEnd = () => now.at_s >= now.seconds;

function go(at_s, speed) {
  now = { ...now, at_s, speed };
  watch(`/events/${Math.round(at_s * 1000)}/${speed}`);
}

// `watching(url)` switches to other events.
export function follow(watching) {
  watch = watching;
}

export function draw(replay) {
  bar.hidden = !replay;
  document.body.classList.toggle("recorded", Boolean(replay));
  if (!replay) return;
  now = replay;
  element("play").textContent = now.speed && !atEnd() ? "Pause" : atEnd() ? "Play again" : "Play";
  const slider = element("at");
  if (slider.max !== String(now.seconds)) slider.max = now.seconds;
  if (!held) slider.value = now.at_s;
  slider.setAttribute("aria-valuetext", `${words.seconds(now.at_s)} of ${words.seconds(now.seconds)}`);
  element("time").textContent = `${words.seconds(now.at_s)} of ${words.seconds(now.seconds)}, ${now.file}`;
}

element("play").addEventListener("click", () => {
  if (atEnd()) go(0, Number(element("speed").value));
  else go(now.at_s, now.speed ? 0 : Number(element("speed").value));
});
element("at").addEventListener("input", () => { held = true; });
element("at").addEventListener("change", (event) => { held = false; go(Number(event.target.value), now.speed); });
element("speed").addEventListener("change", (event) => { if (now.speed) go(now.at_s, Number(event.target.value)); });
