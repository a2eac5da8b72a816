// Depth × time: a number of every layer (rows, in the order of firing) at every probe (columns), a panel a run.

import {
  CHOSEN, ask, axis, chart, isDark, name, normalised, nth, number as digits, on, safe, select, short, time, unit,
} from "./charts.js";

const WORDS = {
  sigma_max: "largest σ", nonfinite: "samples that are not finite", scale: "scale, ½ log(tr g/d) [nat]",
  log_pseudo_volume: "log pseudo-volume [nat]",
};
const OF_VALUE = ["median", "mean", "p10", "p90"];
const FIRST = ["median", "sigma_max", "scale", "effective_dimension", "rank"];
const RED_BLUE = [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]];
const RED_BLUE_DARK = [[0, "#6baed6"], [0.5, "#333333"], [1, "#fb6a4a"]];

// What stands on the scale and in the choice: a number in words, with its unit.
function heading(number, layer) {
  if (OF_VALUE.includes(number)) return `${layer.heading ?? "value"}${unit(layer.unit)}, ${number}`;
  const error = ["std_error", "error_bound"].includes(number) ? unit(layer.unit) : "";
  return (WORDS[number] ?? number.replaceAll("_", " ")) + error;
}

const change = (row) => row.map((value) => (value == null || row[0] == null ? null : value - row[0]));

export async function drawDepth(card, state, choose) {
  const { shown: names, number: wanted } = state;
  const answers = await Promise.all(names.map((run) => ask("depth", { run, number: wanted })));
  const runs = answers.map((own, k) => ({ ...own, run: names[k] })).filter((own) => own.steps.length);
  if (!runs.length) return runs;
  const place = (number) => FIRST.indexOf(number) + 1 || FIRST.length + 1;
  const numbers = [...new Set(runs.flatMap((own) => own.numbers))].sort((a, b) => place(a) - place(b));
  const shown = numbers.includes(wanted) ? wanted : numbers[0];
  const headings = numbers.map((own) => [own, heading(own, runs[0].layers[0])]);
  const title = Object.fromEntries(headings)[shown] + (state.change ? ", change" : "");
  card.controls(
    select("Number", headings, shown, (number) => choose({ number })),
    select("Show", [["", "absolute"], ["yes", "change since the first probe"]], state.change,
      (to) => choose({ change: to })),
  );

  const row = Math.max(9, Math.min(24, 260 / Math.max(...runs.map((own) => own.layers.length)))), gap = 44;
  const heights = runs.map((own) => Math.max(36, 190 / runs.length, own.layers.length * row)); // the scale has words
  const total = heights.reduce((sum, own) => sum + own + gap, 0);
  const bar = { thickness: 12, len: Math.min(1, 260 / total), y: 1, yanchor: "top", outlinewidth: 0 };
  const scale = state.change ? { colorscale: isDark() ? RED_BLUE_DARK : RED_BLUE, cmid: 0 } : { colorscale: "Viridis" };
  const layout = {
    height: total + 40, margin: { l: 20, r: 16, t: 8, b: 40 }, annotations: [],
    coloraxis: { ...scale, colorbar: { ...bar, title: { text: safe(title), side: "right" } } },
  };
  let top = gap / 2;
  const traces = runs.map((own, k) => {
    const rows = own.layers.map((_, i) => i), labelled = rows.filter((i) => i % Math.ceil(13 / row) === 0);
    const domain = [1 - (top + heights[k]) / total, 1 - top / total], last = k + 1 === runs.length;
    const [x, y] = [nth("x", k), nth("y", k)];
    top += heights[k] + gap;
    layout[nth("yaxis", k)] = axis("", {
      domain, anchor: x, autorange: "reversed", showgrid: false, zeroline: false, fixedrange: true,
      tickfont: { size: 11 }, tickvals: labelled, ticktext: labelled.map((i) => safe(short(name(own.layers[i].name)))),
    });
    layout[nth("xaxis", k)] = time(last ? "step" : "", own.steps, { anchor: y, showgrid: false, zeroline: false });
    layout.annotations.push({
      text: safe(short(own.run, 70)), showarrow: false, x: 0, xref: "paper", xanchor: "left",
      y: domain[1], yref: "paper", yanchor: "bottom",
    });
    const z = state.change ? own.values.map(change) : own.values;
    return {
      type: "heatmap", xaxis: x, yaxis: y, coloraxis: "coloraxis", x: own.steps, y: rows, z,
      text: z.map((values, i) => values.map((value) => `${safe(name(own.layers[i].name))}<br>${digits(value)}`)),
      hovertemplate: "%{text}<br>step %{x}<extra></extra>",
    };
  });
  const plot = card.plot();
  await chart(plot, traces, layout, "geometry depth");
  on(plot, { plotly_click: ({ points: [{ curveNumber, x, y }] }) =>
    choose({ run: runs[curveNumber].run, layer: runs[curveNumber].layers[y].name, step: x }) });
  const told = runs.flatMap((own) => own.layers).filter((layer) => layer.estimand);
  const estimands = new Set(told.map((layer) => `${layer.estimand}; ${normalised(layer)}`));
  card.note([...estimands].slice(0, 3).join(" · ")
    || "This log was written before the Geometry tab: the numbers of its charts are all that it has.");
  return runs;
}

// A frame around the chosen layer, a line at the chosen step.
export function mark(card, runs, { run, layer, step }) {
  const k = runs.findIndex((own) => own.run === run), [x, y] = [nth("x", k), nth("y", k)];
  const row = runs[k].layers.findIndex((own) => own.name === layer), line = { color: CHOSEN, width: 1.5 };
  const frame = { type: "rect", xref: `${x} domain`, yref: y, x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line };
  const at = { type: "line", xref: x, yref: `${y} domain`, x0: step, x1: step, y0: 0, y1: 1 };
  return Plotly.relayout(card.plot(), { shapes: [frame, { ...at, line: { ...line, dash: "dot" } }] });
}
