// What is known of one trial: numbers, layers, settings, training, parity, export command.

function tile(name, value, small) {
  return el("div", {}, el("dt", {}, name), el("dd", {}, value, small ? el("small", {}, small) : null));
}

function accuracyNote(trial) {
  const origin = data.origin;
  // Points lost are counted on one split only; where they cannot be, the split itself is what matters.
  if (origin && trial.split === origin.split && trial.accuracy !== null && origin.accuracy !== null) {
    const points = 100 * (trial.accuracy - origin.accuracy);
    return `${points >= 0 ? "+" : "−"}${Math.abs(points).toFixed(1)} points`;
  }
  return trial.split ? `${trial.split} split` : null;
}

function latencyNote(trial) {
  if (trial.latency_ms === null) return null;
  if (!trial.interval_ms) return trial.measured ? null : "predicted";
  return `predicted ${digits(trial.interval_ms[0])} to ${digits(trial.interval_ms[1])} ms`;
}

/** How many times less than the uncompressed model; null when either is unknown. */
function timesLess(trial, key) {
  return data.origin && data.origin[key] && trial[key] ? data.origin[key] / trial[key] : null;
}

function tiles(trial) {
  const beside = trial.reference_ms ? `original ${milliseconds(trial.reference_ms)} beside it` : null;
  const smaller = timesLess(trial, "size_bytes");
  return el(
    "dl",
    { class: "tiles" },
    tile("Accuracy", withError(trial.accuracy, trial.accuracy_se), accuracyNote(trial)),
    tile("Latency", milliseconds(trial.latency_ms), latencyNote(trial)),
    tile("Faster", times(trial.ratio || timesLess(trial, "latency_ms")), beside),
    tile("Size", size(trial.size_bytes), smaller ? `${times(smaller)} smaller` : null),
    tile("MACs", count(trial.macs), null),
    tile("Parameters", count(trial.params), null),
  );
}

function keptChannels(group, ratio) {
  if (!ratio) return group.channels;
  const step = group.step || 1;
  return Math.min(group.channels, Math.max(1, Math.round((group.channels * (1 - ratio)) / step)) * step);
}

function bitsWords(bits) {
  if (!bits || (bits.weights === 32 && bits.activations === 32)) return "fp32";
  return `${bits.weights}/${bits.activations}`;
}

function layerRow(name, kept, channels, bits, gone) {
  const words = gone ? "removed" : bitsWords(bits);
  const low = words !== "fp32" && !gone;
  return el(
    "div",
    { class: `layer${gone ? " gone" : ""}` },
    el("span", { class: "name", title: name }, name),
    el(
      "div",
      { class: "track" },
      el("div", {
        class: `fill${low ? " int8" : ""}`,
        style: `width:${gone ? 0 : (100 * kept) / channels}%`,
      }),
    ),
    el(
      "span",
      { class: "count" },
      gone ? "" : channels > 1 ? `${kept} / ${channels}` : `${Math.round(100 * kept)} %`,
    ),
    el("span", { class: `bits${low ? " low" : ""}` }, words),
  );
}

function layers(policy) {
  const anatomy = data.anatomy;
  const prune = policy.prune || {};
  const bits = policy.bits || {};
  const removed = new Set(policy.removed_blocks || []);
  const nameOf = (layer) => (typeof layer === "string" ? layer : layer.name);
  const groupOf = new Map(
    anatomy.groups.flatMap((group) => (group.layers || []).map((layer) => [nameOf(layer), group])),
  );
  const gone = new Set(
    anatomy.blocks
      .filter((block) => removed.has(block.name))
      .flatMap((block) => (block.layers || []).map(nameOf)),
  );
  let names = anatomy.layers.map((layer) => layer.name);
  if (!names.length) names = [...new Set([...Object.keys(prune), ...Object.keys(bits)])];
  const rows = names.map((name) => {
    const group = groupOf.get(name);
    const kept = group ? keptChannels(group, prune[group.name]) : 1 - (prune[name] || 0);
    return layerRow(name, kept, group ? group.channels : 1, bits[name], gone.has(name));
  });
  return el(
    "div",
    {},
    el("h4", {}, "Layers: width kept, bits of weights/activations"),
    rows.length
      ? el(
          "div",
          {},
          el(
            "div",
            { class: "key" },
            el("span", {}, el("i", { class: "fill" }), "floating point"),
            el("span", {}, el("i", { class: "fill int8" }), "quantised"),
            el("span", {}, el("i", { class: "track" }), "removed"),
          ),
          el("div", { class: "layers", tabindex: 0 }, ...rows),
        )
      : el("p", { class: "muted" }, "Nothing is compressed, or the layers were not recorded."),
    removed.size ? el("p", { class: "muted below" }, `Removed blocks: ${[...removed].join(", ")}`) : null,
  );
}

