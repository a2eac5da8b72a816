// What all views share: asking the server, making elements, the looks of a chart, a slider over steps.

export const CLASSES = ["#0077bb", "#ee7733", "#009988", "#cc3311", "#33bbee", "#ee3377", "#aa9944", "#8855cc", "#5a9e3a", "#888888"];
export const name = (layer) => layer || "(model)";
export const short = (text, most = 30) =>
  text.length <= most ? text : `${text.slice(0, Math.ceil(most / 2) - 1)}…${text.slice(1 - Math.floor(most / 2))}`;
// Plotly reads a few HTML tags in its texts; what comes from a log is text.
export const safe = (text) => String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
export const number = (value) => (value == null ? "not finite" : Number(value.toPrecision(4)).toString());
export const unit = (text) => (text ? ` [${text}]` : "");

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
    else if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const select = (title, options, chosen, onchange) =>
  h("label", { className: "choice" }, title,
    h("select", { title, onchange: (event) => onchange(event.target.value) },
      options.map(([value, text]) => h("option", { value, selected: value === chosen }, text))));

export const empty = (text, code) => h("div", { className: "empty" }, h("p", {}, text), code ? h("pre", {}, code) : null);

export const isDark = () => document.body.classList.contains("dark");
const colours = () => (isDark() ? { ink: "#e8e8e8", quiet: "#555", paper: "#424242" } : { ink: "#424242", quiet: "#e0e0e0", paper: "#fff" });

export const axis = (title, more = {}) => ({
  title: { text: title, standoff: 6 }, gridcolor: colours().quiet, zerolinecolor: colours().quiet,
  linecolor: colours().quiet, automargin: true, ...more,
});

export function chart(element, traces, layout, file) {
  const { ink, paper } = colours();
  const looks = {
    font: { family: "Roboto, sans-serif", size: 12, color: ink }, paper_bgcolor: paper, plot_bgcolor: paper,
    margin: { l: 64, r: 16, t: 28, b: 44 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
    hoverlabel: { font: { family: "Roboto, sans-serif" } }, ...layout,
  };
  element.dataset.file = file;
  return Plotly.react(element, traces, looks, { displayModeBar: false, responsive: true });
}

// Pixels [n, h, w, C] of bytes, base64 as the server sends them → a canvas for picture i.
export function pictures(data, shape) {
  if (!data) return () => null;
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const [, high, wide, depth] = shape;
  return (i) => paint(wide, high, (p) => {
    const at = (i * high * wide + p) * depth;
    return [0, 1, 2].map((c) => bytes[at + (depth === 3 ? c : 0)]);
  });
}

export function paint(wide, high, colour) {
  const canvas = h("canvas", { width: wide, height: high });
  const image = new ImageData(wide, high);
  for (let p = 0; p < wide * high; p++) image.data.set([...colour(p), 255], 4 * p);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// A slider over steps with a button that plays them; `show(step)` may return a promise, which is waited for.
export function slider(steps, at, show) {
  let playing = false;
  const range = h("input", { type: "range", min: 0, max: steps.length - 1, title: "step" });
  range.value = at;
  const told = h("span", { className: "step" }, `step ${steps[at]}`);
  const go = (place) => {
    range.value = place;
    told.textContent = `step ${steps[place]}`;
    return show(steps[place]);
  };
  const button = h("button", { className: "icon", title: "play", disabled: steps.length < 2 }, "▶");
  const pause = () => { playing = false; button.textContent = "▶"; button.title = "play"; };
  button.addEventListener("click", async () => {
    if (playing) return pause();
    playing = true; button.textContent = "❚❚"; button.title = "pause";
    let place = +range.value + 1 < steps.length ? +range.value : -1;
    while (playing && button.isConnected && ++place < steps.length) {
      await go(place);
      await new Promise((wait) => setTimeout(wait, 450));
    }
    pause();
  });
  range.addEventListener("input", () => { pause(); go(+range.value); });
  return Object.assign(h("div", { className: "slider" }, button, range, told), { place: () => +range.value });
}
