"use strict";
// What all parts of the page share. Text of models goes into text nodes only, never into HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#8b95a5"];
const colour = (i) => COLOURS[i % COLOURS.length];
const find = (id) => document.getElementById(id);

// element("b", {class: "x", title: "y"}, "text", child)
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const TURNING = /[\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff]/;
const HIDDEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ufeff\ud800-\udfff])/u;

// Text with control characters, and those that turn the direction of writing, shown by their names.
function visible(text) {
  return text.split(HIDDEN).filter((part) => part !== "").map((part) => {
    if (!HIDDEN.test(part)) return part;
    return element("i", { class: "control" }, "⟨" + part.codePointAt(0).toString(16).toUpperCase().padStart(2, "0") + "⟩");
  });
}

function short(value, percent = false) {
  if (value === null || value === undefined) return "–";
  if (percent) return (100 * value).toFixed(1) + " %";
  if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(4));
}

for (const swatch of document.querySelectorAll(".swatch[data-run]")) swatch.style.background = colour(+swatch.dataset.run);
