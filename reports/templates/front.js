// The front's switches and limits: what stands across, what the third value is, what is allowed.

const ACROSS = {
  latency_ms: { title: "latency, ms", factor: 1, words: milliseconds },
  size_bytes: { title: "size, kB", factor: 1e-3, words: size },
  macs: { title: "MACs, millions", factor: 1e-6, words: count },
};

const frontPlot = () => drawn.find((place) => place.id === "plot-front");
const control = (id) => document.getElementById(id);

/** What a trace takes from the theme: the mark of the chosen trial its colour, points a rim in the card's
 * colour, which keeps overlapping ones apart. */
function markerUpdate(trace) {
  const { ink, card } = colours();
  if (trace.name === "selected") return { "marker.color": ink };
  if (trace.customdata && trace.name !== "struck out") return { "marker.line.color": card };
  return null;
}

/** Where a trial stands in the picture: across and up, one or no value each. */
function whereIs(traces, number) {
  const x = [];
  const y = [];
  for (const trace of traces) {
    const i = (trace.customdata || []).findIndex((custom) => custom[0] === number);
    if (i >= 0) {
      x.push(trace.x[i]);
      y.push(trace.y[i]);
    }
  }
  return [x, y];
}

/** The mark of the chosen trial, and on a phone the colour bar on top, where it takes no width. */
function completeFront(figure, narrow) {
  const [x, y] = whereIs(figure.data, selected);
  figure.data.push({
    type: "scatter",
    mode: "markers",
    name: "selected",
    x,
    y,
    hoverinfo: "skip",
    showlegend: false,
    marker: { symbol: "circle-open", size: 22, line: { width: 2 } },
  });
  const scale = figure.data.find((trace) => trace.name === "size");
  if (narrow && scale) {
    const above = { orientation: "h", y: 1.02, yanchor: "bottom", x: 0.5, len: 0.9 };
    Object.assign(scale.marker.colorbar, above);
    Object.assign(figure.layout.margin, { t: 110, r: 16 });
  }
  if (narrow) {
    figure.layout.margin.b = 120; // the legend takes several lines there
    // The name of the leftmost point would stand on the axis.
    const [leftmost] = [...(figure.layout.annotations || [])].sort((a, b) => a.x - b.x);
    if (leftmost) Object.assign(leftmost, { ax: 0, ay: -30, xanchor: "left" });
  }
  for (const trace of figure.data) setKeys(trace, markerUpdate(trace) || {});
}

// Limits

function given(id, factor) {
  const text = control(id).value.trim();
  const value = Number(text);
  return text === "" || !Number.isFinite(value) ? null : value * factor;
}

const allowed = () => ({
  latency_ms: given("max-latency", 1),
  accuracy: given("min-accuracy", 0.01),
  size_bytes: given("max-size", 1000),
});

function within(trial, limits) {
  return (
    (limits.latency_ms === null || trial.latency_ms <= limits.latency_ms) &&
    (limits.size_bytes === null || trial.size_bytes <= limits.size_bytes) &&
    (limits.accuracy === null || trial.accuracy >= limits.accuracy - 1e-9)
  );
}

/** The non-dominated of the trials in accuracy and the given values, of which less is better. */
function nonDominated(trials, keys) {
  const noWorse = (a, b) => a.accuracy >= b.accuracy && keys.every((key) => a[key] <= b[key]);
  return trials.filter((one, i) => !trials.some((two, j) => i !== j && noWorse(two, one) && (!noWorse(one, two) || j < i)));
}

// Drawing

function mix(stops, share) {
  const at = Math.max(0, stops.findLastIndex(([from]) => from <= share));
  const [low, first] = stops[at];
  const [high, second] = stops[Math.min(at + 1, stops.length - 1)];
  const part = high > low ? (share - low) / (high - low) : 0;
  const channel = (text, i) => Number.parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  return `rgb(${[0, 1, 2].map((i) => Math.round(channel(first, i) * (1 - part) + channel(second, i) * part)).join(",")})`;
}

function thirdValue(across) {
  const key = across === "size_bytes" ? "latency_ms" : "size_bytes";
  const values = data.trials.filter((t) => t.drawn).map((t) => t[key]);
  const low = Math.min(...values);
  const high = Math.max(...values);
  return { key, low, high, share: (trial) => (high > low ? (trial[key] - low) / (high - low) : 0) };
}

function redrawPoints(trace, across, third, shown, limits) {
  const trials = trace.customdata.map((custom) => byNumber.get(custom[0]));
  trace.x = trials.map((t) => t[across] * ACROSS[across].factor);
  if (trace.error_x && trace.error_x.array) trace.error_x.visible = across === "latency_ms";
  trace.marker.opacity = trials.map((t) => (within(t, limits) ? 1 : 0.3));
  if (trace.name !== "struck out") {
    trace.marker.color = trials.map((t) => (shown === "colour" ? mix(data.front_axes.stops, third.share(t)) : "#3f7ae0"));
    const base = trace.name === "verified" ? 12 : trace.name === "baseline" ? 11 : 8;
    trace.marker.size = trials.map((t) => (shown === "area" ? 5 + 19 * Math.sqrt(third.share(t)) : base));
  }
}

