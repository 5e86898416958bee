// Figures: the first at once, the others when they come near the window; in the theme's colours, light on paper.

/** Elements that hold a figure. */
const drawn = [];
/** Their heights on the screen, in pixels. */
const heights = new Map();
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

const waiting = new Map(Object.entries(data.figures).map(([key, figure]) => [`plot-${key}`, [key, figure]]));

/** Draw the figure that belongs into an element, once. */
function draw(place) {
  if (!waiting.has(place.id)) return;
  const [key, figure] = waiting.get(place.id);
  waiting.delete(place.id);
  const remove = ["select2d", "lasso2d", "autoScale2d"];
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: remove };
  hooks.before(key, figure, place);
  setKeys(figure.layout, themeUpdate());
  Plotly.newPlot(place, figure.data, figure.layout, config);
  heights.set(place, figure.layout.height);
  drawn.push(place);
}

const drawAll = () => [...waiting.keys()].forEach((id) => draw(document.getElementById(id)));

/** Of a page without its margins, in CSS pixels: A4, which also fits on Letter. */
const PAPER_WIDTH = 700;

/** The size of a figure on paper: as wide as its card, whose halves stand side by side, and less high than on the screen,
 * but where each row has its name. */
function onPaper(place) {
  const half = place.closest(".half");
  const named = place._fullLayout.yaxis.type === "category";
  return {
    width: half ? PAPER_WIDTH / 2 - 30 : PAPER_WIDTH - 26,
    height: named ? heights.get(place) : Math.round((half ? 0.7 : 0.6) * heights.get(place)),
  };
}

let themeOnScreen;

function beforePrint() {
  drawAll();
  themeOnScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  for (const part of document.querySelectorAll("details")) part.open = true;
  applyTheme(onPaper);
}

function afterPrint() {
  if (themeOnScreen) document.documentElement.dataset.theme = themeOnScreen;
  else delete document.documentElement.dataset.theme;
  // No width is the container's again. Asking for autosize would drop the figure's height as well.
  applyTheme((place) => ({ width: null, height: heights.get(place) }));
}

/** Draw the first figure now and each other one before it is scrolled to; follow the theme and the printer. */
function startFigures() {
  labelToggle();
  const [first, ...others] = [...waiting.keys()].map((id) => document.getElementById(id));
  if (first) draw(first);
  const near = (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target));
  const watch = new IntersectionObserver(near, { rootMargin: "100% 0px" });
  for (const place of others) watch.observe(place);
  document.getElementById("theme").addEventListener("click", toggleTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    labelToggle();
    applyTheme();
  });
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
}
