// Draws the figures, keeps the theme, and shows the trial that was chosen.

const data = JSON.parse(document.getElementById("data").textContent);

/** The keys of a card that are not there when nothing is known. */
const nothing = {
  name: null,
  accuracy: null,
  accuracy_se: null,
  latency_ms: null,
  size_bytes: null,
  macs: null,
  params: null,
  reused_from: null,
  policy: {},
  stages: [],
  beyond: [],
};
data.trials = data.trials.map((trial) => ({ ...nothing, ...trial }));
const byNumber = new Map(data.trials.map((trial) => [trial.trial, trial]));
/** Elements that hold a figure. */
const drawn = [];
let selected = data.selected;

// Figures and their theme

function colours() {
  // Computed colours of real elements: custom properties would still say light-dark(...).
  const card = getComputedStyle(document.querySelector(".card"));
  const muted = getComputedStyle(document.querySelector("footer")).color;
  return {
    ink: card.color,
    muted,
    card: card.backgroundColor,
    line: card.borderTopColor,
    family: card.fontFamily,
  };
}

function themeUpdate() {
  const { ink, muted, card, line, family } = colours();
  return {
    font: { color: muted, family },
    "title.font.color": ink,
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink, family }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
    "xaxis.gridcolor": line,
    "yaxis.gridcolor": line,
  };
}

/** What a trace takes from the theme: the mark of the chosen trial its colour, points a rim in the card's
 * colour, which keeps overlapping ones apart. */
function markerUpdate(trace) {
  const { ink, card } = colours();
  if (trace.name === "selected") return { "marker.color": ink };
  if (trace.customdata && trace.name !== "struck out") return { "marker.line.color": card };
  return null;
}

/** Draw all figures in the theme's colours; `size` says what else changes in a figure's layout. */
function applyTheme(size = () => ({})) {
  for (const plot of drawn) Plotly.relayout(plot, { ...themeUpdate(), ...size(plot) });
  const front = drawn.find((plot) => plot.id === "plot-front");
  if (front) {
    front.data.forEach((trace, i) => {
      const update = markerUpdate(trace);
      if (update) Plotly.restyle(front, update, i);
    });
  }
}

/** Set dotted keys in a nested object: drawing once in the right colours is quicker than twice. */
function setKeys(target, update) {
  for (const [path, value] of Object.entries(update)) {
    const keys = path.split(".");
    const last = keys.pop();
    keys.reduce((at, key) => (at[key] ??= {}), target)[last] = value;
  }
}

const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

function labelToggle() {
  const button = document.getElementById("theme");
  button.textContent = dark() ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(dark()));
}

function toggleTheme() {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  labelToggle();
  applyTheme();
}

/** The mark of the chosen trial, and on a phone the colour bar on top, where it takes no width. */
function completeFront(figure, narrow) {
  figure.data.push({
    type: "scatter",
    mode: "markers",
    name: "selected",
    x: [],
    y: [],
    hoverinfo: "skip",
    showlegend: false,
    marker: { symbol: "circle-open", size: 22, line: { width: 2 } },
  });
  const scale = figure.data.find((trace) => trace.name === "size");
  if (narrow && scale) {
    const above = { orientation: "h", y: 1.02, yanchor: "bottom", x: 0.5, len: 0.9 };
    Object.assign(scale.marker.colorbar, above);
    figure.layout.margin.t = 76;
  }
}

function drawFigures() {
  const remove = ["select2d", "lasso2d", "autoScale2d"];
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: remove };
  for (const [key, figure] of Object.entries(data.figures)) {
    const place = document.getElementById(`plot-${key}`);
    if (key === "front") completeFront(figure, place.clientWidth < 600);
    setKeys(figure.layout, themeUpdate());
    if (key === "front") for (const trace of figure.data) setKeys(trace, markerUpdate(trace) || {});
    Plotly.newPlot(place, figure.data, figure.layout, config);
    drawn.push(place);
    if (key === "front") place.on("plotly_click", (event) => clicked(event.points));
  }
}

function clicked(points) {
  const point = points.find((candidate) => candidate.customdata);
  if (point) select(point.customdata[0]);
}

function ring(number) {
  const front = drawn.find((plot) => plot.id === "plot-front");
  if (!front) return;
  const x = [];
  const y = [];
  for (const trace of front.data) {
    const i = (trace.customdata || []).findIndex((custom) => custom[0] === number);
    if (i >= 0) {
      x.push(trace.x[i]);
      y.push(trace.y[i]);
    }
  }
  Plotly.restyle(
    front,
    { x: [x], y: [y] },
    front.data.findIndex((trace) => trace.name === "selected"),
  );
}

// Choosing a trial

function select(number) {
  const trial = byNumber.get(number);
  if (!trial) return;
  selected = number;
  document.getElementById("choose").value = String(number);
  document.getElementById("trial").replaceChildren(...card(trial));
  for (const row of document.querySelectorAll("tr[data-trial]"))
    row.classList.toggle("chosen", row.dataset.trial === String(number));
  ring(number);
}

function step(by) {
  const at = data.front.indexOf(selected);
  const next =
    at < 0 ? (by > 0 ? 0 : data.front.length - 1) : (at + by + data.front.length) % data.front.length;
  select(data.front[next]);
}

function fillChooser() {
  const chooser = document.getElementById("choose");
  const onFront = new Set(data.front);
  const kinds = [
    ["On the front", (t) => onFront.has(t.trial)],
    ["Baselines", (t) => t.role === "baseline"],
    ["Verified", (t) => t.verified],
    ["Complete", (t) => t.state === "COMPLETE"],
    ["Other", () => true],
  ];
  const left = new Set([...data.front.map((number) => byNumber.get(number)), ...data.trials]);
  for (const [name, belongs] of kinds) {
    const trials = [...left].filter(belongs);
    for (const trial of trials) left.delete(trial);
    const words = (t) => [
      t.title,
      t.accuracy === null ? t.state.toLowerCase() : percent(t.accuracy),
      t.latency_ms === null ? "" : milliseconds(t.latency_ms),
    ];
    if (trials.length) {
      chooser.append(
        el(
          "optgroup",
          { label: name },
          ...trials.map((t) => el("option", { value: t.trial }, words(t).filter(Boolean).join(" · "))),
        ),
      );
    }
  }
  chooser.addEventListener("change", () => select(Number(chooser.value)));
}

function listen() {
  document.getElementById("theme").addEventListener("click", toggleTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    labelToggle();
    applyTheme();
  });
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  for (const id of ["previous", "next"]) document.getElementById(id).hidden = data.front.length < 2;
  for (const button of document.querySelectorAll("button[data-select]")) {
    button.addEventListener("click", () => {
      select(Number(button.dataset.select));
      document.getElementById("trial-section").scrollIntoView({ behavior: "smooth", block: "start" });
    });
  }
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
}

let themeOnScreen;

function beforePrint() {
  themeOnScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  for (const part of document.querySelectorAll("details")) part.open = true;
  // Figures have fixed widths: those of a whole and of half a page.
  const wide = ["plot-front", "plot-hypervolume"];
  applyTheme((plot) => ({ width: wide.includes(plot.id) ? 660 : 310 }));
}

function afterPrint() {
  if (themeOnScreen) document.documentElement.dataset.theme = themeOnScreen;
  else delete document.documentElement.dataset.theme;
  // No width is the container's again. Asking for autosize would drop the figure's height as well.
  applyTheme(() => ({ width: null }));
}

labelToggle();
drawFigures();
listen();
if (byNumber.size) {
  document.getElementById("trial-section").hidden = false;
  fillChooser();
  select(selected);
}
