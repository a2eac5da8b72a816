// The tab: the runs on the left, four cards, one state. TensorBoard calls render().

import { ask, empty, h, isDark, short } from "./charts.js";
import { drawDepth, mark } from "./depth.js";
import { drawSamples } from "./samples.js";
import { drawMaps, drawProfile } from "./slices.js";

const FIRST = 4; // runs that are shown before anybody chose
const IN_A_LOOP = `import torchgeom_probe as tgp

with tgp.Monitor(model, x[:32], labels=y[:32], every=100, writer="runs/a").follow(optimizer):
    for batch in loader:
        ...  # as before`;

// What is shown: which runs, which number of them; of which run, layer, step and sample everything below.
const state = {
  shown: [], number: "median", change: "", run: null, layer: null, step: null, sample: null, colour: "class", fixed: "",
};
let runs = [], version = "", filter = "", depth = { looks: "", runs: [] };
const hidden = new Set();
const list = h("div", { className: "runs" });
const main = h("main"), tip = h("div", { id: "tip", hidden: true });
const cards = {
  depth: card("Depth × time"), samples: card("Samples"), map: card("Maps"), profile: card("Boundary profile"),
};
const below = [cards.samples, cards.map, cards.profile];

function card(title) {
  const [controls, body, below, plot] = ["controls", "", "below", "plot"].map((className) => h("div", { className }));
  const note = h("p", { className: "note" });
  const download = () => Plotly.downloadImage(plot, {
    format: "png", scale: 2, width: plot.clientWidth, height: plot.clientHeight, filename: plot.dataset.file });
  const save = h("button", { className: "icon", title: "download this picture", onclick: download }, "⤓");
  const head = h("header", {}, h("h2", {}, title), controls, save);
  return {
    element: h("section", { className: "card" }, head, note, body, below),
    controls: (...made) => controls.replaceChildren(...made.filter(Boolean)),
    note: (text) => { note.textContent = text; },
    below: (...made) => below.replaceChildren(...made),
    plot() {
      save.hidden = false;
      if (plot.parentNode !== body) body.replaceChildren(plot);
      return plot;
    },
    says(made) {
      save.hidden = true;
      note.textContent = "";
      for (const [part, content] of [[controls, []], [below, []], [body, [made]]]) part.replaceChildren(...content);
    },
    tip(made, event) {
      tip.hidden = !made;
      tip.replaceChildren(made ?? "");
      if (!made) return;
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    },
  };
}

// One drawing after the other; those that were asked for meanwhile are one.
let drawing = null, again = false;
function draw() {
  again = true;
  drawing ??= (async () => {
    while (again && innerWidth) { // a frame that is hidden has no width: it draws when it is shown
      again = false;
      await drawOnce();
    }
    drawing = null;
  })();
  return drawing;
}

function choose(change) {
  Object.assign(state, change);
  return draw();
}

const guarded = (own, made) =>
  Promise.resolve(made()).catch((error) => own.says(empty(`This could not be drawn: ${error?.message ?? error}`)));

async function drawOnce() {
  state.shown = runs.map((run) => run.name).filter((name) => !hidden.has(name));
  const looks = JSON.stringify([state.shown, state.number, state.change, version, isDark(), innerWidth]);
  if (looks !== depth.looks) {
    depth = { looks, runs: (await guarded(cards.depth, () => drawDepth(cards.depth, state, choose))) ?? [] };
  }
  const shown = depth.runs, own = shown.find((run) => run.run === state.run) ?? shown[0];
  for (const each of below) each.element.hidden = !own;
  if (!own) {
    cards.depth.says(runs.length ? empty("Every run is hidden: choose one on the left.")
      : empty("No run here has geometry yet. Write it in the training loop:", IN_A_LOOP));
    document.body.dataset.drawn = "nothing";
    return;
  }
  // The deepest layer with a finite value at the last step, unless one was chosen.
  const finite = own.layers.filter((_, row) => own.values[row].at(-1) != null);
  const layer = (own.layers.find((one) => one.name === state.layer) ?? finite.at(-1) ?? own.layers.at(-1)).name;
  const step = own.steps.includes(state.step) ? state.step : own.steps.at(-1);
  const about = runs.find((run) => run.name === own.run);
  Object.assign(state, { run: own.run, layer, step, about, old: own.old });
  tip.hidden = true;
  await Promise.all([
    guarded(cards.depth, () => mark(cards.depth, shown, state)),
    guarded(cards.samples, () => drawSamples(cards.samples, state, choose)),
    guarded(cards.map, () => drawMaps(cards.map, state)),
    guarded(cards.profile, () => drawProfile(cards.profile, state))]);
  document.body.dataset.drawn = JSON.stringify([state.run, state.layer, state.step, state.sample]);
}

