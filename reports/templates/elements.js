"use strict";
// Words and elements. Everything from the data goes in as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);

// Words

const unknown = "–";

/** A formatter for each number of decimals: making one costs far more than using it. */
const formats = new Map();

function decimal(value, decimals) {
  if (!formats.has(decimals)) {
    const both = { minimumFractionDigits: decimals, maximumFractionDigits: decimals };
    formats.set(decimals, new Intl.NumberFormat("en", both));
  }
  return formats.get(decimals).format(value);
}

function digits(value, significant = 3) {
  if (value === null || value === undefined) return unknown;
  // Rounded first for the decimals: 9.996 has three digits as 10.0, not as 10.00.
  const rounded = Number(value.toPrecision(significant));
  const decimals = rounded ? significant - 1 - Math.floor(Math.log10(Math.abs(rounded))) : 0;
  return decimal(value, Math.min(12, Math.max(0, decimals)));
}
const percent = (share) =>
  share === null || share === undefined ? unknown : `${(100 * share).toFixed(1)} %`;
const withError = (share, error) => percent(share) + (error ? ` ± ${(100 * error).toFixed(1)}` : "");
const milliseconds = (ms) => (ms === null ? unknown : `${digits(ms)} ms`);
const times = (ratio) => (ratio ? `${digits(ratio, ratio < 1 ? 3 : 2)}×` : unknown);

function size(bytes) {
  if (bytes === null) return unknown;
  const unit = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
  ].find(([, factor]) => bytes >= factor);
  return unit ? `${digits(bytes / unit[1])} ${unit[0]}` : `${bytes} bytes`;
}

function count(value) {
  const unit = [
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ].find(([, factor]) => value >= factor);
  return value === null ? unknown : unit ? `${digits(value / unit[1])} ${unit[0]}` : `${value}`;
}

// Elements

function build(parent, tag, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) parent.setAttribute(name, value);
  }
  parent.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return parent;
}
const el = (tag, attributes = {}, ...children) =>
  build(document.createElement(tag), tag, attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), tag, attributes, children);

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** A table's head; a title that starts with # stands over numbers. */
const headCell = (title) =>
  el("th", { class: title.startsWith("#") ? "number" : null }, title.replace("#", ""));

function table(head, rows) {
  const cells = (row, tag) =>
    row.map((cell, i) => el(tag, { class: i && head[i].startsWith("#") ? "number" : null, dir: "auto" }, cell));
  const titles = head.map((title) => title.replace("#", ""));
  return el(
    "div",
    { class: "scroll" },
    el(
      "table",
      {},
      titles.some(Boolean) ? el("thead", {}, el("tr", {}, ...cells(titles, "th"))) : null,
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row, "td")))),
    ),
  );
}
