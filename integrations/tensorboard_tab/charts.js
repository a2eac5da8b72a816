// What all views share: asking the server, making elements, the looks of a chart, a slider over steps.

export const CHOSEN = "#f57c00"; // TensorBoard's orange
export const CLASSES = [
  "#2b8cdb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#aa9944", "#8855cc", "#5a9e3a", "#888888"];
export const name = (layer) => layer || "(model)";
export const number = (value) => (value == null ? "not finite" : Number(value.toPrecision(4)).toString());
export const unit = (text) => (text ? ` [${text}]` : "");
export const normalised = (layer) => `J ${layer.normalized ? "" : "not "}divided by √n`;

export function short(text, most = 30) {
  const half = Math.floor(most / 2);
  return text.length <= most ? text : `${text.slice(0, half)}…${text.slice(1 - half)}`;
}

// Plotly reads a few HTML tags in its texts; what comes from a log is text.
export const safe = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);

export async function ask(route, query = {}) {
  const answer = await fetch(`./${route}?${new URLSearchParams(query)}`);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element[key] = value;
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const select = (title, options, chosen, onchange) =>
  h("label", { className: "choice" }, title,
    h("select", { title, onchange: (event) => onchange(event.target.value) },
      options.map(([value, text]) => h("option", { value, selected: value === chosen }, text))));

export const empty = (text, code) =>
  h("div", { className: "empty" }, h("p", {}, text), code ? h("pre", {}, code) : null);

export const isDark = () => document.body.classList.contains("dark");
const colours = () =>
  isDark() ? { ink: "#e8e8e8", quiet: "#555", paper: "#424242" } : { ink: "#424242", quiet: "#e0e0e0", paper: "#fff" };

export const nth = (letter, k) => `${letter}${k ? k + 1 : ""}`; // Plotly counts its axes x, x2, x3 …

export const axis = (title, more = {}) => {
  const { quiet } = colours();
  const text = { text: safe(title), standoff: 6 };
  return { title: text, gridcolor: quiet, zerolinecolor: quiet, linecolor: quiet, automargin: true, ...more };
};

// Of the steps; one alone has no scale to stand on.
export const time = (title, steps, more = {}) =>
  axis(title, { ...(steps.length > 1 ? {} : { tickvals: steps, range: [steps[0] - 1, steps[0] + 1] }), ...more });

export async function chart(plot, traces, layout, file) {
  const { ink, paper } = colours();
  const looks = {
    font: { family: "Roboto, sans-serif", size: 12, color: ink }, paper_bgcolor: paper, plot_bgcolor: paper,
    showlegend: false, hovermode: "closest", dragmode: "zoom", ...layout,
  };
  plot.dataset.file = file; // for who downloads it
  await Plotly.react(plot, traces, looks, { displayModeBar: false });
}

// In place of what an earlier drawing listened to.
export function on(plot, events) {
  for (const [event, listener] of Object.entries(events)) {
    plot.removeAllListeners(event);
    plot.on(event, listener);
  }
}

export function paint(wide, high, colour) {
  const canvas = h("canvas", { width: wide, height: high });
  const image = new ImageData(wide, high);
  for (let p = 0; p < wide * high; p++) image.data.set([...colour(p), 255], 4 * p);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

const bytes = (data) => Uint8Array.from(atob(data), (c) => c.charCodeAt(0));

// Thumbnails [n, h, w, C], bytes in base64 → a canvas of the i-th.
export function pictures(data, shape) {
  if (!data) return () => null;
  const [, high, wide, depth] = shape, pixels = bytes(data);
  return (i) => paint(wide, high, (p) => [0, 1, 2].map((c) => pixels[(i * high * wide + p) * depth + (c % depth)]));
}

// Directions [n, h, w], signed bytes in base64 → a canvas of the i-th, blue below zero and red above.
export function signed(data, shape, i) {
  const [, high, wide] = shape, values = new Int8Array(bytes(data).buffer);
  return paint(wide, high, (p) => {
    const value = values[i * high * wide + p] / 127, rest = 255 * (1 - Math.abs(value));
    return value > 0 ? [255, rest, rest] : [rest, rest, 255];
  });
}

// A slider over steps, with a button that plays them; what `show(step)` promises is waited for.
export function slider(steps, at, show) {
  let playing = false;
  const range = h("input", { type: "range", min: 0, max: steps.length - 1, value: at, title: "step" });
  const told = h("span", { className: "step" }, `step ${steps[at]}`);
  const button = h("button", { className: "icon", disabled: steps.length < 2 });
  const turn = (to) => {
    playing = to;
    button.textContent = to ? "❚❚" : "▶";
    button.title = to ? "pause" : "play";
  };
  const go = (place) => {
    range.value = place;
    told.textContent = `step ${steps[place]}`;
    return show(steps[place]);
  };
  const play = async () => {
    turn(true);
    let place = +range.value + 1 < steps.length ? +range.value : -1;
    while (playing && button.isConnected && ++place < steps.length) {
      await go(place);
      await new Promise((wait) => setTimeout(wait, 450));
    }
    turn(false);
  };
  button.addEventListener("click", () => (playing ? turn(false) : play()));
  range.addEventListener("input", () => { turn(false); go(+range.value); });
  turn(false);
  return Object.assign(h("div", { className: "slider" }, button, range, told), { step: () => steps[range.value] });
}