function drawRuns() {
  const chosen = () => { drawRuns(); draw(); };
  const toggle = (name) => { if (!hidden.delete(name)) hidden.add(name); chosen(); };
  const only = (name) => { runs.forEach((run) => hidden.add(run.name)); hidden.delete(name); chosen(); };
  const shown = runs.filter((run) => run.name.toLowerCase().includes(filter.toLowerCase()));
  list.replaceChildren(...shown.map(({ name, old, probes }) => h("label", { className: "run", title: name },
    h("input", { type: "checkbox", checked: !hidden.has(name), onchange: () => toggle(name) }),
    h("span", {}, short(name, 27)), h("small", {}, old ? "old" : `${probes}`),
    h("button", { title: "show this run alone", onclick: (event) => (event.preventDefault(), only(name)) }, "only"))));
}

async function refresh() {
  let found = await ask("runs");
  const bar = h("progress"), told = h("span");
  const reading = h("div", { className: "reading" }, h("p", {}, "Reading the event files"), bar, told);
  if (found.reading && !runs.length) cards.depth.says(reading);
  while (found.reading) {
    Object.assign(bar, { max: found.total || 1, value: found.read });
    told.textContent = `${Math.round(found.read / 1e6)} of ${Math.round(found.total / 1e6)} MB`;
    await new Promise((wait) => setTimeout(wait, 100));
    found = await ask("runs");
  }
  if (!found.plotly) return main.replaceChildren(empty(
    "The Python package plotly draws the charts, and it is not installed where TensorBoard runs:",
    "python -m pip install plotly"));
  const before = version;
  version = JSON.stringify(found.runs);
  if (version === before) return;
  const known = new Set(runs.map((run) => run.name)), fresh = found.runs.filter((run) => !known.has(run.name));
  fresh.slice(known.size ? 0 : FIRST).forEach((run) => hidden.add(run.name));
  if (state.step === state.about?.last[0]) state.step = null; // who looks at the last step goes on doing so
  runs = found.runs;
  drawRuns();
  await draw();
}

export async function render() {
  document.head.append(h("link", { rel: "stylesheet", href: "style.css" }));
  const search = h("input", { type: "search", placeholder: "Filter runs" });
  search.addEventListener("input", () => { filter = search.value; drawRuns(); });
  document.body.append(h("aside", {}, h("h3", {}, "Runs", h("small", {}, "probes")), search, list), main, tip);
  main.append(...Object.values(cards).map((own) => own.element));
  for (const each of below) each.element.hidden = true;
  followLooks();
  const plotly = new Promise((done) => {
    document.head.append(h("script", { src: "plotly.min.js", onload: done, onerror: done }));
  });
  await Promise.all([plotly, ask("runs")]);
  const reloaded = () => refresh().catch((error) => {
    if (!runs.length) cards.depth.says(empty(`TensorBoard does not answer: ${error.message}`));
  });
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(draw, 150); });
  listen(reloaded);
  await reloaded();
}

// Dark mode and the font are those of the page around, which is of the same origin.
function followLooks() {
  const around = parent.document, style = h("style");
  const rulesOf = (sheet) => { try { return [...sheet.cssRules]; } catch { return []; } };
  const rules = [...around.styleSheets].flatMap(rulesOf);
  const faces = rules.map((rule) => rule.cssText).filter((text) => text.startsWith("@font-face"));
  const base = new URL(".", around.baseURI).href;
  style.textContent = faces.map((face) => face.replace(/url\("(?!\w+:)/g, `url("${base}`)).join("\n");
  document.head.append(style);
  const look = () => document.body.classList.toggle("dark", around.body.classList.contains("dark-mode"));
  look();
  const observer = new MutationObserver(() => { const before = isDark(); if (look() !== before) draw(); });
  observer.observe(around.body, { attributes: true, attributeFilter: ["class"] });
}

// TensorBoard says when it has reloaded: by hand, or by its own timer.
function listen(reloaded) {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = ({ data }) => {
    const { type, id, isReply } = JSON.parse(data);
    if (isReply) return;
    port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
    if (type === "experimental.DataReloaded") reloaded();
  };
  parent.postMessage("experimental.bootstrap", "*", [port2]);
}
