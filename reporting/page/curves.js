"use strict";
// Curves: charts of metrics by step that share one cursor. The overview of a training run. The settings.

const COLORS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];
const CHART_HEIGHT = 162; // as in page.css
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [1, 4], [12, 4]];

// x values of a run: step numbers, or totals after each step
function xValues(one, axis) {
  const metrics = one.metrics, names = { hours: Object.keys(metrics).filter((n) => n.startsWith("seconds/") || n === "seconds") };
  if (axis === "step") return metrics.step || [];
  let total = 0;
  return (metrics.step || []).map((_, k) => {
    if (axis === "hours") total += names.hours.reduce((sum, n) => sum + (metrics[n][k] || 0), 0) / 3600;
    else total += metrics[DATA.axes[axis]][k] || 0;
    return total;
  });
}

function axesOf(runs) {
  const known = (axis) => runs.every((r) => axis === "step" || DATA.axes[axis] in r.metrics);
  const timed = runs.every((r) => Object.keys(r.metrics).some((n) => n.startsWith("seconds")));
  return [...Object.keys(DATA.axes).filter(known), ...(timed ? ["hours"] : [])];
}

// Running mean over 2 half + 1 values; missing ones are left out.
function smoothed(values, half) {
  if (!half) return values;
  return values.map((value, k) => {
    if (value === null || value === undefined) return null;
    let sum = 0, n = 0;
    for (let j = Math.max(0, k - half); j <= Math.min(values.length - 1, k + half); j++) {
      if (values[j] !== null && values[j] !== undefined) [sum, n] = [sum + values[j], n + 1];
    }
    return sum / n;
  });
}

let charts = []; // {u, plot, draw} of each chart on the page

function forgetCharts() {
  inView.disconnect();
  resized.disconnect();
  for (const chart of charts) chart.u?.destroy();
  charts = [];
}

// lines: [{label, color, dash, xs, ys, steps}], dashes: what line styles mean -> a card, whose chart is drawn when it
// comes into view.
function chartCard(title, about, lines, dashes = "") {
  const values = h("div", { class: "values" });
  const plot = h("div", { class: "plot" });
  const card = h("figure", { class: "chart", "data-title": title }, h("figcaption", { title: about }, h("b", {}, title), dashes ? h("span", { class: "muted" }, dashes) : null, values), plot);
  const xs = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, k) => [x, k]));
  const placed = (line, ys) => {
    const all = new Array(xs.length).fill(null);
    line.xs.forEach((x, k) => { all[place.get(x)] = ys[k] ?? null; });
    return all;
  };
  const spread = lines.map((line) => placed(line, line.ys));
  const stepAt = new Array(xs.length).fill(null);
  for (const line of lines) line.xs.forEach((x, k) => { stepAt[place.get(x)] = line.steps[k]; });
  const soft = lines.map((line) => placed(line, smoothed(line.ys, state.smooth)));
  const last = (ys) => ys.findLast((y) => y !== null);

  function showValues(index) {
    values.replaceChildren(...lines.map((line, k) => {
      if (line.quiet) return "";
      const y = index === null || index === undefined ? last(soft[k]) : nearest(soft[k], index);
      return h("span", { class: "value" }, h("i", { style: `--line: var(${line.color})`, class: DASHES[line.dash].length ? "dashed" : "" }),
        lines.length > 1 ? visible(line.label) + " " : "", h("b", {}, number(y)));
    }));
  }
  showValues(null);

  function draw() {
    const few = Math.max(...spread.map((ys) => ys.filter((y) => y !== null).length)) <= 12;
    const series = [{}], data = [xs];
    lines.forEach((line, k) => {
      if (state.smooth) { // the raw values, faintly
        series.push({ stroke: () => faint(css(line.color)), width: 1, spanGaps: true, points: { show: false } });
        data.push(spread[k]);
      }
      series.push({ stroke: () => css(line.color), width: 1.75, dash: DASHES[line.dash], spanGaps: true,
        points: { show: few || soft[k].filter((y) => y !== null).length < xs.length / 3, size: 5, fill: () => css(line.color) } });
      data.push(soft[k]);
    });
    const axis = { stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif", gap: 4 };
    const options = {
      width: Math.max(200, plot.clientWidth), height: CHART_HEIGHT, legend: { show: false }, padding: [6, 6, 0, 0],
      scales: { x: { time: false }, y: { range: (u, low, high) => (low === high ? [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2] : uPlot.rangeNum(low, high, 0.08, true)) } },
      axes: [{ ...axis, size: 22, space: 56, label: state.x, labelSize: 14, labelGap: 0, labelFont: axis.font, values: (_, ticks) => ticks.map((v) => compact.format(v)) },
        { ...axis, size: 46, space: 30, values: (_, ticks) => ticks.map(tick) }],
      series,
      cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, y: false, points: { size: 6 } },
      hooks: {
        setCursor: [(u) => showValues(u.cursor.idx)],
        drawClear: [(u) => shade(u, xs, stepAt)],
        setSelect: [(u) => {
          const { left, width } = u.select;
          if (width < 4) return;
          const inside = stepAt.filter((_, k) => xs[k] >= u.posToVal(left, "x") && xs[k] <= u.posToVal(left + width, "x"));
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
          if (inside.length && run().kind === "rl") set({ from: String(inside[0]), to: String(inside.at(-1)), row: "" });
        }],
      },
    };
    chart.u = new uPlot(options, data, plot);
    let pressed = 0;
    chart.u.over.addEventListener("pointerdown", (e) => { pressed = e.clientX; });
    chart.u.over.addEventListener("click", (e) => {
      const index = chart.u.cursor.idx;
      if (Math.abs(e.clientX - pressed) > 3 || index === null || index === undefined || state.view !== "overview") return;
      if (run().kind === "rl" && run().rows.length) set({ from: String(stepAt[index]), to: String(stepAt[index]), row: "", view: "rollouts" });
    });
  }
  const chart = { draw: () => { if (!chart.u) draw(); }, plot, u: null };
  charts.push(chart);
  return card;
}

