// What is known of one trial: numbers, settings, training, parity, export command.

function tile(name, value, small) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, small ? el("small", {}, small) : null));
}

function accuracyNote(trial) {
  const origin = data.origin;
  // Points lost are counted on one split only; where they cannot be, the split itself is what matters.
  if (origin && trial.split === origin.split && trial.accuracy !== null && origin.accuracy !== null) {
    const points = 100 * (trial.accuracy - origin.accuracy);
    return `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)} points, ${trial.split} split`;
  }
  return trial.split ? `${trial.split} split` : null;
}

function latencyNote(trial) {
  if (trial.latency_ms === null) return null;
  const range = trial.low_ms !== null ? `${digits(trial.low_ms)} to ${digits(trial.high_ms)} ms` : null;
  if (!trial.measured) return range ? `predicted, 90 %: ${range}` : "predicted";
  return range ? `measured, ${range}` : "measured";
}

/** How many times less than the uncompressed model; null when either is unknown. */
function timesLess(trial, key) {
  return data.origin && data.origin[key] && trial[key] ? data.origin[key] / trial[key] : null;
}

function tiles(trial) {
  const beside = trial.reference_ms ? `original ${milliseconds(trial.reference_ms)} beside it` : null;
  const smaller = timesLess(trial, "size_bytes");
  const fewer = (key) => {
    const ratio = timesLess(trial, key);
    return ratio && ratio > 1.005 ? `${times(ratio)} fewer` : null;
  };
  return el(
    "dl",
    { class: "tiles" },
    tile("Accuracy", withError(trial.accuracy, trial.accuracy_se), accuracyNote(trial)),
    tile("Latency", milliseconds(trial.latency_ms), latencyNote(trial)),
    tile("Faster", times(trial.ratio || timesLess(trial, "latency_ms")), beside),
    tile("Size", size(trial.size_bytes), smaller ? `${times(smaller)} smaller` : null),
    tile("MACs", count(trial.macs), fewer("macs")),
    tile("Parameters", count(trial.params), fewer("params")),
  );
}

// Settings and training

function words(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : digits(value, 3);
  if (Array.isArray(value)) return value.map(words).join(", ");
  if (value && typeof value === "object")
    return Object.entries(value)
      .map(([key, item]) => `${key.replaceAll("_", " ")} ${words(item)}`)
      .join(", ");
  return String(value);
}

/** Every part of the policy that the table of layers does not show, whatever its schema. */
function settings(policy) {
  const shown = new Set(["schema", "model", "prune", "bits", "removed_blocks", "sparsity"]);
  const names = { distill: "Distillation", finetune: "Fine-tune" };
  return Object.entries(policy)
    .filter(([key, value]) => !shown.has(key) && value !== null && value !== undefined && words(value) !== "")
    .map(([key, value]) => [names[key] || capital(key.replaceAll("_", " ")), words(value)]);
}

