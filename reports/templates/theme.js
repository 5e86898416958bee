// Figures: drawn one after another in the theme's colours, light on paper.

/** Elements that hold a figure. */
const drawn = [];
/** What else is to be changed in a figure before and after the theme changes, by the pages that need it. */
const hooks = { before: (_key, _figure, _place) => {}, after: (_place) => {} };

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

/** Draw all figures in the theme's colours; `size` says what else changes in a figure's layout. */
function applyTheme(size = () => ({})) {
  for (const place of drawn) {
    Plotly.relayout(place, { ...themeUpdate(), ...size(place) });
    hooks.after(place);
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

function draw(key, figure) {
  const place = document.getElementById(`plot-${key}`);
  const remove = ["select2d", "lasso2d", "autoScale2d"];
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: remove };
  hooks.before(key, figure, place);
  setKeys(figure.layout, themeUpdate());
  Plotly.newPlot(place, figure.data, figure.layout, config);
  drawn.push(place);
}

const waiting = Object.entries(data.figures);

function drawNext() {
  if (!waiting.length) return;
  draw(...waiting.shift());
  setTimeout(drawNext);
}

function drawAll() {
  while (waiting.length) draw(...waiting.shift());
}

let themeOnScreen;

function beforePrint() {
  drawAll();
  themeOnScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  for (const part of document.querySelectorAll("details")) part.open = true;
  // Figures have fixed widths: those of a whole and of half a page.
  applyTheme((place) => ({ width: place.closest(".half") ? 310 : 660 }));
}

function afterPrint() {
  if (themeOnScreen) document.documentElement.dataset.theme = themeOnScreen;
  else delete document.documentElement.dataset.theme;
  // No width is the container's again. Asking for autosize would drop the figure's height as well.
  applyTheme(() => ({ width: null }));
}

/** Draw the first figure now and the others when the page has been shown; follow the theme and the printer. */
function startFigures() {
  labelToggle();
  if (waiting.length) draw(...waiting.shift());
  performance.mark("first picture");
  setTimeout(drawNext, 50);
  document.getElementById("theme").addEventListener("click", toggleTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    labelToggle();
    applyTheme();
  });
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
}