const tick = (v) => {
  const size = Math.abs(v);
  return minus(size >= 1e4 ? compact.format(v) : size && size < 1e-3 ? v.toExponential(0).replace("e-", "e\u2212") : String(Number(v.toPrecision(6))));
};
const faint = (color) => `color-mix(in srgb, ${color} 28%, transparent)`;
function nearest(ys, index) {
  for (let k = index; k >= 0; k--) if (ys[k] !== null) return ys[k];
  return ys.find((y) => y !== null);
}

// Shades the selected steps behind the curves.
function shade(u, xs, stepAt) {
  const [low, high] = stepRange();
  if (low === -Infinity && high === Infinity || state.view !== "overview") return;
  const inside = xs.filter((_, k) => stepAt[k] >= low && stepAt[k] <= high);
  if (!inside.length) return;
  const pad = 2 * devicePixelRatio;
  const left = u.valToPos(inside[0], "x", true) - pad, right = u.valToPos(inside.at(-1), "x", true) + pad;
  u.ctx.save();
  u.ctx.fillStyle = css("--selected");
  u.ctx.fillRect(left, u.bbox.top, right - left, u.bbox.height);
  u.ctx.restore();
}

// Charts are drawn as they come into view, and all of them before printing. They follow the width of their cards.
const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) charts.find((c) => c.plot === entry.target)?.draw();
}, { rootMargin: "400px" });
const resized = new ResizeObserver((entries) => {
  for (const entry of entries) {
    const chart = charts.find((c) => c.plot === entry.target);
    if (chart?.u && chart.u.width !== Math.floor(entry.contentRect.width)) chart.u.setSize({ width: Math.max(200, Math.floor(entry.contentRect.width)), height: CHART_HEIGHT });
  }
});
function watchCharts() {
  for (const chart of charts) { inView.observe(chart.plot); resized.observe(chart.plot); }
}
function fitCharts(width) {
  for (const chart of charts) {
    chart.draw();
    chart.u.setSize({ width: width ?? Math.max(200, chart.plot.clientWidth), height: CHART_HEIGHT });
  }
}
const redrawCharts = () => charts.forEach((chart) => chart.u?.redraw(false));

function chartTools(axes) {
  if (!axes.includes(state.x)) state.x = "step";
  const option = (value, text, now) => h("option", { value, selected: String(value) === String(now) }, text);
  return h("div", { class: "tools" },
    h("label", {}, h("span", { class: "muted" }, "Over"), h("select", { id: "x", onchange: (e) => set({ x: e.target.value }) }, axes.map((a) => option(a, a === "step" ? "steps" : a, state.x)))),
    h("label", {}, h("span", { class: "muted" }, "Smooth over"), h("select", { id: "smooth", onchange: (e) => set({ smooth: Number(e.target.value) }) },
      [[0, "nothing"], [1, "3 steps"], [2, "5 steps"], [5, "11 steps"], [15, "31 steps"], [50, "101 steps"]].map(([v, t]) => option(v, t, state.smooth)))));
}

// One section of cards for each section of panels, in their order.
function sectionsOf(panels, card) {
  const found = new Map();
  for (const panel of panels) {
    if (!found.has(panel.section)) found.set(panel.section, []);
    found.get(panel.section).push(card(panel));
  }
  return [...found].map(([title, cards]) => h("section", {}, h("h2", {}, title), h("div", { class: "charts" }, cards)));
}

// A section that can be folded.
function folded(section, open) {
  return h("details", { open }, h("summary", {}, section.firstChild.textContent), section.lastChild);
}

// -- overview ----------------------------------------------------------------------------------------------------------

const HEADLINES = {
  rl: [["original/reward", "Reward"], ["held_out/original/reward", "Held out"], ["exact/original", "Exact score"], ["edit/gain", "Gain of edits"],
    ["original/length", "Tokens"], ["entropy", "Entropy"]],
  other: [["loss", "Loss"], ["held_out_loss", "Held-out loss"], ["accuracy", "Accuracy"], ["held_out_accuracy", "Held-out accuracy"], ["margin", "Margin"], ["tokens_per_second", "Tokens per second"]],
};