function settings(name, values) {
  const pairs = Object.entries(values || {});
  if (!pairs.length) return null;
  return [
    name,
    pairs
      .map(
        ([key, value]) =>
          `${key.replaceAll("_", " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`,
      )
      .join(", "),
  ];
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
    el("figcaption", {}, `${stage.rung} fine-tune`),
  );
}

function training(trial) {
  // A fine-tune may stand in several stages; its curve is drawn once.
  const curves = [
    ...new Map(trial.stages.filter((s) => s.losses.length > 1).map((s) => [s.rung, s])).values(),
  ];
  const rows = [
    settings("Distillation", trial.policy.distill),
    settings("Fine-tune", trial.policy.finetune),
    trial.policy.importance ? ["Importance", trial.policy.importance] : null,
  ].filter(Boolean);
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
      ["Stage", "Rung", "Split", "#Examples", "#Accuracy"],
      trial.stages.map((s) => [
        s.name,
        s.rung,
        s.split,
        s.samples.toLocaleString("en"),
        withError(s.accuracy, s.se),
      ]),
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
        ["Bits that the runtime uses", [...sums].map(([bits, n]) => `${n} × ${bits}`).join(", ") || unknown],
      ],
    ),
    used.length
      ? el("details", {}, el("summary", {}, "Bits used, layer by layer"), table(["Layer", "#Bits"], used))
      : null,
  );
}

function command(trial) {
  if (trial.state !== "COMPLETE") return null;
  const text = data.commands.before + trial.trial + data.commands.after;
  const code = el("code", {}, text);
  const button = el("button", { type: "button" }, "Copy");
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

function card(trial) {
  const labels = data.labels[trial.trial] || [];
  const approved = data.approved[trial.trial];
  const tags = [
    ...labels,
    ...(data.front.includes(trial.trial) ? ["on the front"] : []),
    ...(trial.role === "search" ? [] : [trial.role]),
  ];
  const alerts = [
    trial.beyond.length ? `Beyond the limits: ${trial.beyond.join("; ")}` : null,
    trial.struck_out ? `Struck out: ${trial.struck_out}` : null,
    trial.state === "COMPLETE" ? null : `${trial.state}: ${trial.reason || "no reason recorded"}`,
    trial.state === "COMPLETE" && !trial.verified
      ? "Not verified: accuracy is of the search split, nothing was exported yet."
      : null,
    trial.reused_from === null ? null : `Same policy as trial ${trial.reused_from}; its result was reused.`,
    trial.brief ? "The page has no room for this trial's policy; trials.csv has it." : null,
  ].filter(Boolean);
  const name = trial.title === `trial ${trial.trial}` ? `Trial ${trial.trial}` : trial.title;
  return [
    el(
      "div",
      { class: "title" },
      el("h2", { id: "trial-title" }, name),
      ...tags.map((tag) => el("span", { class: "tag" }, tag)),
      el("span", { class: "muted" }, trial.name ? `trial ${trial.trial}, ${trial.digest}` : trial.digest),
    ),
    approved
      ? el(
          "div",
          { class: "approved" },
          `Approved${approved.who ? ` by ${approved.who}` : ""}${approved.note ? `: ${approved.note}` : ""}`,
        )
      : null,
    ...alerts.map((text) => el("div", { class: "alert" }, text)),
    tiles(trial),
    el(
      "div",
      { class: "halves" },
      el("div", {}, layers(trial.policy)),
      el("div", {}, training(trial), stages(trial), parity(trial)),
    ),
    command(trial),
  ].filter(Boolean);
}