function curve(stage) {
  const losses = stage.losses;
  const top = Math.max(...losses);
  const low = Math.min(...losses);
  const range = top > low ? top - low : 1;
  const x = (i) => 44 + (i * 190) / Math.max(1, losses.length - 1);
  const y = (loss) => 84 - (72 * (loss - low)) / range;
  const line = losses.map((loss, i) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
  return el(
    "figure",
    { class: "curve" },
    svg(
      "svg",
      {
        viewBox: "0 0 240 100",
        role: "img",
        "aria-label": `training loss from ${digits(losses[0])} to ${digits(losses.at(-1))}`,
      },
      svg("line", { x1: 44, x2: 234, y1: 84, y2: 84 }),
      svg("line", { x1: 44, x2: 234, y1: 12, y2: 12 }),
      svg("text", { x: 38, y: 88, "text-anchor": "end" }, digits(low)),
      svg("text", { x: 38, y: 16, "text-anchor": "end" }, digits(top)),
      svg("text", { x: 44, y: 98 }, "start"),
      svg("text", { x: 234, y: 98, "text-anchor": "end" }, "end"),
      svg("polyline", { points: line }),
    ),
    el("figcaption", {}, `${stage.rung} fine-tune: loss from ${digits(losses[0])} to ${digits(losses.at(-1))}`),
  );
}

function training(trial) {
  // A fine-tune may stand in several stages; its curve is drawn once.
  const curves = [
    ...new Map(trial.stages.filter((s) => (s.losses || []).length > 1).map((s) => [s.rung, s])).values(),
  ];
  const rows = settings(trial.policy);
  const rate = trial.verified ? trial.verified.rate : 1;
  if (rate !== 1) rows.push(["Long fine-tune", `${digits(rate)} times that learning rate`]);
  return el(
    "div",
    {},
    rows.length ? el("h4", {}, "Settings") : null,
    rows.length ? table(["", ""], rows) : null,
    curves.length ? el("h4", {}, "Training loss") : null,
    curves.length ? el("div", { class: "curves" }, ...curves.map(curve)) : null,
  );
}

function stages(trial) {
  if (!trial.stages.length) return null;
  return el(
    "div",
    {},
    el("h4", {}, "Accuracy, stage by stage"),
    table(
      ["Stage", "Split", "#Examples", "#Accuracy"],
      trial.stages.map((s) => [
        el("span", {}, s.name, el("br"), el("small", { class: "muted" }, `${s.rung} rung`)),
        s.split,
        decimal(s.samples, 0),
        withError(s.accuracy, s.se ?? null),
      ]),
    ),
  );
}

/** What undoing each choice alone would change, the one that saves most first. */
function reasons(trial) {
  const known = data.why[trial.trial] || [];
  if (!known.length) return null;
  const nouns = { group: "width of", layer: "bits of", block: "block" };
  const choice = (entry) => (entry.kind === "group" ? `${Math.round(100 * entry.choice)} % less` : words(entry.choice));
  const signed = (value, text) => (value < 0 ? `−${text(-value)}` : text(value));
  const number = (value, text) => (typeof value === "number" ? signed(value, text) : unknown);
  return el(
    "div",
    {},
    el("h4", {}, "Why this policy"),
    table(
      ["Choice", "#Saves, ms", "#Costs, points", "#Damage, nats"],
      known.map((entry) => [
        `${nouns[entry.kind] || entry.kind} ${entry.name}: ${choice(entry)}`,
        number(entry.saved_ms, (ms) => digits(ms, 2)) + (entry.measured ? "" : " pred."),
        number(entry.accuracy_cost, (share) => (100 * share).toFixed(1)),
        number(entry.sensitivity, (nats) => digits(nats, 2)),
      ]),
    ),
    el(
      "p",
      { class: "muted below" },
      "Undone one at a time: what the choice saves (measured beside this model, or predicted), and what the search's model " +
        "of accuracy believes that it costs. Damage: before any fine-tune.",
    ),
  );
}

function parity(trial) {
  if (!trial.verified) return null;
  const used = Object.entries(trial.verified.bits_used || {});
  const sums = new Map();
  for (const [, bits] of used) sums.set(bits, (sums.get(bits) || 0) + 1);
  return el(
    "div",
    {},
    el("h4", {}, "Exported file against torch"),
    table(
      ["", "#"],
      [
        ["Same top-1 answer", percent(trial.verified.top1_agreement)],
        ["Largest difference of an output", digits(trial.verified.max_abs_diff)],
        ["Kernels that the runtime uses", [...sums].map(([bits, n]) => `${n} × ${bits}`).join(", ") || unknown],
      ],
    ),
    used.length
      ? el("details", {}, el("summary", {}, "Kernels, layer by layer"), table(["Layer", "#Kernel"], used))
      : null,
  );
}

// Export

function command(trial) {
  if (trial.state !== "COMPLETE") return null;
  const text = data.commands.before + trial.trial + data.commands.after;
  const code = el("code", { tabindex: 0 }, text);
  const button = el("button", { type: "button", id: "copy" }, "Copy");
  button.addEventListener("click", () => copy(text, code, button));
  return el("div", {}, el("h4", {}, "Export"), el("div", { class: "command" }, code, button));
}

function copy(text, code, button) {
  const done = () => {
    button.textContent = "Copied";
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1500);
  };
  // A file opened from disk may not write to the clipboard in every browser: mark the text to copy by hand.
  const mark = () => {
    getSelection().selectAllChildren(code);
    button.textContent = "Press Ctrl+C";
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, mark);
  else mark();
}

// The card

function reviewed(trial) {
  const verbs = { pick: "Approved", reject: "Rejected", note: "Note" };
  return data.reviews
    .filter((entry) => String(entry.trial) === String(trial.trial))
    .map((entry) => {
      const action = entry.action in verbs ? entry.action : "pick";
      const who = entry.who ? ` by ${entry.who}` : "";
      return el("div", { class: `said said-${action}` }, `${verbs[action]}${who}${entry.note ? `: ${entry.note}` : ""}`);
    });
}

function alertsOf(trial) {
  return [
    trial.beyond.length ? `Beyond the limits: ${trial.beyond.join("; ")}` : null,
    trial.struck_out ? `Struck out: ${trial.struck_out}` : null,
    trial.state === "COMPLETE" ? null : `${trial.state}: ${trial.reason || "no reason recorded"}`,
    trial.state === "COMPLETE" && !trial.verified
      ? "Not verified: accuracy is of the search split, nothing was exported yet."
      : null,
    trial.reused_from === null ? null : `Same policy as trial ${trial.reused_from}; its result was reused.`,
    trial.brief ? "The page has no room for this trial's policy; trials.csv has it." : null,
  ].filter(Boolean);
}

function card(trial) {
  const tags = [
    ...(data.labels[trial.trial] || []),
    ...(data.front.includes(trial.trial) ? ["on the front"] : []),
    ...(trial.role === "search" ? [] : [trial.role]),
  ];
  const name = trial.title === `trial ${trial.trial}` ? `Trial ${trial.trial}` : trial.title;
  return [
    el(
      "div",
      { class: "title" },
      el("h2", { id: "trial-title", dir: "auto" }, name),
      ...tags.map((tag) => el("span", { class: "tag" }, tag)),
      el("span", { class: "muted" }, trial.name ? `trial ${trial.trial}, ${trial.digest}` : trial.digest),
    ),
    ...reviewed(trial),
    ...alertsOf(trial).map((text) => el("div", { class: "alert" }, text)),
    tiles(trial),
    layers(trial),
    el(
      "div",
      { class: "halves" },
      el("div", {}, reasons(trial), training(trial)),
      el("div", {}, stages(trial), parity(trial)),
    ),
    command(trial),
    data.review ? reviewControls(trial) : null,
  ].filter(Boolean);
}