views.overview = {
  mount(main) {
    const one = run();
    if (one.kind === "evaluation") return mountResults(main);
    if (!one.metrics.step || !one.metrics.step.length) return main.append(h("p", { class: "empty" }, "No step is finished yet. Make the page again later."));
    main.append(headlines(one), warningsOf(one) ?? "", h("div", { id: "curves" }));
    this.curves();
  },
  curves() {
    const one = run(), box = document.getElementById("curves");
    forgetCharts();
    const tools = chartTools(axesOf([one])), xs = xValues(one, state.x);
    const sections = sectionsOf(one.panels, (panel) => chartCard(panel.title, panel.about,
      panel.series.map(([name, label], k) => ({ label, color: COLORS[k % COLORS.length], dash: k % DASHES.length, xs, ys: one.metrics[name], steps: one.metrics.step }))));
    box.replaceChildren(tools, ...sections.map((s) => (s.firstChild.textContent === "Other metrics" ? folded(s, false) : s)));
    watchCharts();
  },
  update(changed) {
    if (run().kind === "evaluation" || !document.getElementById("curves")) return;
    if (changed.has("x") || changed.has("smooth")) this.curves();
    else if (changed.has("from") || changed.has("to")) redrawCharts();
  },
};

// The main metrics: means over the last fifth of the steps, and over the first.
function headlines(one) {
  const mean = (values) => { const known = values.filter((v) => v !== null); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };
  const cards = [];
  for (const [name, label] of HEADLINES[one.kind] || HEADLINES.other) {
    const values = one.metrics[name];
    if (!values || mean(values) === null) continue;
    const known = values.filter((v) => v !== null), fifth = Math.max(1, Math.floor(known.length / 5));
    const first = mean(known.slice(0, fifth)), last = mean(known.slice(-fifth));
    cards.push(h("div", { class: "headline" }, h("span", { class: "label" }, label), h("strong", {}, number(last)),
      known.length > 1 ? h("span", { class: "muted" }, `from ${number(first)}`) : null));
  }
  const few = one.metrics.step.length < 10;
  return h("section", { class: "headlines", "aria-label": "Means over the last fifth of the steps" }, cards,
    h("p", { class: "muted note" }, few ? "Too few steps to compare." : "Means over the last fifth of the steps, and over the first."));
}

function warningsOf(one) {
  if (!one.warnings.length) return null;
  const order = { warn: 0, ok: 1, none: 2 }, marks = { warn: "\u25b2", ok: "\u25cf", none: "\u25cb" };
  const words = { warn: "warning", ok: "ok", none: "not measured" };
  const sorted = [...one.warnings].sort((a, b) => order[a.state] - order[b.state]);
  const item = (warning) => {
    const link = warning.state === "warn" && warning.link && one.rows.length;
    const go = () => set({ ...Object.fromEntries(FILTER.map((n) => [n, DEFAULTS[n]])), ...(warning.link.steps && { from: String(warning.link.steps[0]), to: String(warning.link.steps[1]) }),
      sort: warning.link.sort || DEFAULTS.sort, show: warning.link.show || "all", row: "", view: "rollouts" });
    return h("li", { class: `warning ${warning.state}` }, h("span", { class: "mark", role: "img", "aria-label": words[warning.state] }, marks[warning.state]),
      h("b", {}, warning.name), h("span", { class: "found" }, warning.found),
      h("p", { class: "rule" }, warning.rule, link ? h("button", { class: "quiet go", onclick: go }, "Rollouts that show it \u2192") : null));
  };
  const count = (s) => one.warnings.filter((l) => l.state === s).length;
  return h("section", { class: "warnings" },
    h("h2", {}, "Warnings ", h("span", { class: "muted" }, `${count("warn")} of ${count("warn") + count("ok")} raised` + (count("none") ? `, ${count("none")} not measured` : ""))),
    h("ul", {}, sorted.map(item)));
}

// -- settings ----------------------------------------------------------------------------------------------------------

views.settings = {
  mount(main) {
    const one = run(), { inputs, non_default, ...args } = one.args, flat = Object.entries(args);
    const changed = flat.filter(([name]) => non_default?.includes(name)), others = flat.filter(([name]) => !non_default?.includes(name));
    const row = ([name, value]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value === null ? h("span", { class: "muted" }, "none") : visible(asText(value))));
    main.append(h("section", { class: "settings" }, h("h2", {}, "Run"), h("table", {}, row(["folder", one.path]), row(["page made", new Date(DATA.made * 1000).toLocaleString()])),
      non_default ? [h("h2", {}, "Flags that differ from their defaults"), h("table", { id: "changed" }, changed.map(row))] : null,
      h("h2", {}, non_default ? "Other flags" : "Flags"), h("table", {}, others.map(row)),
      inputs ? [h("h2", {}, "Digests of the inputs"), h("table", {}, Object.entries(inputs).map(row))] : null));
  },
  update() {},
};
