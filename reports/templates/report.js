// Shows the trial that was chosen, by a click, a key or the list.

/** The keys of a card that are not there when nothing is known. */
const nothing = {
  name: null,
  accuracy: null,
  accuracy_se: null,
  split: null,
  latency_ms: null,
  low_ms: null,
  high_ms: null,
  reference_ms: null,
  size_bytes: null,
  macs: null,
  params: null,
  reused_from: null,
  policy: {},
  stages: [],
  beyond: [],
};

/** Policies travel as positions in lists of names and values that the whole run shares. */
function unpack(policy) {
  const whole = { ...policy };
  for (const [key, { names, values }] of Object.entries(data.packed)) {
    if (!(key in policy)) continue;
    whole[key] = {};
    policy[key].forEach((at, i) => {
      if (at >= 0) whole[key][names[i]] = values[at];
    });
  }
  return whole;
}

data.trials = data.trials.map((trial) => ({ ...nothing, ...trial }));
const byNumber = new Map(data.trials.map((trial) => [trial.trial, trial]));
let selected = data.selected;

function select(number) {
  const trial = byNumber.get(number);
  if (!trial) return;
  selected = number;
  document.getElementById("choose").value = String(number);
  document.getElementById("trial").replaceChildren(...card({ ...trial, policy: unpack(trial.policy) }));
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
      t.title.length > 60 ? `${t.title.slice(0, 60)}…` : t.title,
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
  chooser.value = String(selected);
  chooser.addEventListener("change", () => select(Number(chooser.value)));
}

function listen() {
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  for (const id of ["previous", "next"]) document.getElementById(id).hidden = data.front.length < 2;
  for (const button of document.querySelectorAll("button[data-select]")) {
    button.addEventListener("click", () => {
      select(Number(button.dataset.select));
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      document.getElementById("trial-section").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
    });
  }
}

startFront();
listen();
if (byNumber.size) {
  document.getElementById("trial-section").hidden = false;
  select(selected);
}
startFigures();
const front = frontPlot();
if (front) front.on("plotly_click", (event) => clicked(event.points));
// The list of thousands of trials can come after the picture.
requestAnimationFrame(() => setTimeout(fillChooser));
