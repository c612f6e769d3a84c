"use strict";
// Runs side by side: their curves, and their responses to the same prompts.

function peers() {
  return RUNS.filter((r) => comparable(r) && comparable(r) === comparable(run()));
}

// {prompt: [entries]}: the responses of a run to each prompt, by step.
function entriesOf(one) {
  if (!one.entries) {
    const found = new Map();
    const add = (id, entry) => { if (!found.has(id)) found.set(id, []); found.get(id).push(entry); };
    if (one.kind === "evaluation") {
      for (const r of one.rows) add(r.id, { ...r.sides[0], verdict: r.verdict, question: r.question, persona: r.persona });
    } else {
      for (const r of one.rows) add(r.prompt, { ...r, question: one.prompts[r.prompt].question, persona: one.prompts[r.prompt].persona });
    }
    for (const entries of found.values()) entries.sort((a, b) => (a.step ?? 0) - (b.step ?? 0));
    Object.defineProperty(one, "entries", { value: found });
  }
  return one.entries;
}

// The entries of the first or the last step that has the prompt.
function entriesAt(entries) {
  const steps = [...new Set(entries.map((e) => e.step))];
  const step = state.at === "first" ? steps[0] : steps.at(-1);
  return entries.filter((e) => e.step === step);
}

function runColumn(one, k, prompt, base) {
  const entries = entriesAt(entriesOf(one).get(prompt) || []);
  const color = h("i", { class: "swatch", style: `--line: var(${COLORS[k % COLORS.length]})` });
  if (!entries.length) return h("section", { class: "block column" }, h("h3", {}, color, visible(one.name)), h("p", { class: "muted" }, "This page has no rollout of the run for this prompt."));
  const entry = entries[state.nth % entries.length];
  const different = base && base !== entry && state.pair === "diff" && base.answer && entry.answer;
  return h("section", { class: "block column" },
    h("h3", {}, color, visible(one.name), h("span", { class: "side muted" }, [entry.step !== undefined ? `step ${entry.step}` : null, entries.length > 1 ? `${(state.nth % entries.length) + 1} of ${entries.length}` : null].filter(Boolean).join(", "))),
    entry.drop_reason ? h("p", { class: "badges" }, h("span", { class: "badge bad" }, visible(entry.drop_reason))) : null,
    different ? wordDiff(base.answer, entry.answer) : said(entry.answer),
    entry.critique ? h("div", { class: "critique" }, h("h4", {}, "Critique"), said(entry.critique)) : null,
    entry.edit ? h("div", {}, h("h4", {}, "Edit"), state.text === "diff" ? wordDiff(entry.answer, entry.edit.answer) : said(entry.edit.answer)) : null,
    scoreTable(entry.edit ? [entry, entry.edit] : [entry], entry.edit ? ["Original", "Edit"] : ["Original"], Boolean(entry.edit)));
}

