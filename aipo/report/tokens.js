"use strict";
// The token view: run -> step -> group -> rollouts, coloured by one figure.
const SHOWN = 2000; // tokens of a rollout until its button is pressed
const view = { run: 0, place: 0, map: "mi", rollout: 0 };

const source = () => data.tokens[view.run];
const group = () => source().groups[view.place];
const textOf = (rollout) => rollout.tokens.map((token) => source().vocabulary[token]).join("");
const stepsOf = (run) => [...new Set(data.tokens[run].groups.map((each) => each.step))];

function passes(rollout) {
  const wanted = find("filter").value, text = find("search").value.toLowerCase();
  const kept = { all: true, right: rollout.correct, wrong: !rollout.correct, truncated: rollout.truncated, dropped: !rollout.used };
  return kept[wanted] && (!text || textOf(rollout).toLowerCase().includes(text));
}

const filtering = () => find("filter").value !== "all" || find("search").value !== "";
const anything = (each) => !filtering() || each.rollouts.some(passes);

// Values that span the colours: of the whole group, without the outermost hundredth.
function span(name) {
  if (name === "mask") return [0, 1];
  const values = group().rollouts.flatMap((rollout) => rollout.figures[name] ?? []).filter((v) => v !== null).sort((a, b) => a - b);
  if (!values.length) return null;
  const at = (share) => values[Math.round(share * (values.length - 1))];
  const middle = data.figures[name]?.middle ?? null;
  if (middle === null) return [at(0.01), at(0.99)];
  const reach = Math.max(Math.abs(at(0.01) - middle), Math.abs(at(0.99) - middle)) || 1e-9;
  return [middle - reach, middle + reach];
}

function tint(name, value, range) {
  if (value === null || value === undefined || !range) return "";
  const middle = data.figures[name]?.middle ?? null;
  const width = range[1] - range[0] || 1e-9;
  if (middle === null) return `rgba(var(--heat), ${(0.62 * Math.min(Math.max((value - range[0]) / width, 0), 1)).toFixed(3)})`;
  const share = Math.min(Math.abs(value - middle) / (width / 2), 1);
  return `rgba(var(--${value >= middle ? "heat" : "cold"}), ${(0.62 * share).toFixed(3)})`;
}

function maps() {
  const found = new Set(source().groups.flatMap((each) => each.rollouts.flatMap((rollout) => Object.keys(rollout.figures))));
  return [...Object.keys(data.figures).filter((name) => found.delete(name)), ...found];
}

const label = (name) => data.figures[name]?.label ?? name;

function drawText(rollout, range, all) {
  const box = element("div", { class: "text", dir: "auto" });
  const mask = rollout.figures.mask, figure = rollout.figures[view.map];
  const only = find("only").checked, wanted = find("search").value.toLowerCase();
  const count = all ? rollout.tokens.length : Math.min(rollout.tokens.length, SHOWN);
  for (let i = 0; i < count; i++) {
    if (i === rollout.gap?.[0]) box.append(element("i", { class: "control" }, ` … ${rollout.gap[1]} more tokens are in the run folder … `));
    const text = source().vocabulary[rollout.tokens[i]];
    const span = element("span", {}, ...(text === "" ? ["·"] : visible(text)));
    if (mask[i]) span.classList.add("on");
    else if (only) span.classList.add("gone");
    if (wanted && text.toLowerCase().includes(wanted)) span.classList.add("hit");
    span.style.backgroundColor = tint(view.map, figure?.[i], range);
    span.dataset.i = i;
    box.append(span);
  }
  const left = rollout.tokens.length - count;
  if (left > 0) {
    const more = element("button", {}, `${left} more tokens`);
    more.addEventListener("click", () => box.replaceWith(drawText(rollout, range, true)));
    box.append(" ", more);
  }
  box.rollout = rollout;
  return box;
}

