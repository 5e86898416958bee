// Draws the figures, keeps the theme, and shows the trial that was chosen.

const data = JSON.parse(document.getElementById("data").textContent);
const byNumber = new Map(data.trials.map((trial) => [trial.trial, trial]));
const drawn = []; // elements that hold a figure
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
  const update = {
    "font.color": muted,
    "font.family": family,
    "title.font.color": ink,
    "hoverlabel.bgcolor": card,
    "hoverlabel.bordercolor": line,
    "hoverlabel.font.color": ink,
    "hoverlabel.font.family": family,
    "modebar.bgcolor": "rgba(0,0,0,0)",
    "modebar.color": muted,
    "modebar.activecolor": ink,
  };
  for (const axis of ["xaxis", "yaxis"]) update[`${axis}.gridcolor`] = line;
  return update;
}

function applyTheme() {
  for (const plot of drawn) Plotly.relayout(plot, themeUpdate());
  const front = drawn.find((plot) => plot.id === "plot-front");
  if (front) {
    const { ink, card } = colours();
    front.data.forEach((trace, i) => {
      if (trace.name === "selected") Plotly.restyle(front, { "marker.color": ink }, i);
      // A rim in the card's colour keeps overlapping points apart.
      if (trace.customdata && trace.name !== "struck out")
        Plotly.restyle(front, { "marker.line.color": card }, i);
    });
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

function drawFigures() {
  const config = {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  for (const [key, figure] of Object.entries(data.figures)) {
    const place = document.getElementById(`plot-${key}`);
    if (!place) continue;
    if (key === "front") {
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
      if (place.clientWidth < 600) {
        // On a phone the points need the width more than the colour bar does.
        const bar = figure.data.find((trace) => trace.name === "size");
        if (bar)
          Object.assign(bar.marker.colorbar, {
            orientation: "h",
            y: 1.02,
            yanchor: "bottom",
            x: 0.5,
            len: 0.9,
          });
        figure.layout.margin.t = 76;
      }
    }
    Plotly.newPlot(place, figure.data, figure.layout, config);
    drawn.push(place);
    if (key === "front") place.on("plotly_click", (event) => clicked(event.points));
  }
  applyTheme();
}

function clicked(points) {
  const point = points.find((candidate) => candidate.customdata);
  if (point) select(point.customdata[0]);
}

function ring(number) {
  const front = drawn.find((plot) => plot.id === "plot-front");
  if (!front) return;
  const x = [],
    y = [];
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
  for (const plot of drawn) Plotly.relayout(plot, { width: wide.includes(plot.id) ? 660 : 310 });
  applyTheme();
}

function afterPrint() {
  if (themeOnScreen) document.documentElement.dataset.theme = themeOnScreen;
  else delete document.documentElement.dataset.theme;
  for (const plot of drawn) Plotly.relayout(plot, { width: null, autosize: true });
  applyTheme();
}

labelToggle();
drawFigures();
listen();
if (byNumber.size) {
  document.getElementById("trial-section").hidden = false;
  fillChooser();
  select(selected);
}
