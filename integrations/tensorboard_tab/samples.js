// Samples: each one's trajectory in the chosen layer, the distribution at the step, the most and the least magnified.

import { CLASSES, ask, axis, chart, empty, h, name, number, paint, pictures, safe, select, short, unit } from "./charts.js";

const SEQUENTIAL = ["#440154", "#3b528b", "#21918c", "#5ec962", "#c8b800"];
const known = new Map(); // run → its samples

async function identity(run, version) {
  if (known.get(run)?.version !== version) {
    const found = await ask("samples", { run });
    known.set(run, { ...found, version, picture: pictures(found.thumbnails, found.shape) });
  }
  return known.get(run);
}

export async function drawSamples(card, state, choose) {
  if (state.layer == null || state.old) return card.says(empty(
    state.old ? "This log was written before the Geometry tab, and has no numbers of single samples. New probes have them:"
      : "No probe has been written yet.", "tgp.Monitor(model, x, labels=y, writer=\"runs/a\").follow(optimizer)"));
  const [found, who] = await Promise.all([
    ask("layer", { run: state.run, layer: state.layer, step: state.step }), identity(state.run, state.version)]);
  const at = found.steps.indexOf(found.step), size = found.value[0].length;
  const samples = [...Array(size).keys()];
  const predicted = (i, step = at) => found.predictions?.[step][i];
  const wrong = (i, step = at) => typeof who.labels?.[i] === "number" && found.predictions ? predicted(i, step) !== who.labels[i] : null;
  const called = (i) => (who.labels ? `${who.labels[i]}` : `sample ${who.indices?.[i] ?? i}`);
  const ways = [
    ...(who.labels || found.predictions ? [["class", who.labels ? "label" : "predicted class"]] : []),
    ...(samples.some((i) => wrong(i) != null) ? [["correct", "correct or wrong"]] : []),
    ...(found.margin ? [["margin", "margin"]] : []), ["none", "one colour"]];
  const way = ways.some(([key]) => key === state.colour) ? state.colour : ways[0][0];
  card.controls(select("Colour", ways, way, (value) => choose({ colour: value })));

  const groups = grouped(way);
  function grouped(by) {
    if (by === "none") return [["samples", samples, CLASSES[0]]];
    if (by === "correct") return [["correct", samples.filter((i) => !wrong(i)), CLASSES[0]], ["wrong", samples.filter(wrong), CLASSES[1]]];
    if (by === "margin") {
      const order = [...samples].sort((a, b) => (found.margin[at][a] ?? -1) - (found.margin[at][b] ?? -1));
      const fifth = Math.ceil(size / 5);
      return SEQUENTIAL.map((colour, k) => [order.slice(k * fifth, (k + 1) * fifth), colour]).filter(([own]) => own.length)
        .map(([own, colour]) => [`margin ${number(found.margin[at][own[0]])} … ${number(found.margin[at][own.at(-1)])}`, own, colour]);
    }
    const of = (i) => (who.labels ? who.labels[i] : predicted(i));
    const classes = [...new Set(samples.map(of))].sort((a, b) => (a > b) - (a < b));
    const first = classes.length <= 10 ? classes : classes.slice(0, 9);
    const some = first.map((c, k) => [`${c}`, samples.filter((i) => of(i) === c), CLASSES[k]]);
    return first === classes ? some : [...some, ["other", samples.filter((i) => !first.includes(of(i))), CLASSES[9]]];
  }

  const { heading, unit: measured } = found.about, label = heading + unit(measured);
  const mode = found.steps.length <= 40 ? "lines+markers" : "lines";
  const traces = groups.filter(([, own]) => own.length).map(([title, own, colour]) => ({
    type: "scatter", mode, name: safe(short(title, 24)), showlegend: way !== "none", hoverinfo: "none", line: { color: colour, width: 1.2 },
    marker: { size: 4 }, opacity: 0.75, x: own.flatMap(() => [...found.steps, null]),
    y: own.flatMap((i) => [...found.value.map((row) => row[i]), null]), customdata: own.flatMap((i) => [...found.steps.map(() => i), i]),
  }));
  if (state.sample != null && state.sample < size) traces.push({
    type: "scatter", mode: "lines+markers", showlegend: false, hoverinfo: "none", x: found.steps, y: found.value.map((row) => row[state.sample]),
    customdata: found.steps.map(() => state.sample), line: { color: "#f57c00", width: 3 }, marker: { size: 5 },
  });
  traces.push({ type: "histogram", y: found.value[at], xaxis: "x2", nbinsy: 24, marker: { color: "#90a4ae" }, showlegend: false, hovertemplate: "%{x} samples<extra></extra>" });
  const plot = card.plot();
  await chart(plot, traces, {
    height: 330, showlegend: way !== "none", legend: { orientation: "h", y: 1.01, yanchor: "bottom", x: 0, font: { size: 11 } },
    xaxis: axis("step", { domain: [0, 0.82] }), yaxis: axis(label), xaxis2: axis(`samples at step ${found.step}`, { domain: [0.85, 1] }), bargap: 0.05,
    shapes: [{ type: "line", x0: found.step, x1: found.step, yref: "paper", y0: 0, y1: 1, line: { color: "#f57c00", width: 1.5, dash: "dot" } }],
    margin: { l: 64, r: 16, t: 30, b: 44 },
  }, "geometry samples");

  const tell = (i, step) => h("div", { className: "about" }, who.picture(i),
    h("div", {}, h("b", {}, who.labels ? `label ${called(i)}` : called(i)),
      who.labels && who.indices ? h("div", {}, `sample ${who.indices[i]}`) : null,
      found.predictions ? h("div", { className: wrong(i, step) ? "wrong" : "" }, `predicted ${predicted(i, step)}${wrong(i, step) ? ", wrong" : ""}`) : null,
      found.margin ? h("div", {}, `margin ${number(found.margin[step][i])}`) : null,
      h("div", {}, `${heading} ${number(found.value[step][i])} ${measured ?? ""}`),
      step === at && found.sigma?.[i]?.length ? h("div", {}, `σ ${number(exp(found.sigma[i][0]))} … ${number(exp(lowest(found.sigma[i])))}`) : null,
      h("div", {}, `step ${found.steps[step]}`)));
  for (const event of ["plotly_hover", "plotly_unhover", "plotly_click"]) plot.removeAllListeners?.(event);
  plot.on("plotly_hover", ({ points: [point], event }) => {
    if (point.customdata != null) card.tip(tell(point.customdata, found.steps.indexOf(point.x)), event);
  });
  plot.on("plotly_unhover", () => card.tip(null));
  plot.on("plotly_click", ({ points: [point] }) => point.customdata != null && choose({ sample: point.customdata, step: point.x }));

  const order = samples.filter((i) => found.value[at][i] != null).sort((a, b) => found.value[at][b] - found.value[at][a]);
  const few = Math.min(8, Math.ceil(order.length / 2));
  const tile = (i) => h("button", { className: "tile" + (i === state.sample ? " chosen" : ""), title: called(i), onclick: () => choose({ sample: i }) },
    who.picture(i), direction(found, i), h("span", {}, short(called(i), 12)),
    found.predictions && who.labels ? h("span", { className: wrong(i) ? "wrong" : "" }, `→ ${predicted(i)}`) : null, h("span", {}, number(found.value[at][i])));
  card.below(...[["Most magnified", order.slice(0, few)], ["Least magnified", order.slice(few).slice(-few).reverse()]].map(([title, own]) =>
    h("div", { className: "strip" }, h("div", { className: "title" }, title, h("small", {}, ` ${label} at step ${found.step}`)), h("div", { className: "tiles" }, own.map(tile)))));
  const lost = size - order.length;
  card.note(`${short(name(state.layer), 60)}: ${found.about.estimand}; n = ${found.about.n}, d = ${found.about.d}, k = ${found.about.k}; J ${found.about.normalized ? "" : "not "}divided by √n`
    + (lost ? `; ${lost} of ${size} samples are not finite at this step` : "") + (found.directions ? "; beside a thumbnail its direction of largest stretch" : ""));
}

const exp = (value) => (value == null ? 0 : Math.exp(value));
const lowest = (sigma) => sigma.filter((value) => value != null).at(-1);

// The top direction of one of the extreme samples, blue to red, or nothing.
function direction(found, i) {
  const place = found.extremes?.indexOf(i) ?? -1;
  if (place < 0 || !found.directions) return null;
  const [, high, wide] = found.shape, bytes = Int8Array.from(atob(found.directions), (c) => c.charCodeAt(0));
  return paint(wide, high, (p) => {
    const v = bytes[place * high * wide + p] / 127;
    return v > 0 ? [255, 255 * (1 - v), 255 * (1 - v)] : [255 * (1 + v), 255 * (1 + v), 255];
  });
}
