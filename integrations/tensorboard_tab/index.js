// The tab: the runs on the left, four cards, one state. TensorBoard calls render().

import { ask, empty, h, short } from "./charts.js";
import { drawDepth } from "./depth.js";
import { drawSamples } from "./samples.js";
import { drawMaps, drawProfile } from "./slices.js";

const state = { shown: [], number: "median", change: false, colour: "class", run: null, layer: null, step: null, sample: null };
let runs = [], depth = [], filter = "", version = "";
const hidden = new Set(), FIRST = 4; // runs that are shown before anybody chose
const sidebar = h("aside"), main = h("main"), tip = h("div", { id: "tip", hidden: true });

function card(title, id) {
  const controls = h("div", { className: "controls" }), note = h("p", { className: "note" }), body = h("div"), below = h("div", { className: "below" });
  const plot = h("div", { className: "plot" });
  const save = h("button", { className: "icon", title: "download this picture", onclick: () =>
    Plotly.downloadImage(plot, { format: "png", scale: 2, width: plot.clientWidth, height: plot.clientHeight, filename: plot.dataset.file }) }, "⤓");
  const own = {
    element: h("section", { className: "card", id }, h("header", {}, h("h2", {}, title), controls, save), note, body, below),
    controls: (...made) => controls.replaceChildren(...made.filter(Boolean)),
    note: (text) => { note.textContent = text; },
    below: (...made) => below.replaceChildren(...made),
    plot: () => { save.hidden = false; if (plot.parentNode !== body) body.replaceChildren(plot); return plot; },
    says: (made) => { save.hidden = true; controls.replaceChildren(); note.textContent = ""; below.replaceChildren(); body.replaceChildren(made); },
    tip: (made, event) => {
      tip.hidden = !made;
      if (!made) return;
      tip.replaceChildren(made);
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    },
  };
  return own;
}
const cards = { depth: card("Depth × time", "depth"), samples: card("Samples", "samples"), maps: card("Maps", "maps"), profile: card("Boundary profile", "profile") };

async function guarded(own, draw) {
  try { await draw(); } catch (error) { own.says(empty(`This could not be drawn: ${error.message}`)); }
}

function choose(change) {
  Object.assign(state, change);
  const all = ["number", "change"].some((key) => key in change);
  return draw({ depth: all || ["run", "layer", "step"].some((key) => key in change), others: !all });
}

// One drawing after the other; of those that wait, the last.
let drawing = null, waiting = null;
async function draw(what = { depth: true, others: true }) {
  waiting = { depth: what.depth || waiting?.depth, others: what.others || waiting?.others };
  if (drawing) return drawing;
  drawing = (async () => {
    while (waiting) {
      const now = waiting;
      waiting = null;
      await drawOnce(now);
    }
  })();
  await drawing.finally(() => { drawing = null; });
}

async function drawOnce({ depth: above, others }) {
  state.shown = runs.map((run) => run.name).filter((name) => !hidden.has(name));
  if (!state.shown.includes(state.run)) Object.assign(state, { run: null });
  if (above) {
    await guarded(cards.depth, async () => { depth = await drawDepth(cards.depth, state, choose); });
    const own = depth.find((run) => run.run === state.run) ?? depth[0];
    const before = [state.run, state.layer, state.step].join();
    if (own) {
      state.run = own.run;
      if (!own.layers.some((layer) => layer.name === state.layer)) state.layer = own.layers.at(-1).name;
      if (!own.steps.includes(state.step)) state.step = own.steps.at(-1);
    } else cards.depth.says(runs.length ? empty("Every run is hidden: choose one on the left.") : nothing());
    state.old = own?.old;
    if (before !== [state.run, state.layer, state.step].join() && own) await guarded(cards.depth, () => drawDepth(cards.depth, state, choose));
  }
  state.about = runs.find((run) => run.name === state.run);
  state.version = state.about ? `${state.about.first}` : "";
  for (const own of [cards.samples, cards.maps, cards.profile]) own.element.hidden = !state.run;
  if (!state.run || !(others || above)) return;
  await Promise.all([
    guarded(cards.samples, () => drawSamples(cards.samples, state, choose)),
    guarded(cards.maps, () => drawMaps(cards.maps, state)), guarded(cards.profile, () => drawProfile(cards.profile, state))]);
  document.body.dataset.drawn = [state.run, state.layer, state.step, state.colour, state.sample].join("|");
}

