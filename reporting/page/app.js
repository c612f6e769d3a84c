"use strict";
// The state of the page, which its address holds. Helpers for all views. Header, filters, keyboard.
// A view is {mount(main), update(changed)}: mount builds it, update follows a change of the state.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const DIMENSIONS = ["helpfulness", "personalization", "naturalness"];

const DEFAULTS = {
  run: 0, view: "overview", x: "step", smooth: 0, // the view
  from: "", to: "", q: "", show: "all", sort: "newest", topic: "", prompt: "", // the filter
  row: "", text: "diff", color: "off", // the rollout
  verdict: "all", order: "file", group: "", pair: "plain", // rows of evaluations
  at: "last", nth: 0, // the comparison
};
const FILTER = ["from", "to", "q", "show", "sort", "topic", "prompt"];
const state = { ...DEFAULTS };
const views = {};

// -- elements and text ------------------------------------------------------------------------------------------------

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (["value", "checked", "selected", "disabled"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

// Characters that are invisible or change the text around them are written out: control characters, direction marks, lone surrogates.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
function visible(text) {
  return String(text ?? "").replace(UNSEEN, (c) => `\u27e8U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u27e9`);
}

// Text from a run: shown as it is, in its own direction, never as markup.
function said(text, className = "said") {
  return h("div", { class: className, dir: "auto" }, visible(text));
}

function number(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "\u2013";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e5) return minus(String(value));
  if (size >= 1e5) return minus(compact.format(value));
  if (size >= 100) return minus(value.toFixed(0));
  if (size > 0 && size < 0.001) return minus(value.toExponential(1).replace("e-", "e\u2212"));
  if (size > 0 && size < 0.01) return minus(value.toPrecision(2));
  return minus(value.toFixed(digits));
}
const fixed = (value) => (value === null || value === undefined ? "\u2013" : minus(value.toFixed(2))); // for columns
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const minus = (text) => text.replace("-", "\u2212");
const signed = (value, digits = 2) => (value > 0 ? "+" : "") + number(value, digits);
const percent = (value, digits = 0) => (value === null || value === undefined ? "\u2013" : minus((100 * value).toFixed(digits)) + " %");
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function ago(seconds) {
  const past = Date.now() / 1000 - seconds;
  for (const [size, word] of [[86400, "day"], [3600, "hour"], [60, "minute"]]) {
    if (past >= size) return `${plural(Math.floor(past / size), word)} ago`;
  }
  return "just now";
}

const run = () => RUNS[state.run];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// -- state ------------------------------------------------------------------------------------------------------------

function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of Object.entries(DEFAULTS)) {
    const given = found.get(name);
    state[name] = given === null ? value : typeof value === "number" ? Number(given) || 0 : given;
  }
  if (!RUNS[state.run]) state.run = 0;
  if (!/^\d*$/.test(state.row)) state.row = ""; // row=length is none
  if (!COLORINGS.some(([name]) => name === state.color)) state.color = DEFAULTS.color;
  state.nth = Math.max(0, Math.floor(state.nth));
  if (!viewsOf(run()).some(([name]) => name === state.view)) state.view = viewsOf(run())[0][0];
}

function writeAddress(replace) {
  const changed = Object.entries(state).filter(([name, value]) => String(value) !== String(DEFAULTS[name]));
  const address = "#" + new URLSearchParams(changed.map(([name, value]) => [name, String(value)]));
  if (address === (location.hash || "#")) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}

let shown = {}; // the state that the page shows now
function set(changes, replace = false) {
  Object.assign(state, changes);
  if ("run" in changes && changes.run !== shown.run) {
    Object.assign(state, { row: "", prompt: "", topic: "", from: "", to: "", group: "" });
    if (!viewsOf(run()).some(([name]) => name === state.view)) state.view = viewsOf(run())[0][0];
  }
  writeAddress(replace);
  render();
}

function render() {
  const changed = new Set(Object.keys(state).filter((name) => state[name] !== shown[name]));
  if (!changed.size) return;
  const anew = changed.has("run") || changed.has("view");
  shown = { ...state };
  renderHeader();
  const filters = document.getElementById("filters"), main = document.getElementById("main");
  const filtered = run().kind === "rl" && run().rows.length > 0 && ["overview", "rollouts"].includes(state.view);
  filters.hidden = !filtered;
  if (filtered) renderFilters(anew, changed);
  else filters.replaceChildren();
  if (anew) {
    forgetCharts();
    main.replaceChildren();
    main.className = `view-${state.view}`;
    views[state.view].mount(main);
    window.scrollTo(0, 0);
  } else {
    views[state.view].update(changed);
  }
}

