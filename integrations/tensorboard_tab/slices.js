// Maps and boundary profiles: what is drawn per layer, in a grid of panels, with a slider over the steps.

import {
  CHOSEN, CLASSES, ask, axis, chart, empty, h, name, nth, pictures, safe, select, short, slider, unit,
} from "./charts.js";

const MOST = 8; // panels

// The chosen layer, and others evenly over the depth: their places.
function panels(layers, chosen) {
  const last = layers.length - 1, most = Math.min(MOST, layers.length);
  const places = [...Array(most).keys()].map((k) => Math.round((k * last) / Math.max(1, most - 1)));
  const own = layers.findIndex((layer) => layer.name === chosen);
  const far = (k) => Math.abs(places[k] - own);
  if (own >= 0) places[places.reduce((best, _, k) => (far(k) < far(best) ? k : best), 0)] = own;
  return places;
}

// Room for each of `count` panels in a plot of this width: margins in pixels around each.
function grid(count, wide, high, { left, right }) {
  const columns = Math.max(1, Math.min(count, 4, Math.floor(wide / 250)));
  const rows = Math.ceil(count / columns), total = rows * high;
  return {
    height: total + 28, margin: { l: 8, r: 8, t: 20, b: 8 }, annotations: [], shapes: [], images: [],
    room: (k) => {
      const [row, column] = [Math.floor(k / columns), k % columns];
      return {
        x: [column / columns + left / wide, (column + 1) / columns - right / wide],
        y: [1 - (row + 1) / rows + 46 / total, 1 - row / rows - 30 / total] };
    },
  };
}

function title(layer, { x, y }, chosen) {
  const text = safe(short(name(layer), 28)), shown = chosen ? `<b>${text}</b>` : text;
  const at = { xref: "paper", x: (x[0] + x[1]) / 2, yref: "paper", y: y[1], yanchor: "bottom" };
  return { ...at, text: shown, showarrow: false };
}

const upright = (x, y, at) => ({
  type: "line", xref: x, yref: `${y} domain`, x0: at, x1: at, y0: 0, y1: 1,
  line: { color: CHOSEN, width: 1.2, dash: "dot" },
});

// The choice of a tag, a slider over its steps, and what `draw(tag, step)` draws of it; `more` controls between them.
async function overSteps(card, state, kind, more, draw) {
  const tags = state.about[kind], names = Object.keys(tags);
  const tag = names.includes(state[kind]) ? state[kind] : names[0];
  const steps = tags[tag], far = (k) => Math.abs(steps[k] - state.step);
  const at = steps.reduce((best, _, k) => (far(k) < far(best) ? k : best), steps.length - 1);
  const control = slider(steps, at, (step) => draw(tag, step));
  const other = (value) => { state[kind] = value; return overSteps(card, state, kind, more, draw); };
  const choice = names.length > 1 ? select("Map", names.map((own) => [own, own]), tag, other) : null;
  card.controls(choice, more?.(() => draw(tag, control.step())), control);
  await draw(tag, steps[at]);
}