const nothing = () => empty("No run here has geometry yet. Write it in the training loop:",
  "import torchgeom_probe as tgp\n\nwith tgp.Monitor(model, x[:32], labels=y[:32], every=100, writer=\"runs/a\").follow(optimizer):\n    for batch in loader:\n        ...  # as before");

function drawSidebar() {
  const toggle = (name) => { hidden.has(name) ? hidden.delete(name) : hidden.add(name); drawSidebar(); draw(); };
  const only = (name) => { runs.forEach((run) => hidden.add(run.name)); hidden.delete(name); drawSidebar(); draw(); };
  const shown = runs.filter((run) => run.name.toLowerCase().includes(filter.toLowerCase()));
  const list = shown.map((run) => h("label", { className: "run", title: run.name },
    h("input", { type: "checkbox", checked: !hidden.has(run.name), onchange: () => toggle(run.name) }),
    h("span", {}, short(run.name, 34)), h("small", {}, run.old ? "old" : `${run.probes}`),
    h("button", { className: "only", title: "show this run alone", onclick: (event) => { event.preventDefault(); only(run.name); } }, "only")));
  const box = sidebar.querySelector(".runs");
  if (box) return box.replaceChildren(...list);
  sidebar.replaceChildren(h("h3", {}, "Runs", h("small", {}, "probes")),
    h("input", { type: "search", placeholder: "Filter runs", oninput: (event) => { filter = event.target.value; drawSidebar(); } }),
    h("div", { className: "runs" }, list));
}

async function refresh() {
  let found = await ask("runs");
  const bar = h("progress"), told = h("span");
  while (found.reading) {
    if (!runs.length) {
      if (!bar.isConnected) cards.depth.says(h("div", { className: "reading" }, h("p", {}, "Reading the event files, once"), bar, told));
      Object.assign(bar, { max: found.total || 1, value: found.read });
      told.textContent = `${(found.read / 1e6).toFixed(0)} of ${(found.total / 1e6).toFixed(0)} MB`;
    }
    await new Promise((wait) => setTimeout(wait, 100));
    found = await ask("runs");
  }
  if (!found.plotly) return main.replaceChildren(empty("The charts are drawn by the Python package plotly, which is not installed where TensorBoard runs:", "python -m pip install plotly"));
  if (JSON.stringify(found.runs) === version) return;
  version = JSON.stringify(found.runs);
  const known = new Set(runs.map((run) => run.name)), following = state.about && state.step === state.about.last[0];
  found.runs.filter((run) => !known.has(run.name)).slice(runs.length ? 0 : FIRST).forEach((run) => hidden.add(run.name));
  runs = found.runs;
  if (following) state.step = null; // who looks at the last step goes on doing so
  drawSidebar();
  await draw();
}

const loaded = (file) => new Promise((done, failed) => {
  document.head.append(h("script", { src: file, onload: done, onerror: failed }));
});

export async function render() {
  document.head.append(h("link", { rel: "stylesheet", href: "style.css" }));
  document.body.replaceChildren(sidebar, main, tip);
  main.append(...Object.values(cards).map((own) => own.element));
  for (const own of [cards.samples, cards.maps, cards.profile]) own.element.hidden = true;
  follow();
  const plotly = loaded("plotly.min.js").catch(() => {});
  await Promise.all([plotly, ask("runs")]);
  const again = () => refresh().catch((error) => { if (!runs.length) cards.depth.says(empty(`TensorBoard does not answer: ${error.message}`)); });
  await again();
  listen(again);
}

// Dark mode and the font are those of the page around; the frame is of the same origin.
function follow() {
  const around = parent.document;
  const dark = () => document.body.classList.toggle("dark", around.body.classList.contains("dark-mode"));
  dark();
  new MutationObserver(() => { const was = document.body.classList.contains("dark"); if (dark() !== was) draw(); })
    .observe(around.body, { attributes: true, attributeFilter: ["class"] });
  const faces = [...around.styleSheets].flatMap((sheet) => { try { return [...sheet.cssRules]; } catch { return []; } }).filter((rule) => rule.constructor.name === "CSSFontFaceRule");
  document.head.append(h("style", {}, faces.map((rule) => rule.cssText.replace(/url\("(?!\w+:)/g, `url("${around.baseURI.replace(/[^/]*([?#].*)?$/, "")}`)).join("\n")));
}

// TensorBoard says when it has reloaded: by hand, or by its own timer.
function listen(reloaded) {
  const channel = new MessageChannel();
  channel.port1.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.isReply) return;
    channel.port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
    if (message.type === "experimental.DataReloaded") reloaded();
  };
  parent.postMessage("experimental.bootstrap", "*", [channel.port2]);
}