function redrawScale(trace, third, shown) {
  trace.marker.showscale = shown === "colour" && third.high > third.low;
  const factor = ACROSS[third.key].factor;
  trace.marker.color = [third.low * factor, third.high * factor];
  trace.marker.colorbar.title.text = third.key === "size_bytes" ? "kB" : "ms";
}

function redrawLine(trace, across, limits) {
  const shown = data.trials.filter((t) => t.candidate && t[across] !== null && within(t, limits));
  const corners = nonDominated(shown, [across]).sort((a, b) => a[across] - b[across]);
  const factor = ACROSS[across].factor;
  const right = Math.max(...data.trials.filter((t) => t.drawn).map((t) => t[across] || 0));
  const x = corners.map((t) => t[across] * factor);
  const y = corners.map((t) => 100 * t.accuracy);
  trace.x = x.length ? [...x, right * factor * 1.05] : [];
  trace.y = y.length ? [...y, y.at(-1)] : [];
}

function shades(across, limits) {
  const style = { type: "rect", fillcolor: data.front_axes.shade, line: { width: 0 }, layer: "below" };
  const edge = limits[across];
  const found = [];
  if (edge !== null && edge !== undefined)
    found.push({ ...style, x0: edge * ACROSS[across].factor, x1: 1e9, y0: 0, y1: 1, yref: "paper" });
  if (limits.accuracy !== null)
    found.push({ ...style, x0: 0, x1: 1, xref: "paper", y0: 0, y1: 100 * limits.accuracy });
  return found;
}

function redraw() {
  const plot = frontPlot();
  const across = control("across").value;
  const shown = control("third").value;
  const limits = allowed();
  sayWithin(limits);
  if (!plot) return;
  const third = thirdValue(across);
  for (const trace of plot.data) {
    if (trace.name === "selected") continue;
    if (trace.customdata) redrawPoints(trace, across, third, shown, limits);
    else if (trace.name === "size") redrawScale(trace, third, shown);
    else if (trace.name === "front") redrawLine(trace, across, limits);
  }
  const layout = plot.layout;
  const axis = data.front_axes[across];
  layout.xaxis = { ...layout.xaxis, type: "linear", tickvals: null, ticktext: null, ...axis };
  layout.xaxis.title = { ...layout.xaxis.title, text: ACROSS[across].title };
  layout.shapes = shades(across, limits);
  for (const label of layout.annotations || []) {
    const value = byNumber.get(Number(label.name))[across] * ACROSS[across].factor;
    // Annotations, unlike shapes, take the exponent on a logarithmic axis.
    label.x = axis.type === "log" ? Math.log10(value) : value;
  }
  Plotly.react(plot, plot.data, layout);
  ring(selected);
}

function sayWithin(limits) {
  const known = data.trials.filter((t) => t.candidate);
  const inside = known.filter((t) => within(t, limits));
  const place = control("within");
  const best = nonDominated(inside, ["latency_ms", "size_bytes"]);
  const said = [`${inside.length} of ${known.length} comparable points within these limits, ${best.length} of them not dominated.`];
  if (!inside.length) return place.replaceChildren(said[0]);
  const named = [
    ["Fastest", best.reduce((a, b) => (b.latency_ms < a.latency_ms ? b : a))],
    ["Most accurate", best.reduce((a, b) => (b.accuracy > a.accuracy ? b : a))],
    ["Smallest", best.reduce((a, b) => (b.size_bytes < a.size_bytes ? b : a))],
  ];
  const parts = named.flatMap(([name, trial]) => {
    const button = el("button", { type: "button", class: "link" }, trial.title);
    button.addEventListener("click", () => select(trial.trial));
    const numbers = `${milliseconds(trial.latency_ms)}, ${percent(trial.accuracy)}, ${size(trial.size_bytes)}`;
    return [` ${name}: `, button, ` (${numbers}).`];
  });
  return place.replaceChildren(said[0], ...parts);
}

function ring(number) {
  const plot = frontPlot();
  if (!plot) return;
  const mark = plot.data.findIndex((trace) => trace.name === "selected");
  const [x, y] = whereIs(plot.data, number);
  Plotly.restyle(plot, { x: [x], y: [y] }, mark);
}

/** Arrow keys walk along the front while the picture has the focus. */
function walk(event) {
  const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 };
  const ends = { Home: 0, End: -1 };
  if (event.key in steps) step(steps[event.key]);
  else if (event.key in ends && data.front.length) select(data.front.at(ends[event.key]));
  else return;
  event.preventDefault();
}

function startFront() {
  const place = control("plot-front");
  if (!place) return;
  hooks.before = (key, figure, at) => {
    if (key === "front") completeFront(figure, at.clientWidth < 600);
  };
  hooks.after = (at) => {
    if (at.id !== "plot-front") return;
    at.data.forEach((trace, i) => {
      const update = markerUpdate(trace);
      if (update) Plotly.restyle(at, update, i);
    });
  };
  const form = control("controls");
  form.addEventListener("input", redraw);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(redraw));
  place.addEventListener("keydown", walk);
  sayWithin(allowed());
}

function clicked(points) {
  const point = points.find((candidate) => candidate.customdata);
  if (point) select(point.customdata[0]);
}
