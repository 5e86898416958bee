// What is known of one trial: numbers, layers, settings, training, parity, export command.

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

// Layers

function keptChannels(group, ratio) {
  if (!ratio) return group.channels;
  const step = group.step || 1;
  return Math.min(group.channels, Math.max(1, Math.round((group.channels * (1 - ratio)) / step)) * step);
}

/** 8/8 in words; 32/32 and nothing at all are fp32, 16 is a half. */
function bitsWords(bits) {
  if (!bits) return "fp32";
  const weights = bits.weights ?? 32;
  const activations = bits.activations ?? 32;
  return weights === 32 && activations === 32 ? "fp32" : `${weights}/${activations}`;
}

function bar(share, kind, words) {
  return el(
    "div",
    { class: "track", title: words },
    el("div", { class: `fill ${kind}`, style: `width:${Math.max(0, Math.min(100, 100 * share))}%` }),
  );
}

const nameOf = (layer) => (typeof layer === "string" ? layer : layer.name);

function groupsByLayer() {
  return new Map(
    data.anatomy.groups.flatMap((group) => (group.layers || []).map((layer) => [nameOf(layer), group])),
  );
}

/** Damage of one choice alone, in nats: of the group's width and of the layer's bits. */
function damages(layer, group, bits) {
  const known = data.sensitivity || {};
  const width = group && known.groups ? known.groups[group.name] : undefined;
  const choices = (known.bits || {})[layer];
  const stored = choices && bits ? choices[`${bits.weights}/${bits.activations}`] : undefined;
  return [width, stored].filter((value) => typeof value === "number");
}

function layerFacts(trial) {
  const policy = trial.policy;
  const prune = policy.prune || {};
  const removed = new Set(policy.removed_blocks || []);
  const groupOf = groupsByLayer();
  const gone = new Set(
    data.anatomy.blocks
      .filter((block) => removed.has(block.name))
      .flatMap((block) => (block.layers || []).map(nameOf)),
  );
  let names = data.anatomy.layers.map((layer) => layer.name);
  if (!names.length) names = [...new Set([...Object.keys(prune), ...Object.keys(policy.bits || {})])];
  const cost = (data.layers[trial.trial] || {}).layers || {};
  const before = data.origin ? (data.layers[data.origin.trial] || {}).layers || {} : {};
  return names.map((name) => {
    const group = groupOf.get(name);
    const bits = (policy.bits || {})[name];
    const kept = group ? keptChannels(group, prune[group.name]) : 1 - (prune[name] || 0);
    return {
      name,
      gone: gone.has(name),
      kept,
      channels: group ? group.channels : 1,
      bits,
      sparsity: (policy.sparsity || {})[name],
      damage: damages(name, group, bits),
      now: cost[name] || {},
      before: before[name] || {},
    };
  });
}

function widthWords(fact) {
  if (fact.gone) return "removed";
  return fact.channels > 1 ? `${fact.kept} / ${fact.channels}` : `${Math.round(100 * fact.kept)} %`;
}

/** Now, and small beside it the original. */
function nowBefore(now, before, words) {
  if (now === undefined && before === undefined) return unknown;
  return el(
    "span",
    {},
    now === undefined ? unknown : words(now),
    before === undefined ? null : el("small", { class: "muted" }, ` / ${words(before)}`),
  );
}

function layerRow(fact, columns) {
  const words = bitsWords(fact.bits);
  const weights = fact.gone ? 0 : (fact.bits && fact.bits.weights) || 32;
  const share = fact.gone ? 0 : fact.kept / fact.channels;
  const low = words !== "fp32" && !fact.gone;
  const cells = [
    el("th", { scope: "row", title: fact.name }, fact.name),
    el(
      "td",
      { class: "bars" },
      bar(share, "width", `width kept: ${widthWords(fact)}`),
      bar(weights / 32, "bits", `weight bits: ${weights} of 32`),
    ),
    el("td", { class: "number count" }, widthWords(fact)),
    el("td", { class: `number bits${low ? " low" : ""}` }, fact.gone ? "" : words),
  ];
  if (columns.sparsity)
    cells.push(el("td", { class: "number" }, fact.sparsity ? `${Math.round(100 * fact.sparsity)} %` : ""));
  if (columns.damage)
    cells.push(
      el("td", { class: "number" }, fact.damage.length ? digits(Math.max(...fact.damage), 2) : unknown),
    );
  if (columns.cost) {
    const gone = fact.gone ? 0 : undefined;
    cells.push(
      el("td", { class: "number" }, nowBefore(fact.now.ms ?? gone, fact.before.ms, (v) => digits(v, 2))),
      el("td", { class: "number" }, nowBefore(fact.now.bytes ?? gone, fact.before.bytes, size)),
    );
  }
  return el("tr", { class: `layer${fact.gone ? " gone" : ""}` }, ...cells);
}

function layers(trial) {
  const facts = layerFacts(trial);
  const removed = trial.policy.removed_blocks || [];
  const heading = el("h4", {}, "Layers, beside the original");
  if (!facts.length)
    return el(
      "div",
      {},
      heading,
      el("p", { class: "muted" }, "Nothing is compressed, or the layers were not recorded."),
    );
  const columns = {
    sparsity: facts.some((fact) => fact.sparsity),
    damage: facts.some((fact) => fact.damage.length),
    cost: facts.some((fact) => fact.now.ms !== undefined || fact.now.bytes !== undefined),
  };
  const heads = ["Layer", "Width, bits", "#Channels", "#Bits w/a"];
  if (columns.sparsity) heads.push("#Zeros");
  if (columns.damage) heads.push("#Damage, nats");
  if (columns.cost) heads.push("#ms", "#Bytes");
  return el(
    "div",
    {},
    heading,
    el(
      "p",
      { class: "key" },
      el("span", {}, el("i", { class: "fill width" }), "channels kept"),
      el("span", {}, el("i", { class: "fill bits" }), "weight bits of 32"),
      el("span", {}, el("i", { class: "track" }), "the original"),
    ),
    el(
      "div",
      { class: "layers", tabindex: 0, role: "region", "aria-label": "Layers" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...heads.map((head) => headCell(head)))),
        el("tbody", {}, ...facts.map((fact) => layerRow(fact, columns))),
      ),
    ),
    el("p", { class: "muted below" }, costWords(trial, columns)),
    removed.length ? el("p", { class: "muted below" }, `Removed blocks: ${removed.join(", ")}.`) : null,
  );
}

function costWords(trial, columns) {
  const said = [];
  if (columns.damage)
    said.push("Damage: what this choice alone does to the outputs before any fine-tune (half the width, or these bits).");
  if (columns.cost) {
    const known = data.layers[trial.trial];
    said.push(
      "Milliseconds: the runtime's profiler on the exported file, scaled so that they add up to the measured latency; " +
        `after the stroke the original's. ${milliseconds(known.other_ms)} go to what belongs to no layer ` +
        "(additions, pooling, changes of precision and layout).",
    );
  } else said.push("Milliseconds and bytes of each layer are known only for models that were exported and profiled.");
  return said.join(" ");
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
        withError(s.accuracy, s.se ?? null),
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
      el("div", {}, training(trial)),
      el("div", {}, stages(trial), parity(trial)),
    ),
    command(trial),
    data.review ? reviewControls(trial) : null,
  ].filter(Boolean);
}
