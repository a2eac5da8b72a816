// Samples: each one's trajectory in the chosen layer, the distribution at the step, the most and the least magnified.

import {
  CHOSEN, CLASSES, ask, axis, chart, empty, h, name, normalised, number, on, pictures, safe, select, short, signed,
  time, unit,
} from "./charts.js";

const FIFTHS = ["#8457c9", "#3b7dd8", "#21a39c", "#5ec962", "#d9b800"];
const MOST = 300; // trajectories
const known = new Map(); // run → what its samples are

async function identity(run, version) {
  if (known.get(run)?.version !== version) {
    const found = await ask("samples", { run });
    known.set(run, { ...found, version, picture: pictures(found.thumbnails, found.shape) });
  }
  return known.get(run);
}

// One layer's samples: the answer of the server with what they are, and questions about the i-th at a step's place.
class Layer {
  constructor(found, who) {
    Object.assign(this, { found, who, at: found.steps.indexOf(found.step), size: found.value[0].length });
    this.all = [...Array(this.size).keys()];
    this.label = found.about.heading + unit(found.about.unit);
    this.finite = this.all.filter((i) => this.value(i) != null).sort((a, b) => this.value(b) - this.value(a));
  }
  value(i, at = this.at) { return this.found.value[at][i]; }
  margin(i, at = this.at) { return this.found.margin?.[at][i]; }
  predicted(i, at = this.at) { return this.found.predictions?.[at][i]; }
  judged() { return this.found.predictions && typeof this.who.labels?.[0] === "number"; }
  wrong(i, at = this.at) { return this.judged() && this.predicted(i, at) !== this.who.labels[i]; }
  called(i) { return this.who.labels ? `${this.who.labels[i]}` : `sample ${this.who.indices?.[i] ?? i}`; }

  // By what the samples can be coloured: [key, words].
  ways() {
    return [
      this.who.labels ? ["class", "label"] : this.found.predictions && ["class", "predicted class"],
      this.judged() && ["correct", "correct or wrong"], this.found.margin && ["margin", "margin"],
      ["none", "one colour"],
    ].filter(Boolean);
  }

  // [title, samples, colour] of each group.
  groups(way) {
    if (way === "none") return [["all samples", this.all, CLASSES[0]]];
    const [right, wrong] = [this.all.filter((i) => !this.wrong(i)), this.all.filter((i) => this.wrong(i))];
    if (way === "correct") return [["correct", right, CLASSES[0]], ["wrong", wrong, CLASSES[1]]];
    if (way === "margin") {
      const order = [...this.all].sort((a, b) => this.margin(a) - this.margin(b)), fifth = Math.ceil(this.size / 5);
      const parts = FIFTHS.map((colour, k) => [order.slice(k * fifth, (k + 1) * fifth), colour]);
      const ends = (own) => `margin ${number(this.margin(own[0]))} … ${number(this.margin(own.at(-1)))}`;
      return parts.filter(([own]) => own.length).map(([own, colour]) => [ends(own), own, colour]);
    }
    const of = (i) => (this.who.labels ? this.who.labels[i] : this.predicted(i));
    const classes = [...new Set(this.all.map(of))].sort((a, b) => (a > b) - (a < b));
    const own = classes.slice(0, classes.length > CLASSES.length ? CLASSES.length - 1 : CLASSES.length);
    const groups = own.map((c, k) => [`${c}`, this.all.filter((i) => of(i) === c), CLASSES[k]]);
    const rest = this.all.filter((i) => !own.includes(of(i)));
    return rest.length ? [...groups, ["other", rest, CLASSES.at(-1)]] : groups;
  }

  // What a pointer over a trajectory is told.
  about(i, at) {
    const sigma = at === this.at ? (this.found.sigma?.[i] ?? []).filter((value) => value != null).map(Math.exp) : [];
    const line = (text, className = "") => h("div", { className }, text);
    const wrong = this.wrong(i, at) ? ", wrong" : "";
    return h("div", { className: "about" }, this.who.picture(i), h("div", {},
      h("b", {}, this.who.labels ? `label ${this.called(i)}` : this.called(i)),
      this.who.labels && this.who.indices ? line(`sample ${this.who.indices[i]}`) : null,
      this.found.predictions ? line(`predicted ${this.predicted(i, at)}${wrong}`, wrong && "wrong") : null,
      this.found.margin ? line(`margin ${number(this.margin(i, at))}`) : null,
      line(`${this.found.about.heading} ${number(this.value(i, at))} ${this.found.about.unit ?? ""}`),
      sigma.length ? line(`σ ${number(sigma[0])} … ${number(sigma.at(-1))}`) : null,
      line(`step ${this.found.steps[at]}`)));
  }

