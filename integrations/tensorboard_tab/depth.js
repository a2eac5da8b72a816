// Depth × time: a number of every layer (rows, in the order of firing) at every probe (columns), a panel a run.

import { ask, axis, chart, h, isDark, name, number as digits, safe, select, short, unit } from "./charts.js";

const WORDS = { sigma_max: "largest σ", rank: "rank", nonfinite: "samples that are not finite", scale: "scale, ½ log(tr g/d)" };
const OF_VALUE = ["median", "mean", "p10", "p90"];
const NATS = ["scale", "log_pseudo_volume", "std_error", "error_bound", "log_det"];

// In words, with its unit: what stands on the scale and in the choice.
export function heading(number, layer) {
  const value = (layer.heading ?? "value") + unit(layer.unit);
  if (OF_VALUE.includes(number)) return `${value}, ${number}`;
  return (WORDS[number] ?? number.replaceAll("_", " ")) + (NATS.includes(number) ? " [nat]" : "");
}

const SPAN = ["median", "sigma_max", "scale", "effective_dimension", "rank"];
const rank = (number) => (SPAN.indexOf(number) + 1 || 99);

export async function drawDepth(card, state, choose) {
  const found = await Promise.all(state.shown.map((run) => ask("depth", { run, number: state.number })));
  const runs = found.map((answer, i) => ({ ...answer, run: state.shown[i] })).filter((own) => own.steps.length);
  const numbers = [...new Set(runs.flatMap((own) => own.numbers))].sort((a, b) => rank(a) - rank(b));
  const layer = runs[0]?.layers[0] ?? {};
  const shown = numbers.includes(state.number) ? state.number : numbers[0] ?? state.number;
  card.controls(
    select("Number", numbers.map((own) => [own, heading(own, layer)]), shown, (value) => choose({ number: value })),
    select("Show", [["", "absolute"], ["yes", "change since the first probe"]], state.change ? "yes" : "", (value) => choose({ change: !!value })),
  );
  if (!runs.length) return [];
  for (const own of runs) if (state.change) own.values = own.values.map((row) => {
    const first = row.find((value) => value != null);
    return row.map((value) => (value == null || row[0] == null ? null : value - first));
  });
  const most = Math.max(...runs.map((own) => own.layers.length));
  const high = Math.max(9, Math.min(24, 260 / most));
  const heights = runs.map((own) => Math.max(36, own.layers.length * high));
  const gap = 44, total = heights.reduce((sum, own) => sum + own + gap, 0);
  const title = heading(shown, layer) + (state.change ? "<br>change since the first probe" : "");
  const traces = [], layout = { annotations: [], shapes: [], height: total + 40, margin: { l: 20, r: 16, t: 8, b: 40 } };
  let top = 0;
  runs.forEach((own, i) => {
    const [x, y] = [`x${i ? i + 1 : ""}`, `y${i ? i + 1 : ""}`];
    traces.push({
      type: "heatmap", x: own.steps, y: own.layers.map((_, row) => row), z: own.values, xaxis: x, yaxis: y, coloraxis: "coloraxis",
      text: own.layers.map((l) => own.steps.map(() => safe(name(l.name)))), hoverongaps: false,
      hovertemplate: "%{text}<br>step %{x}: %{z:.4g}<extra></extra>",
    });
    const every = Math.ceil(13 / high), rows = own.layers.map((_, row) => row).filter((row) => row % every === 0);
    const from = 1 - (top + gap / 2 + heights[i]) / total, to = 1 - (top + gap / 2) / total;
    layout[`yaxis${i ? i + 1 : ""}`] = axis("", {
      domain: [from, to], autorange: "reversed", tickvals: rows, ticktext: rows.map((row) => safe(short(name(own.layers[row].name)))),
      showgrid: false, zeroline: false, anchor: x, tickfont: { size: 11 }, fixedrange: true,
    });
    layout[`xaxis${i ? i + 1 : ""}`] = axis(i + 1 === runs.length ? "step" : "", { anchor: y, showgrid: false, zeroline: false });
    layout.annotations.push({ text: safe(short(own.run, 70)), x: 0, xref: "paper", xanchor: "left", y: to, yref: "paper", yanchor: "bottom", showarrow: false, font: { size: 12 } });
    const row = own.layers.findIndex((l) => l.name === state.layer), column = own.steps.indexOf(state.step);
    if (own.run === state.run && row >= 0) layout.shapes.push(
      { type: "rect", xref: `${x} domain`, yref: y, x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line: { color: "#f57c00", width: 1.5 } },
      ...(column < 0 ? [] : [{ type: "line", xref: x, yref: `${y} domain`, x0: state.step, x1: state.step, y0: 0, y1: 1, line: { color: "#f57c00", width: 1.5, dash: "dot" } }]));
    top += heights[i] + gap;
  });
  layout.coloraxis = {
    colorscale: state.change ? (isDark() ? DIVERGING_DARK : DIVERGING) : "Viridis", ...(state.change ? { cmid: 0 } : {}),
    colorbar: { title: { text: title, side: "right" }, thickness: 12, len: Math.min(1, 260 / total), y: 1, yanchor: "top", outlinewidth: 0 },
  };
  const plot = card.plot();
  await chart(plot, traces, layout, "geometry depth");
  plot.removeAllListeners?.("plotly_click");
  plot.on("plotly_click", ({ points: [point] }) => {
    const own = runs[point.curveNumber];
    choose({ run: own.run, layer: own.layers[point.y].name, step: point.x });
  });
  const estimands = [...new Set(runs.flatMap((own) => own.layers).filter((l) => l.estimand).map((l) => `${l.estimand}; J ${l.normalized ? "" : "not "}divided by √n`))];
  card.note(estimands.slice(0, 3).join(" · ") || "This log was written before the Geometry tab: the charts' numbers are all that it has.");
  return runs;
}

const DIVERGING = [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]];
const DIVERGING_DARK = [[0, "#6baed6"], [0.5, "#333333"], [1, "#fb6a4a"]];
export { digits, h };