views.compare = {
  mount(main) {
    const runs = peers(), prompts = new Map();
    for (const one of runs) for (const id of entriesOf(one).keys()) prompts.set(id, (prompts.get(id) || 0) + 1);
    const shared = [...prompts].filter(([, n]) => n > 1).map(([id]) => id);
    this.prompts = shared.length ? shared : [...prompts.keys()];
    const newest = (id) => (entriesOf(runs[0]).get(id) || []).at(-1)?.step ?? 0;
    this.prompts.sort((a, b) => newest(b) - newest(a)); // a stable sort: evaluations keep their order
    if (runs[0].metrics) main.append(h("div", { id: "curves" }));
    if (this.prompts.length) {
      let wait = 0;
      main.append(h("section", { class: "by-prompt" }, h("h2", {}, "By prompt ", h("span", { class: "muted" }, `${plural(this.prompts.length, "prompt")} ${shared.length ? "in at least two of the runs" : "(none in two runs)"}`)),
        h("div", { class: "controls" }, h("input", { id: "q", type: "search", value: state.q, placeholder: "Search question, persona, answers", "aria-label": "Search", oninput: (e) => { clearTimeout(wait); wait = setTimeout(() => set({ q: e.target.value, prompt: "" }, true), 150); } }),
          runs[0].kind === "rl" ? segmented("at", "Which step", [["first", "First time"], ["last", "Last time"]]) : null, segmented("pair", "As", [["plain", "Texts"], ["diff", "Words that differ"]]),
          runs[0].kind === "rl" ? h("button", { class: "quiet", id: "next-sample", onclick: () => set({ nth: state.nth + 1 }, true) }, "Next sample") : null),
        h("div", { class: "panes" }, h("div", { class: "list", id: "list" }), h("div", { class: "reader", id: "reader" }))));
      this.fill();
    }
    if (runs[0].metrics) this.curves();
  },
  curves() {
    const runs = peers(), box = document.getElementById("curves"), titles = new Map();
    forgetCharts();
    const tools = chartTools(axesOf(runs));
    for (const one of runs) for (const panel of one.panels) {
      const key = panel.title, kept = titles.get(key) || { ...panel, series: [] };
      for (const [name, label] of panel.series.slice(0, 3)) if (!kept.series.some(([n]) => n === name)) kept.series.push([name, label]);
      titles.set(key, kept);
    }
    const legend = h("p", { class: "legend" }, runs.map((one, k) => h("span", {}, h("i", { class: "swatch", style: `--line: var(${COLORS[k % COLORS.length]})` }), visible(one.name))),
      h("span", { class: "muted" }, "Values: the first metric of a panel"));
    const card = (panel) => {
      const lines = [];
      runs.forEach((one, k) => panel.series.forEach(([name], j) => {
        if (one.metrics[name]?.some((v) => v !== null)) lines.push({ label: one.name, quiet: j > 0, color: COLORS[k % COLORS.length], dash: j % DASHES.length, xs: xValues(one, state.x), ys: one.metrics[name], steps: one.metrics.step });
      }));
      const dashes = panel.series.length > 1 ? panel.series.map(([, label], j) => `${label} ${["solid", "dashed", "dotted"][j]}`).join(", ") : "";
      return chartCard(panel.title, panel.about, lines, dashes);
    };
    const main = sectionsOf([...titles.values()].filter((p) => p.section !== "Other metrics"), card);
    box.replaceChildren(h("div", { class: "tools-row" }, legend, tools), ...main.map((section, k) => folded(section, k === 0)));
    watchCharts();
  },
  text(id) {
    if (!this.searchTexts) this.searchTexts = new Map();
    if (!this.searchTexts.has(id)) {
      const entries = peers().flatMap((one) => entriesOf(one).get(id) || []);
      this.searchTexts.set(id, [id, ...entries.flatMap((e) => [e.question, asText(e.persona ?? ""), e.answer, e.critique, e.edit?.answer])].filter(Boolean).join("\n").toLowerCase());
    }
    return this.searchTexts.get(id);
  },
  fill() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), list = document.getElementById("list");
    this.found = this.prompts.filter((id) => words.every((w) => this.text(id).includes(w)));
    list.replaceChildren();
    const item = (k) => {
      const id = this.found[k], first = peers().map((one) => entriesOf(one).get(id)?.[0]).find(Boolean);
      return h("a", { class: "item", href: "#", "data-row": id, onclick: (e) => { e.preventDefault(); set({ prompt: id, nth: 0 }); } },
        h("span", { class: "title", dir: "auto" }, visible(first.question ?? id)),
        h("span", { class: "figures" }, peers().map((one, j) => {
          const entries = entriesAt(entriesOf(one).get(id) || []), known = entries.map((e) => e.exact ?? e.reward).filter((v) => typeof v === "number");
          return h("span", { class: "by-run" }, h("i", { class: "swatch", style: `--line: var(${COLORS[j % COLORS.length]})` }), known.length ? number(known.reduce((a, b) => a + b, 0) / known.length) : "\u2013");
        })));
    };
    if (this.found.length) this.list = growingList(list, this.found.length, item);
    else list.append(h("p", { class: "empty" }, "Nothing matches."));
    this.read();
  },
  read() {
    const wide = matchMedia("(min-width: 900px)").matches;
    const prompt = this.found.includes(state.prompt) ? state.prompt : wide ? this.found[0] : undefined, reader = document.getElementById("reader");
    document.getElementById("main").classList.toggle("reading", state.prompt !== "");
    for (const item of document.querySelectorAll(".item[aria-current]")) item.removeAttribute("aria-current");
    if (prompt === undefined) return reader.replaceChildren();
    const runs = peers(), entries = runs.map((one) => entriesAt(entriesOf(one).get(prompt) || []));
    const any = entries.flat()[0] || runs.flatMap((one) => entriesOf(one).get(prompt) || [])[0];
    const base = entries.map((e) => (e.length ? e[state.nth % e.length] : null)).find(Boolean);
    this.at = this.found.indexOf(prompt);
    this.list.upTo(this.at);
    const item = [...document.querySelectorAll(".item")].find((x) => x.dataset.row === prompt);
    item?.setAttribute("aria-current", "true");
    if (item && wide) scrollInside(item, document.getElementById("list"));
    reader.replaceChildren(h("article", { class: "detail" },
      h("header", {}, h("p", { class: "crumbs" }, h("button", { class: "quiet back", onclick: () => set({ prompt: "" }) }, "\u2190 List"), h("span", {}, visible(prompt))), personaBox(any.persona, any.question)),
      h("div", { class: "sides many" }, runs.map((one, k) => runColumn(one, k, prompt, base)))));
  },
  update(changed) {
    if (document.getElementById("curves") && (changed.has("x") || changed.has("smooth"))) this.curves();
    if (!this.prompts.length) return;
    for (const name of ["at", "pair"]) for (const b of document.querySelectorAll(`#${name} button`)) b.setAttribute("aria-pressed", String(b.dataset.value === state[name]));
    if (changed.has("q") || changed.has("at")) this.fill();
    else if (["prompt", "nth", "pair", "text"].some((name) => changed.has(name))) this.read();
  },
  key(event) {
    const by = { j: 1, k: -1 }[event.key];
    if (by && this.found?.length) set({ prompt: this.found[Math.max(0, Math.min(this.found.length - 1, (this.at ?? -1) + by))], nth: 0 }, true);
  },
};
