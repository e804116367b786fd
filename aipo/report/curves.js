"use strict";
// The curves: a chart a panel, all runs in it. `openStep(run, step)` of tokens.js shows the rollouts of a step.
const charts = [];
const hiddenRuns = new Set();

function smoothed(values, weight) {
  if (!weight) return values;
  let mean = 0, sum = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight); // so that the first value is not pulled to 0
    return mean / sum;
  });
}

// A panel's lines over the steps of all runs: uPlot wants one axis for all.
function aligned(panel, weight) {
  const several = data.runs.length > 1;
  const tables = [], series = [{ label: "step" }], bands = [];
  const add = (points, options) => {
    tables.push([points[0], options.smooth ? smoothed(points[1], weight) : points[1]]);
    series.push({ spanGaps: true, points: { show: points[0].length < 30, size: 5 }, ...options });
  };
  data.runs.forEach((run, r) => {
    const format = (_, value) => short(value, panel.percent);
    panel.lines.forEach((key, l) => {
      const points = run.series[key];
      if (!points) return;
      const stroke = colour(several ? r : l), name = key.split("/").slice(1).join("/").replace(/_s$/, "");
      const label = several ? (panel.lines.length > 1 ? `${run.name} ${name}` : run.name) : name;
      const common = { stroke, dash: several && l ? [6 - 2 * (l % 3), 3] : undefined, show: !hiddenRuns.has(r) };
      if (weight) add(points, { ...common, label: "", class: "raw", alpha: 0.25, width: 1, points: { show: false } });
      add(points, { ...common, label, width: 1.6, value: format, smooth: true });
    });
    if (panel.band.length && run.series[panel.band[0]] && !hiddenRuns.has(r)) {
      const at = series.length;
      for (const key of panel.band) add(run.series[key], { stroke: "transparent", label: "", width: 0, points: { show: false } });
      bands.push({ series: [at + 1, at], fill: colour(several ? r : 0) + "28" });
    }
  });
  const steps = [...new Set(tables.flatMap((table) => table[0]))].sort((a, b) => a - b);
  const place = new Map(steps.map((step, i) => [step, i]));
  const columns = tables.map(([xs, ys]) => {
    const column = new Array(steps.length).fill(null);
    xs.forEach((x, i) => { column[place.get(x)] = ys[i]; });
    return column;
  });
  return { rows: [steps, ...columns], series, bands };
}

// From least to most with some air; shares stay between 0 and 1.
function heights(panel, low, high) {
  if (low === null || low === undefined) return [0, 1];
  const flat = high - low < 1e-4 * Math.max(Math.abs(low), Math.abs(high)); // but for rounding
  const air = flat || low === high ? Math.abs(low) * 0.1 || (panel.percent ? 0.05 : 1) : (high - low) * 0.08;
  const least = low >= 0 ? Math.max(low - air, 0) : low - air;
  return [least, panel.percent && high <= 1 ? Math.min(high + air, 1) : high + air];
}

function draw(panel, host) {
  const weight = +find("smoothing").value;
  const style = getComputedStyle(document.documentElement);
  const [quiet, line] = [style.getPropertyValue("--quiet").trim(), style.getPropertyValue("--line").trim()];
  const { rows, series, bands } = aligned(panel, weight);
  const axis = { stroke: quiet, grid: { stroke: line, width: 1 }, ticks: { stroke: line, size: 4 }, font: "11px system-ui" };
  const chart = new uPlot({
    width: Math.max(host.clientWidth, 120), height: 190, series, bands,
    scales: { x: { time: false }, y: { range: (_, low, high) => heights(panel, low, high) } },
    padding: [8, 12, 0, 0],
    axes: [
      { ...axis, size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] },
      { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => panel.percent ? +(100 * tick).toFixed(2) + " %" : short(+tick.toPrecision(3))) },
    ],
    cursor: { sync: { key: "steps" }, points: { size: 7 } },
    legend: { markers: { width: 0, fill: (u, i) => u.series[i].stroke?.() ?? "none" } },
  }, rows, host);
  series.forEach((each, i) => { if (i && each.label === "") host.querySelectorAll(".u-series")[i].style.display = "none"; });
  let from = 0;
  chart.over.addEventListener("pointerdown", (event) => { from = event.clientX; });
  chart.over.addEventListener("click", (event) => {
    if (Math.abs(event.clientX - from) > 4) return; // that was a zoom
    const step = Math.round(chart.posToVal(event.clientX - chart.over.getBoundingClientRect().left, "x"));
    if (typeof openStep === "function") openStep(null, step);
  });
  return chart;
}

function redraw() {
  charts.forEach(({ chart }) => chart.destroy());
  charts.length = 0;
  data.panels.forEach((panel, i) => {
    const host = find("panels").children[i].querySelector(".chart");
    charts.push({ chart: draw(panel, host), host });
  });
}

function startCurves() {
  for (const panel of data.panels) {
    const box = element("div", { class: "panel" }, element("h3", {}, panel.title), element("div", { class: "chart" }));
    box.dataset.title = panel.title;
    find("panels").append(box);
  }
  if (data.runs.length > 1) {
    data.runs.forEach((run, r) => {
      const box = element("input", { type: "checkbox", checked: "" });
      const swatch = element("i", { class: "swatch" });
      swatch.style.background = colour(r);
      box.addEventListener("change", () => { hiddenRuns[box.checked ? "delete" : "add"](r); redraw(); });
      find("legend").append(element("label", {}, box, " ", swatch, run.name));
    });
  }
  find("smoothing").addEventListener("input", (event) => {
    event.target.nextElementSibling.value = event.target.value;
    redraw();
  });
  redraw();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone's address bar comes and goes
    width = innerWidth;
    charts.forEach(({ chart, host }) => chart.setSize({ width: Math.max(host.clientWidth, 120), height: 190 }));
  });
  for (const change of ["(prefers-color-scheme: dark)", "print"]) matchMedia(change).addEventListener("change", redraw);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-panel]");
    if (!link) return;
    event.preventDefault();
    for (const box of find("panels").children) {
      box.classList.toggle("found", box.dataset.title === link.dataset.panel);
      if (box.dataset.title === link.dataset.panel) box.scrollIntoView({ block: "center" });
    }
  });
}

if (data.panels) startCurves();