function card(rollout, place, range) {
  const kinds = ["rollout", rollout.correct ? "right" : "false", rollout.used ? "" : "dropped", place === view.rollout ? "current" : ""];
  const head = element("header", {},
    element("b", {}, `${rollout.correct ? "✓ right" : "✗ wrong"} · sample ${rollout.sample + 1}`),
    element("span", {}, "reward ", element("b", {}, short(rollout.reward)), `, advantage ${short(rollout.advantage)}`),
    element("span", {}, "extracted ", element("b", {}, element("bdi", {}, ...(rollout.extracted === null ? ["nothing"] : visible(rollout.extracted)))),
      ", compared with ", element("bdi", {}, ...visible(group().answer))),
    element("span", {}, `${rollout.length} tokens, ${rollout.selected} selected${rollout.truncated ? ", cut off" : ""}`),
    rollout.used ? null : element("span", { class: "down" }, `not in the update${rollout.reason ? ": " + rollout.reason : ""}`));
  const made = element("article", { class: kinds.filter(Boolean).join(" ") }, head, drawText(rollout, range, false));
  made.dataset.place = place;
  return made;
}

function render() {
  const host = find("group-view"), now = group();
  host.replaceChildren();
  if (!now) return;
  const right = now.rollouts.filter((rollout) => rollout.correct).length;
  const prompt = element("details", {}, element("summary", {}, "prompt"), element("pre", {}, ...visible(now.prompt)));
  const few = now.size && now.rollouts.length < now.size ? ` (${now.rollouts.length} of ${now.size} recorded)` : "";
  host.append(element("div", { class: "question" },
    element("p", {}, element("b", {}, element("bdi", {}, ...visible(now.question)))),
    element("p", { class: "quiet" }, `step ${now.step}, group ${now.group + 1}: ${right} of ${now.rollouts.length} right${few}${now.bucket ? ", " + now.bucket : ""}, answer `, element("bdi", {}, ...visible(now.answer))),
    prompt));
  const range = span(view.map);
  const shown = now.rollouts.map((rollout, place) => [rollout, place]).filter(([rollout]) => passes(rollout));
  for (const [rollout, place] of shown) host.append(card(rollout, place, range));
  if (!shown.length) host.append(element("p", { class: "quiet" }, "No rollout of this group passes the filter."));
  legend(range);
  chosen();
}

function legend(range) {
  const scale = find("scale");
  scale.replaceChildren();
  if (!range || view.map === "mask") return;
  const bar = element("i"), steps = [0, 0.25, 0.5, 0.75, 1].map((share) => tint(view.map, range[0] + share * (range[1] - range[0]), range));
  bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
  scale.append(short(range[0]), bar, short(range[1]), " " + (data.figures[view.map]?.unit ?? ""));
}

function options(select, items, value) {
  select.replaceChildren(...items.map(([key, text]) => {
    const option = element("option", { value: key }, text);
    option.selected = key === value;
    return option;
  }));
}

// The controls say what is shown.
function chosen() {
  const all = source().groups;
  options(find("step"), [...new Set(all.filter(anything).map((each) => each.step)).add(group().step)].sort((a, b) => a - b).map((step) => [step, step]), group().step);
  options(find("group"), all.map((each, place) => [place, each]).filter(([place, each]) => each.step === group().step && (anything(each) || place === view.place)).map(([place, each]) => {
    const right = each.rollouts.filter((rollout) => rollout.correct).length;
    const dropped = each.rollouts.every((rollout) => !rollout.used) ? ", not in the update" : "";
    return [place, `${right}/${each.rollouts.length} right${dropped} · ${each.question.replace(/\s+/g, " ").slice(0, 90)}`];
  }), view.place);
  for (const button of find("maps").children) button.classList.toggle("on", button.dataset.map === view.map);
}

function show(place, rollout = 0) {
  if (place < 0 || place >= source().groups.length) return;
  view.place = place;
  view.rollout = rollout;
  render();
}

function walk(by) {
  for (let place = view.place + by; place >= 0 && place < source().groups.length; place += by) {
    if (anything(source().groups[place])) return show(place);
  }
}

function walkSteps(by) {
  const steps = stepsOf(view.run), place = steps.indexOf(group().step) + by;
  if (place >= 0 && place < steps.length) show(source().groups.findIndex((each) => each.step === steps[place]));
}

function walkRollouts(by) {
  const cards = [...document.querySelectorAll(".rollout")];
  const at = cards.findIndex((each) => each.classList.contains("current"));
  const next = cards[Math.min(Math.max(at + by, 0), cards.length - 1)];
  if (!next) return;
  cards.forEach((each) => each.classList.toggle("current", each === next));
  view.rollout = +next.dataset.place;
  next.scrollIntoView({ block: "nearest" });
}