export async function drawMaps(card, state) {
  if (!Object.keys(state.about.map).length) return card.says(empty(
    "No slice map in this run. A monitor writes one at every tenth probe:",
    "tgp.Monitor(model, x, writer=\"runs/a\", maps={\"plane\": tgp.Plane(x[0], x[1], x[2])})"));
  const { run } = state;
  const scales = (again) => select("Colours", [["", "of this step"], ["all", "the same at all steps"]], state.fixed,
    (value) => { state.fixed = value; return again(); });
  await overSteps(card, state, "map", scales, async (tag, step) => {
    const found = await ask("map", { run, tag, step });
    if (state.run !== run) return; // another was chosen meanwhile
    const plot = card.plot(), line = !Array.isArray(found.predictions[0]), shown = panels(found.layers, state.layer);
    const layout = grid(shown.length, plot.clientWidth, line ? 220 : 250, { left: 50, right: line ? 16 : 62 });
    const [low, high] = found.extent, points = found.predictions.length;
    const ticks = found.predictions.map((_, i) => low + ((high - low) * i) / (points - 1));
    const traces = shown.flatMap((place, k) => {
      const layer = found.layers[place], room = layout.room(k), [x, y] = [nth("x", k), nth("y", k)];
      layout.annotations.push(title(layer.name, room, layer.name === state.layer));
      const panel = {
        x, y, room, ticks, values: found.value[place], label: layer.heading + unit(layer.unit),
        range: extent(state.fixed ? found.range[place] : found.value[place].flat()) };
      const across = { domain: room.x, anchor: y, showgrid: line, zeroline: false, constrain: "domain" };
      const up = { domain: room.y, anchor: x, showgrid: line, zeroline: false, constrain: "domain" };
      layout[nth("xaxis", k)] = axis(line ? "t, from a to b" : "u", across);
      layout[nth("yaxis", k)] = line ? axis(panel.label, { ...up, range: padded(panel.range) })
        : axis("v", { ...up, scaleanchor: x });
      return line ? curve(panel, found, layout) : plane(panel, found, layout);
    });
    await chart(plot, traces, layout, `geometry ${tag} step ${step}`);
    const estimands = [...new Set(found.layers.map((layer) => layer.estimand))].join(" · ");
    card.note(`${estimands}; ${line ? "dotted" : "white"} lines: where the prediction changes`
      + (shown.length < found.layers.length ? `; ${shown.length} of ${found.layers.length} layers` : ""));
  });
}

// From the least to the largest, with room around where all are one, or none is finite.
const extent = (values) => {
  const finite = values.filter((value) => value != null), low = Math.min(...finite), high = Math.max(...finite);
  return low < high ? [low, high] : finite.length ? [low - 0.5, high + 0.5] : [0, 1];
};
const padded = ([low, high]) => [low - 0.06 * (high - low), high + 0.06 * (high - low)];

function curve({ x, y, ticks, values }, { predictions }, layout) {
  const middles = ticks.slice(1).map((t, i) => (t + ticks[i]) / 2);
  const changes = middles.filter((_, i) => predictions[i] !== predictions[i + 1]);
  layout.shapes.push(...changes.map((t) => upright(x, y, t)));
  return [{
    type: "scatter", mode: "lines", x: ticks, y: values, xaxis: x, yaxis: y, line: { color: CLASSES[0] },
    hovertemplate: "t %{x:.3g}: %{y:.4g}<extra></extra>",
  }];
}

function plane({ x, y, room, ticks, values, label, range }, found, layout) {
  const picture = pictures(found.thumbnails, found.shape), size = 0.16 * (ticks.at(-1) - ticks[0]);
  found.corners.forEach(([u, v], i) => {
    const source = picture(i)?.toDataURL(), at = { xref: x, yref: y, x: u, y: v };
    if (source) layout.images.push({ ...at, source, sizex: size, sizey: size, xanchor: "center", yanchor: "middle" });
    else layout.annotations.push({ ...at, text: "abc"[i], showarrow: false, font: { color: "#fff", size: 13 } });
  });
  const colorbar = {
    title: { text: safe(label), side: "right", font: { size: 11 } }, tickfont: { size: 10 }, thickness: 8,
    outlinewidth: 0,
    x: room.x[1], xanchor: "left", xpad: 4, y: (room.y[0] + room.y[1]) / 2, len: room.y[1] - room.y[0],
  };
  const on = { xaxis: x, yaxis: y };
  return [{
    ...on, type: "heatmap", x: ticks, y: ticks, z: values, zmin: range[0], zmax: range[1], colorscale: "Viridis",
    colorbar, hoverongaps: false, customdata: found.predictions,
    hovertemplate: "%{z:.4g}<br>predicted %{customdata}<extra></extra>",
  }, {
    ...on, type: "scatter", mode: "lines", ...edges(found.predictions, ticks), hoverinfo: "skip",
    line: { color: "#fff", width: 1.6 },
  }];
}

