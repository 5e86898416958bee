// Each layer beside the original: width, bits, damage, milliseconds, bytes.

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