function viewsOf(one) {
  const peers = RUNS.filter((r) => comparable(r) && comparable(r) === comparable(one)).length;
  const found = [["overview", one.task === "annotation" ? "Quality" : one.kind === "evaluation" ? "Results" : "Overview"]];
  if (one.kind === "rl") found.push(["rollouts", "Rollouts"]);
  if (one.kind === "evaluation" && one.rows.length) found.push(["rows", one.task === "annotation" ? "Ten pairs" : "Answers"]);
  if (one.judgements && one.judgements.length) found.push(["rows", "Judgements"]);
  if (peers > 1) found.push(["compare", "Compare"]);
  found.push(["settings", "Settings"]);
  return found;
}
const comparable = (one) => (one.kind === "rl" ? "rl" : one.kind === "evaluation" && one.task === "win-rate" ? "evaluation" : one.metrics ? one.kind : "");

// -- header -----------------------------------------------------------------------------------------------------------

function renderHeader() {
  const one = run(), steps = one.metrics && one.metrics.step ? one.metrics.step : [];
  const total = one.args.max_steps;
  const status = [one.label];
  if (steps.length) status.push(`step ${steps.at(-1)}` + (total && total > steps.at(-1) ? ` of ${total}` : ""));
  if (one.written) status.push(`written ${ago(one.written)}`);
  const name = RUNS.length === 1
    ? h("h1", { title: one.path }, visible(one.name))
    : h("select", { id: "run", "aria-label": "Run", onchange: (e) => set({ run: Number(e.target.value) }) },
        RUNS.map((r, i) => h("option", { value: i, selected: i === state.run }, `${visible(r.name)}${r.kind === "evaluation" ? " (evaluation)" : ""}`)));
  const tabs = viewsOf(one).map(([view, label]) =>
    h("button", { class: "tab", "data-view": view, "aria-current": view === state.view ? "page" : null, onclick: () => set({ view }) }, label));
  document.getElementById("header").replaceChildren(
    h("div", { class: "who" }, name, h("p", { class: "status" }, status.map((s) => h("span", {}, visible(s))))),
    h("nav", { "aria-label": "Views" }, tabs),
    h("button", { class: "icon", id: "help-button", title: "Keys and colours (?)", "aria-label": "Keys and colours", onclick: toggleHelp }, "?"));
}

const KEYS = [
  ["o  r  c  s", "overview, rollouts or answers, comparison, settings"], ["/", "search"], ["j  k", "next, previous row"],
  ["n  p", "next, previous step"], ["d", "show the edit as diff or as text"],
  ["t", "colour tokens by log-prob, ratio, weight, advantage, or not"], ["\u2190 \u2192", "move through coloured tokens after a click on one"],
  ["x", "clear the filter"], ["?", "show this list"], ["Esc", "close, go back to the list"],
];
function toggleHelp() {
  const dialog = document.getElementById("help");
  if (dialog.open) return dialog.close();
  dialog.replaceChildren(
    h("h2", {}, "Keys"), h("dl", {}, KEYS.map(([key, text]) => [h("dt", {}, key.split("  ").map((k) => h("kbd", {}, k))), h("dd", {}, text)])),
    h("h2", {}, "Mouse"), h("p", {}, "Click a curve to see the rollouts of that step. Drag over it to select steps."),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  dialog.showModal();
}

// -- the filter, shared by curves and rollouts ---------------------------------------------------------------------------

const SHOW = {
  __proto__: null, // show=constructor is none
  all: ["All rollouts", () => true],
  trained: ["Edit in the batch", (r) => r.edit && r.edit.selected],
  dropped: ["Dropped from the batch", (r) => r.drop_reason || (r.edit && r.edit.drop_reason)],
  cut: ["Cut off at the limit", (r) => r.truncated || (r.edit && r.edit.truncated)],
  clipped: ["With clipped tokens", (r) => clippedFraction(r) > 0],
  tokens: ["With token figures", (r) => r.tokens || (r.edit && r.edit.tokens)],
  heldout: ["Held-out prompts", (r) => r.held_out],
  control: ["With control text", (r) => r.control_text || (r.edit && r.edit.control_text)],
};
const gain = (r) => (r.edit && r.edit.reward !== undefined && r.reward !== undefined ? r.edit.reward - r.reward : null);
const SORT = {
  __proto__: null,
  newest: ["Newest step first", (r) => (r.step === undefined ? null : r.step + (r.edit ? 0.5 : 0))], // in a step, edited answers
  step: ["Oldest step first", null],
  improved: ["Most improved by the edit", (r) => gain(r)],
  worsened: ["Most worsened by the edit", (r) => (gain(r) === null ? null : -gain(r))],
  longest: ["Longest", (r) => r.n_tokens ?? null],
  best: ["Highest reward", (r) => r.reward ?? null],
  worst: ["Lowest reward", (r) => (r.reward === undefined ? null : -r.reward)],
  clipped: ["Most clipped tokens", (r) => clippedFraction(r)],
  repeats: ["Repeats most persona values", (r) => r.recited ?? null],
};

function clippedFraction(r) {
  let none = 0, n = 0;
  for (const part of [r, r.edit]) {
    for (const weight of (part && part.tokens && part.tokens.weight) || []) [none, n] = [none + (weight === 0), n + 1];
  }
  return n ? none / n : 0;
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));
function searchText(one, r) {
  if (r.searchText === undefined) {
    const p = one.prompts[r.prompt];
    const parts = [r.prompt, p.question, asText(p.persona), p.topic, r.answer, r.critique, r.drop_reason, r.edit && r.edit.answer, r.edit && r.edit.critique];
    Object.defineProperty(r, "searchText", { value: parts.filter(Boolean).join("\n").toLowerCase() });
  }
  return r.searchText;
}