// The edges between cells of other classes, as one broken line.
function edges(predictions, ticks) {
  const half = (ticks[1] - ticks[0]) / 2, x = [], y = [];
  predictions.forEach((row, j) => row.forEach((own, i) => {
    const [right, up] = [ticks[i] + half, ticks[j] + half];
    const edge = (x0, y0) => { x.push(x0, right, null); y.push(y0, up, null); };
    if (i + 1 < row.length && row[i + 1] !== own) edge(right, ticks[j] - half);
    if (j + 1 < predictions.length && predictions[j + 1][i] !== own) edge(ticks[i] - half, up);
  }));
  return { x, y };
}

export async function drawProfile(card, state) {
  if (!Object.keys(state.about.profile).length) return card.says(empty(
    "No study of decision boundaries in this run. For one at each probe, or one against the untrained network:",
    "monitor = tgp.Monitor(model, x_probe, writer=\"runs/geometry\", boundary=x_held_out)\n"
    + "monitor.writers[0].write_study(tgp.boundary_study(model, x_held_out, initial=untrained), monitor.steps)"));
  const { run } = state;
  await overSteps(card, state, "profile", null, async (tag, step) => {
    const { layers } = await ask("profile", { run, tag, step });
    if (state.run !== run) return;
    const plot = card.plot(), shown = panels(layers, state.layer);
    const layout = grid(shown.length, plot.clientWidth, 230, { left: 56, right: 12 });
    layout.showlegend = true;
    layout.legend = { orientation: "h", y: 1, yanchor: "bottom", x: 0.02, font: { size: 11 } };
    const traces = shown.flatMap((place, k) => {
      const layer = layers[place], room = layout.room(k), [x, y] = [nth("x", k), nth("y", k)];
      const what = /\|Jv\|/.test(layer.estimand) ? "log |Jv|" : "log-volume";
      layout[nth("xaxis", k)] = axis("signed distance to the boundary", { domain: room.x, anchor: y });
      layout[nth("yaxis", k)] = axis(k ? "" : `${what} − at the boundary [nat]`, { domain: room.y, anchor: x });
      if (k) layout[nth("yaxis", k)].matches = "y";
      layout.shapes.push(upright(x, y, 0));
      layout.annotations.push(title(layer.name, room, layer.name === state.layer));
      const on = { xaxis: x, yaxis: y, showlegend: !k }, own = layer.initial ? "trained" : "the network";
      return [
        ...band(layer.offsets, layer.initial, { name: "untrained", color: "#888888", dash: "dash", on }),
        ...band(layer.offsets, layer.trained, { name: own, color: CLASSES[0], dash: "solid", on })];
    });
    await chart(plot, traces, layout, `geometry profile step ${step}`);
    const own = layers.find((layer) => layer.name === state.layer) ?? layers[0];
    card.below(h("p", { className: "sentence" }, own.sentence));
    card.note(`${own.estimand}; distance in units of the line between two samples; bands: 95 % intervals`);
  });
}

// A curve with its interval.
function band(offsets, rows, { name, color, dash, on }) {
  if (!rows) return [];
  const [mean, low, high] = rows;
  return [{
    ...on, type: "scatter", mode: "lines", x: [...offsets, ...offsets.toReversed()], y: [...low, ...high.toReversed()],
    fill: "toself", fillcolor: `${color}40`, line: { width: 0 }, hoverinfo: "skip", showlegend: false,
  }, {
    ...on, type: "scatter", mode: "lines+markers", name, x: offsets, y: mean, line: { color, width: 2, dash },
    marker: { size: 4 }, hovertemplate: "distance %{x:.3g}: %{y:.4g} nat<extra></extra>",
  }];
}
