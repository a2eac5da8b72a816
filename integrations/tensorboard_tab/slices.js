// Maps and boundary profiles: what is drawn per layer in a grid of panels, with a slider over the steps.

import { ask, axis, chart, empty, h, name, pictures, safe, select, short, slider, unit } from "./charts.js";

const MOST = 8; // panels

// The chosen layer and others evenly over the depth.
function panels(layers, chosen) {
  if (layers.length <= MOST) return layers.map((_, i) => i);
  const some = new Set([...Array(MOST).keys()].map((k) => Math.round((k * (layers.length - 1)) / (MOST - 1))));
  const own = layers.findIndex((layer) => layer.name === chosen);
  if (own >= 0 && !some.has(own)) { some.delete([...some].reduce((a, b) => (Math.abs(b - own) < Math.abs(a - own) ? b : a))); some.add(own); }
  return [...some].sort((a, b) => a - b);
}

function grid(count, wide, high) {
  const columns = Math.max(1, Math.min(count, Math.floor(wide / 250), 4)), rows = Math.ceil(count / columns);
  const across = 1 / columns, down = 1 / rows, total = rows * high;
  return { height: total + 30, of: (k) => ({
    x: [(k % columns) * across + 50 / wide, ((k % columns) + 1) * across - 62 / wide],
    y: [1 - (Math.floor(k / columns) + 1) * down + 46 / total, 1 - Math.floor(k / columns) * down - 30 / total] }) };
}

const axes = (k) => [`x${k ? k + 1 : ""}`, `y${k ? k + 1 : ""}`];
const title = (layer, place, bold) => ({
  text: bold ? `<b>${safe(short(name(layer), 28))}</b>` : safe(short(name(layer), 28)), showarrow: false, x: (place.x[0] + place.x[1]) / 2,
  xref: "paper", y: place.y[1], yref: "paper", yanchor: "bottom", font: { size: 12 } });

// A choice of tags and a slider over that tag's steps; `draw(tag, step)`.
async function overSteps(card, tags, kind, state, draw) {
  const names = Object.keys(tags), tag = names.includes(state[kind]) ? state[kind] : names[0];
  const steps = tags[tag];
  const nearest = steps.reduce((best, step, i) => (Math.abs(step - state.step) < Math.abs(steps[best] - state.step) ? i : best), steps.length - 1);
  const control = slider(steps, nearest, (step) => draw(tag, step));
  const change = (value) => { state[kind] = value; return overSteps(card, tags, kind, state, draw); };
  const once = select("Colours", [["", "of this step"], ["yes", "the same at all steps"]], state.fixed, (value) => { state.fixed = value; return draw(tag, steps[control.place()]); });
  card.controls(names.length > 1 ? select("Map", names.map((own) => [own, own]), tag, change) : null, kind === "map" ? once : null, control);
  await draw(tag, steps[nearest]);
}

export async function drawMaps(card, state) {
  const tags = state.about?.map ?? {};
  if (!Object.keys(tags).length) return card.says(empty("No slice map in this run. A monitor writes one at every tenth probe:",
    "tgp.Monitor(model, x, writer=\"runs/a\", maps={\"plane\": tgp.Plane(x[0], x[1], x[2])})"));
  await overSteps(card, tags, "map", state, async (tag, step) => {
    const run = state.run, found = await ask("map", { run, tag, step });
    if (state.run !== run) return;
    const plot = card.plot(), flat = found.value[0].length && !Array.isArray(found.value[0][0]);
    const shown = panels(found.layers, state.layer), wide = Math.max(320, plot.clientWidth), cells = grid(shown.length, wide, flat ? 220 : 250);
    const [low, high] = found.extent, count = found.value[0].length, ticks = [...Array(count).keys()].map((i) => low + ((high - low) * i) / (count - 1));
    const traces = [], layout = { height: cells.height, annotations: [], images: [], margin: { l: 8, r: 8, t: 0, b: 8 } };
    const picture = pictures(found.thumbnails, found.shape), lines = boundaries(found.predictions, ticks);
    const spans = state.fixed ? found.range : found.value.map((rows) => span(rows.flat()));
    const sources = found.corners.map((_, i) => picture(i)?.toDataURL());
    shown.forEach((i, k) => {
      const layer = found.layers[i], [x, y] = axes(k), place = cells.of(k), label = layer.heading + unit(layer.unit);
      const box = { domain: place.x, anchor: y, showgrid: false, zeroline: false }, side = { domain: place.y, anchor: x, showgrid: flat, zeroline: false };
      if (flat) {
        traces.push({ type: "scatter", mode: "lines", x: ticks, y: found.value[i], xaxis: x, yaxis: y, line: { color: "#0077bb" }, hovertemplate: "t %{x:.3g}: %{y:.4g}<extra></extra>" });
        layout[`yaxis${k ? k + 1 : ""}`] = axis(label, { ...side, range: padded(spans[i]) });
        for (const t of lines) (layout.shapes ??= []).push({ type: "line", xref: x, yref: `${y} domain`, x0: t, x1: t, y0: 0, y1: 1, line: { color: "#f57c00", width: 1.2, dash: "dot" } });
      } else {
        traces.push({
          type: "heatmap", x: ticks, y: ticks, z: found.value[i], xaxis: x, yaxis: y, colorscale: "Viridis", zmin: spans[i][0], zmax: spans[i][1],
          customdata: found.predictions, hovertemplate: `%{z:.4g}<br>predicted %{customdata}<extra></extra>`, hoverongaps: false,
          colorbar: { title: { text: label, side: "right", font: { size: 11 } }, thickness: 8, x: place.x[1] + 4 / wide, xanchor: "left", xpad: 0, y: (place.y[0] + place.y[1]) / 2, len: place.y[1] - place.y[0], outlinewidth: 0, tickfont: { size: 10 } },
        }, { type: "scatter", mode: "lines", x: lines.x, y: lines.y, xaxis: x, yaxis: y, line: { color: "#ffffff", width: 1.6 }, hoverinfo: "skip" });
        layout[`yaxis${k ? k + 1 : ""}`] = axis("v", { ...side, scaleanchor: x, constrain: "domain" });
        const reach = (high - low) * 0.16;
        found.corners.forEach(([u, v], c) => {
          if (sources[c]) layout.images.push({ source: sources[c], xref: x, yref: y, x: u, y: v, sizex: reach, sizey: reach, xanchor: "center", yanchor: "middle" });
          else layout.annotations.push({ text: "abc"[c], xref: x, yref: y, x: u, y: v, showarrow: false, font: { color: "#fff", size: 13 } });
        });
      }
      layout[`xaxis${k ? k + 1 : ""}`] = axis(flat ? "t, from a to b" : "u", { ...box, constrain: "domain" });
      layout.annotations.push(title(layer.name, place, layer.name === state.layer));
    });
    await chart(plot, traces, layout, `geometry ${tag} step ${step}`);
    const estimands = [...new Set(found.layers.map((layer) => layer.estimand))].join(" · ");
    card.note(`${estimands}; ${flat ? "dotted" : "white"} lines: where the prediction changes`
      + (shown.length < found.layers.length ? `; ${shown.length} of ${found.layers.length} layers, the chosen one among them` : ""));
  });
}