  tile(i, chosen, onclick) {
    const place = this.found.extremes?.indexOf(i) ?? -1, wrong = this.wrong(i);
    return h("button", { className: `tile${chosen ? " chosen" : ""}`, title: this.called(i), onclick },
      this.who.picture(i), place < 0 ? null : signed(this.found.directions, this.found.shape, place),
      h("span", {}, short(this.called(i), 12)),
      this.judged() ? h("span", { className: wrong ? "wrong" : "" }, `→ ${this.predicted(i)}`) : null,
      h("span", {}, number(this.value(i))));
  }
}

export async function drawSamples(card, state, choose) {
  if (state.old) return card.says(empty(
    "This log was written before the Geometry tab, and has no numbers of single samples. New probes have them:",
    "tgp.Monitor(model, x, labels=y, writer=\"runs/a\").follow(optimizer)"));
  const { run, layer, step, sample } = state;
  const [found, who] = await Promise.all([ask("layer", { run, layer, step }), identity(run, `${state.about.samples}`)]);
  const own = new Layer(found, who), ways = own.ways(), { steps } = found;
  const way = ways.some(([key]) => key === state.colour) ? state.colour : ways[0][0];
  card.controls(select("Colour", ways, way, (colour) => choose({ colour })));

  const every = Math.ceil(own.size / MOST), drawn = (some) => some.filter((i) => i % every === 0);
  const marked = steps.length === 1 || steps.length * own.size < 1000;
  const base = { type: "scatter", mode: marked ? "lines+markers" : "lines", hoverinfo: "none" };
  const curves = (some) => ({ // one trace a group, its samples apart by a gap: far fewer elements than one a sample
    x: some.flatMap(() => [...steps, null]), y: some.flatMap((i) => [...found.value.map((row) => row[i]), null]),
    customdata: some.flatMap((i) => [...steps, null].map(() => i)),
  });
  const traces = own.groups(way).filter(([, some]) => some.length).map(([title, some, color]) => ({
    ...base, ...curves(drawn(some)), name: safe(short(title, 24)), showlegend: way !== "none", opacity: 0.75,
    line: { color, width: 1.2 }, marker: { color, size: steps.length > 1 ? 4 : 8 },
  }));
  if (sample < own.size && sample != null) traces.push({
    ...base, ...curves([sample]), showlegend: false, line: { color: CHOSEN, width: 3 },
    marker: { color: CHOSEN, size: 6 },
  });
  if (own.finite.length) traces.push({ // of none Plotly cannot make bins
    type: "histogram", y: own.finite.map((i) => own.value(i)), xaxis: "x2", nbinsy: 24, showlegend: false,
    marker: { color: "#90a4ae" }, hovertemplate: "%{x} samples<extra></extra>" });
  const plot = card.plot();
  await chart(plot, traces, {
    height: 330, margin: { l: 64, r: 16, t: 30, b: 44 }, bargap: 0.05, showlegend: way !== "none",
    legend: { orientation: "h", y: 1.01, yanchor: "bottom", x: 0, font: { size: 11 } }, yaxis: axis(own.label),
    xaxis: time("step", steps, { domain: [0, 0.82] }),
    xaxis2: axis(`samples at step ${found.step}`, { domain: [0.85, 1] }),
    shapes: [{ type: "line", x0: found.step, x1: found.step, yref: "paper", y0: 0, y1: 1,
      line: { color: CHOSEN, width: 1.5, dash: "dot" } }],
  }, "geometry samples");
  on(plot, {
    plotly_hover: ({ points: [{ customdata, x }], event }) =>
      customdata != null && card.tip(own.about(customdata, steps.indexOf(x)), event),
    plotly_unhover: () => card.tip(null),
    plotly_click: ({ points: [{ customdata, x }] }) => customdata != null && choose({ sample: customdata, step: x }),
  });

  const few = Math.min(8, Math.ceil(own.finite.length / 2));
  const strip = (title, some) => h("div", {},
    h("div", { className: "title" }, title, h("small", {}, ` ${own.label} at step ${found.step}`)),
    h("div", { className: "tiles" }, some.map((i) => own.tile(i, i === sample, () => choose({ sample: i })))));
  card.below(strip("Most magnified", own.finite.slice(0, few)),
    strip("Least magnified", own.finite.slice(few).slice(-few).reverse()));
  const { estimand, n, d, k } = found.about, lost = own.size - own.finite.length;
  card.note(`${short(name(layer), 60)}: ${estimand}; n = ${n}, d = ${d}, k = ${k}; ${normalised(found.about)}`
    + (lost ? `; ${lost} of ${own.size} samples are not finite at this step` : "")
    + (every > 1 ? `; drawn is one of ${every} samples` : "")
    + (found.directions ? "; under a thumbnail its direction of largest stretch, from blue to red" : ""));
}