let cache = { key: null };
// Indices of the rows that pass the filter, in its order. `anyStep` ignores the range of steps.
function matching() {
  const key = JSON.stringify([state.run, ...FILTER.map((name) => state[name])]);
  if (cache.key === key) return cache;
  const one = run(), words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const [low, high] = stepRange(), show = (SHOW[state.show] || SHOW.all)[1], value = (SORT[state.sort] || SORT.step)[1];
  const anyStep = [], rows = [];
  one.rows.forEach((r, i) => {
    if (state.prompt && r.prompt !== state.prompt) return;
    if (state.topic && one.prompts[r.prompt].topic !== state.topic) return;
    if (!show(r) || !words.every((w) => searchText(one, r).includes(w))) return;
    anyStep.push(i);
    if (r.step >= low && r.step <= high) rows.push(i);
  });
  if (value) {
    const known = new Map(rows.map((i) => [i, value(one.rows[i])]));
    rows.sort((a, b) => (known.get(b) ?? -Infinity) - (known.get(a) ?? -Infinity) || a - b);
  } else rows.sort((a, b) => one.rows[a].step - one.rows[b].step || (one.rows[a].held_out ? 1 : 0) - (one.rows[b].held_out ? 1 : 0) || a - b);
  cache = { key, rows, anyStep };
  return cache;
}

function stepRange() {
  return [state.from === "" ? -Infinity : Number(state.from), state.to === "" ? Infinity : Number(state.to)];
}

function renderFilters(anew, changed) {
  const box = document.getElementById("filters"), one = run();
  if (anew) {
    const topics = [...new Set(Object.values(one.prompts).map((p) => p.topic).filter(Boolean))].sort();
    const choice = (name, label, options) => h("select", { id: name, "aria-label": label, onchange: (e) => set({ [name]: e.target.value, row: "" }) },
      options.map(([value, text]) => h("option", { value }, text)));
    const step = (name, label) => h("input", { id: name, type: "number", min: 1, inputmode: "numeric", "aria-label": label,
      placeholder: name === "from" ? "first" : "last", onchange: (e) => set({ [name]: e.target.value, row: "" }) });
    let wait = 0;
    const search = h("input", { id: "q", type: "search", placeholder: "Search question, persona, answer, critique", "aria-label": "Search",
      oninput: (e) => { clearTimeout(wait); wait = setTimeout(() => set({ q: e.target.value, row: "" }, true), 150); } });
    box.replaceChildren(
      h("div", { class: "controls" }, search,
        h("span", { class: "steps" }, h("span", { class: "muted" }, "Steps"), step("from", "From step"), h("span", { class: "muted" }, "\u2013"), step("to", "To step")),
        choice("show", "Which", Object.entries(SHOW).map(([k, [text]]) => [k, text])),
        choice("sort", "Order", Object.entries(SORT).map(([k, [text]]) => [k, text])),
        topics.length > 1 && choice("topic", "Topic or source", [["", "All topics"], ...topics.map((t) => [t, visible(t)])]),
        h("button", { id: "clear", class: "quiet", onclick: clearFilter }, "Clear"),
        h("button", { id: "save", class: "quiet", title: "The rollouts of this filter as JSON lines", onclick: () => saveRows(matchingRollouts()) }, "Save rows")),
      h("div", { id: "only" }), h("div", { id: "timeline" }), h("p", { id: "count", class: "muted", "aria-live": "polite" }));
  }
  for (const name of FILTER) {
    const input = document.getElementById(name);
    if (input && document.activeElement !== input) input.value = state[name];
  }
  if (!anew && !FILTER.some((name) => changed.has(name))) return;
  document.getElementById("clear").disabled = FILTER.every((name) => state[name] === DEFAULTS[name]);
  document.getElementById("only").replaceChildren(...(state.prompt ? [
    h("button", { class: "chip", title: "Show all prompts", onclick: () => set({ prompt: "", row: "" }) },
      "Only prompt ", h("b", {}, visible(state.prompt)), " \u00d7")] : []));
  const found = matching(), { shown: kept, of } = one.sampled;
  document.getElementById("count").replaceChildren(`${plural(found.rows.length, "rollout")} of ${one.rows.length.toLocaleString("en")}`,
    kept < of ? h("span", { class: "sampled" }, ` \u2014 a sample: ${kept.toLocaleString("en")} of ${of.toLocaleString("en")} logged rollouts. Each step keeps its most improved, most worsened and longest if they fit.`) : "");
  renderTimeline(document.getElementById("timeline"), found);
}