// The step with rollouts that lies nearest; run null is the one shown.
function openStep(run, step) {
  if (!data.tokens.some((each) => each.groups.length)) return;
  if (run !== null) view.run = run;
  const nearest = stepsOf(view.run).reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
  show(source().groups.findIndex((each) => each.step === nearest));
  find("tokens").scrollIntoView();
}

function setMap(name) {
  view.map = name;
  render();
}

function tip(event) {
  const span = event.target.closest?.(".text span[data-i]");
  const box = find("tip");
  document.querySelectorAll(".text .at").forEach((each) => each.classList.remove("at"));
  box.hidden = !span;
  if (!span) return;
  span.classList.add("at");
  const rollout = span.parentNode.rollout, i = +span.dataset.i;
  const rows = Object.entries(rollout.figures).filter(([name, values]) => name !== "mask" && values[i] !== null && values[i] !== undefined)
    .map(([name, values]) => element("tr", {}, element("th", {}, label(name)), element("td", {}, `${short(values[i])} ${data.figures[name]?.unit ?? ""}`)));
  const text = source().vocabulary[rollout.tokens[i]];
  box.replaceChildren(element("b", {}, "“", element("bdi", {}, ...visible(text.replace(/\n/g, "⏎").slice(0, 60))), "”"),
    ` token ${i + 1 + (rollout.gap && i >= rollout.gap[0] ? rollout.gap[1] : 0)}, ${rollout.figures.mask[i] ? "selected" : "not selected"}`, element("table", {}, ...rows));
  const at = span.getBoundingClientRect();
  box.style.left = Math.max(4, Math.min(at.left, innerWidth - box.offsetWidth - 8)) + "px";
  box.style.top = (at.bottom + box.offsetHeight + 8 < innerHeight ? at.bottom + 6 : at.top - box.offsetHeight - 6) + "px";
}

function keys(event) {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const bounds = find("tokens").getBoundingClientRect();
  if (bounds.top > innerHeight * 0.7 || bounds.bottom < 0) return; // elsewhere arrows scroll
  const all = maps();
  const act = {
    ArrowLeft: () => walk(-1), ArrowRight: () => walk(1), ArrowUp: () => walkRollouts(-1), ArrowDown: () => walkRollouts(1),
    "[": () => walkSteps(-1), "]": () => walkSteps(1), m: () => setMap(all[(all.indexOf(view.map) + 1) % all.length]),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

function startRun() {
  const all = maps();
  if (!all.includes(view.map)) view.map = all.includes("mi") ? "mi" : all[0];
  find("maps").replaceChildren(...all.map((name) => {
    const button = element("button", { type: "button" }, label(name));
    button.dataset.map = name;
    button.addEventListener("click", () => setMap(name));
    return button;
  }));
  const left = source().steps_left_out;
  find("left-out").textContent = left ? `Rollouts of ${left} more steps are in the run folder: the page has room for these.` : "";
}

function startTokens() {
  view.run = data.tokens.findIndex((each) => each.groups.length);
  const refilter = () => {
    if (!anything(group())) {
      const next = source().groups.findIndex(anything);
      if (next >= 0) view.place = next;
    }
    render();
  };
  find("step").addEventListener("change", (event) => show(source().groups.findIndex((each) => each.step === +event.target.value && anything(each))));
  find("group").addEventListener("change", (event) => show(+event.target.value));
  find("previous").addEventListener("click", () => walk(-1));
  find("next").addEventListener("click", () => walk(1));
  for (const id of ["filter", "only", "search"]) find(id).addEventListener(id === "search" ? "input" : "change", refilter);
  if (find("run")) {
    options(find("run"), data.runs.map((run, r) => [r, run.name]).filter(([r]) => data.tokens[r].groups.length), view.run);
    find("run").addEventListener("change", (event) => { view.run = +event.target.value; startRun(); show(0); });
  }
  document.addEventListener("pointerover", tip);
  document.addEventListener("pointerdown", tip);
  document.addEventListener("scroll", () => { find("tip").hidden = true; }, { passive: true });
  document.addEventListener("keydown", keys);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-step]");
    if (!link) return;
    event.preventDefault();
    openStep(null, +link.dataset.step);
  });
  startRun();
  view.place = Math.max(source().groups.findIndex((each) => each.rollouts.some((rollout) => rollout.used)), 0);
  render();
}

if (data.tokens && data.tokens.some((each) => each.groups.length)) startTokens();