const span = (values) => values.reduce(([low, high], v) => (v == null ? [low, high] : [Math.min(low ?? v, v), Math.max(high ?? v, v)]), [null, null]);
const padded = ([low, high]) => (low == null ? undefined : [low - 0.06 * (high - low || 1), high + 0.06 * (high - low || 1)]);

// Where the predicted class changes: on a line its places; on a plane the edges between cells, as one broken line.
function boundaries(predictions, ticks) {
  const half = (ticks[1] - ticks[0]) / 2;
  if (!Array.isArray(predictions[0])) return ticks.slice(1).filter((_, i) => predictions[i] !== predictions[i + 1]).map((t) => t - half);
  const x = [], y = [];
  const edge = (x0, y0, x1, y1) => { x.push(x0, x1, null); y.push(y0, y1, null); };
  predictions.forEach((row, j) => row.forEach((own, i) => {
    if (i + 1 < row.length && row[i + 1] !== own) edge(ticks[i] + half, ticks[j] - half, ticks[i] + half, ticks[j] + half);
    if (j + 1 < predictions.length && predictions[j + 1][i] !== own) edge(ticks[i] - half, ticks[j] + half, ticks[i] + half, ticks[j] + half);
  }));
  return { x, y };
}

export async function drawProfile(card, state) {
  const tags = state.about?.profile ?? {};
  if (!Object.keys(tags).length) return card.says(empty("No study of decision boundaries in this run. Write one with the monitor's writer:",
    "study = tgp.boundary_study(model, x_held_out, initial=untrained)\nmonitor.writers[0].write_study(study, monitor.steps)"));
  await overSteps(card, tags, "profile", state, async (tag, step) => {
    const run = state.run, found = await ask("profile", { run, tag, step });
    if (state.run !== run) return;
    const plot = card.plot(), shown = panels(found.layers, state.layer), wide = Math.max(320, plot.clientWidth), cells = grid(shown.length, wide, 230);
    const traces = [], layout = { height: cells.height + 20, annotations: [], shapes: [], margin: { l: 8, r: 8, t: 20, b: 8 }, showlegend: true, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0.02, font: { size: 11 } } };
    shown.forEach((i, k) => {
      const layer = found.layers[i], [x, y] = axes(k), place = cells.of(k);
      const curve = (rows, colour, fill, label, dash) => rows && traces.push(
        { type: "scatter", mode: "lines", x: [...layer.offsets, ...[...layer.offsets].reverse()], y: [...rows[1], ...[...rows[2]].reverse()], fill: "toself", fillcolor: fill, line: { width: 0 }, xaxis: x, yaxis: y, hoverinfo: "skip", showlegend: false },
        { type: "scatter", mode: "lines+markers", name: label, showlegend: !k, x: layer.offsets, y: rows[0], xaxis: x, yaxis: y, line: { color: colour, width: 2, dash }, marker: { size: 4 }, hovertemplate: "distance %{x:.3g}: %{y:.4g} nat<extra></extra>" });
      curve(layer.initial, "#888888", "rgba(136,136,136,.2)", "untrained", "dash");
      curve(layer.trained, "#0077bb", "rgba(0,119,187,.25)", layer.initial ? "trained" : "the network", "solid");
      layout[`xaxis${k ? k + 1 : ""}`] = axis("signed distance to the boundary", { domain: place.x, anchor: y });
      layout[`yaxis${k ? k + 1 : ""}`] = axis(k ? "" : "log-volume − at the boundary [nat]", { domain: place.y, anchor: x, ...(k ? { matches: "y" } : {}) });
      layout.shapes.push({ type: "line", xref: x, yref: `${y} domain`, x0: 0, x1: 0, y0: 0, y1: 1, line: { color: "#f57c00", width: 1.2, dash: "dot" } });
      layout.annotations.push(title(layer.name, place, layer.name === state.layer));
    });
    await chart(plot, traces, layout, `geometry profile step ${step}`);
    const own = found.layers.find((layer) => layer.name === state.layer) ?? found.layers[0];
    card.below(h("p", { className: "sentence" }, own.sentence));
    card.note(`${own.estimand}; distance in units of the line between two samples; bands: 95 % intervals`);
  });
}