// The rollouts that pass the filter, in its order, each with its persona and question.
function matchingRollouts() {
  const one = run();
  return matching().rows.map((i) => {
    const { prompt, ...row } = one.rows[i];
    return { prompt_id: prompt, ...one.prompts[prompt], ...row };
  });
}

// Offers rows as a file of JSON lines.
function saveRows(rows) {
  const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: "rows.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function clearFilter() {
  set({ ...Object.fromEntries(FILTER.map((name) => [name, DEFAULTS[name]])), row: "" });
}

// Bars: the number of matching rollouts by step. The selected steps stand out.
function renderTimeline(box, found) {
  const one = run(), steps = [...new Set(one.rows.map((r) => r.step))].sort((a, b) => a - b);
  const counts = new Map();
  for (const i of found.anyStep) counts.set(one.rows[i].step, (counts.get(one.rows[i].step) || 0) + 1);
  const top = Math.max(1, ...counts.values()), [low, high] = stepRange(), width = 100 / steps.length;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 100 20", preserveAspectRatio: "none", role: "img", "aria-label": "Matching rollouts by step" })) svg.setAttribute(name, value);
  steps.forEach((step, k) => {
    const n = counts.get(step) || 0, tall = n ? 2 + (18 * n) / top : 0.6;
    const bar = document.createElementNS(svg.namespaceURI, "rect");
    const place = { x: k * width, y: 20 - tall, width: width * 0.82, height: tall, class: step >= low && step <= high && n ? "in" : "out" };
    for (const [name, value] of Object.entries(place)) bar.setAttribute(name, value);
    svg.append(bar);
  });
  const at = (event) => {
    const frame = svg.getBoundingClientRect();
    return steps[Math.max(0, Math.min(steps.length - 1, Math.floor(((event.clientX - frame.left) / frame.width) * steps.length)))];
  };
  let begin = null;
  svg.onpointerdown = (e) => { begin = at(e); svg.setPointerCapture(e.pointerId); };
  svg.onpointerup = (e) => {
    if (begin === null) return;
    const [a, b] = [begin, at(e)].sort((x, y) => x - y);
    begin = null;
    const same = String(a) === state.from && String(b) === state.to;
    set({ from: same ? "" : String(a), to: same ? "" : String(b), row: "" });
  };
  svg.onpointermove = (e) => { tip.textContent = `step ${at(e)}: ${counts.get(at(e)) || 0}`; };
  const tip = h("span", { class: "tip muted" }, `step ${steps[0]} to ${steps.at(-1)}`);
  box.replaceChildren(svg, tip);
}

// -- keyboard ----------------------------------------------------------------------------------------------------------

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName);
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (state.row !== "") set({ row: "" });
    return;
  }
  if (typing || document.getElementById("help").open) return;
  const go = (names) => names.find((name) => viewsOf(run()).some(([view]) => view === name));
  const jump = { o: ["overview"], r: ["rollouts", "rows"], c: ["compare"], s: ["settings"] }[event.key];
  if (jump) { if (go(jump)) set({ view: go(jump) }); return; }
  if (event.key === "?") toggleHelp();
  else if (event.key === "/") { document.getElementById("q")?.focus(); event.preventDefault(); }
  else if (event.key === "x") clearFilter();
  else if (event.key === "d") {
    const name = state.view === "rollouts" ? "text" : "pair";
    set({ [name]: state[name] === "diff" ? "plain" : "diff" }, true);
  }
  else if (event.key === "n" || event.key === "p") moveStep(event.key === "n" ? 1 : -1);
  else views[state.view].key?.(event);
}

function moveStep(by) {
  const steps = [...new Set(run().rows.map((r) => r.step))].sort((a, b) => a - b);
  if (!steps.length) return;
  const now = steps.indexOf(Number(by > 0 ? state.to : state.from));
  const next = steps[now < 0 ? (by > 0 ? 0 : steps.length - 1) : Math.max(0, Math.min(steps.length - 1, now + by))];
  set({ from: String(next), to: String(next), row: "" });
}
