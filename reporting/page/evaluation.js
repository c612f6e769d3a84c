"use strict";
// Evaluations: the table, and the answers of both sides by verdict. Held-out judgements of a reward model beside their labels.

const VERDICT_MARKS = { win: "\u25b2", tie: "=", loss: "\u25bc", none: "\u2013" };

function evaluationRows(one) {
  return one.judgements || one.rows;
}
function verdictWords(one) {
  const [win, tie, loss, none] = DATA.verdicts[one.judgements ? "grm" : one.task];
  return { win, tie, loss, none };
}

// Renders Markdown tables and the lines around them.
function markdownTable(text) {
  const found = [];
  let table = null;
  for (const line of text.split("\n")) {
    if (line.startsWith("|")) {
      const cells = line.replace(/^\||\|\s*$/g, "").split("|").map((c) => c.trim());
      if (!table) { table = h("table", { class: "grid" }, h("thead", {}, h("tr", {}, cells.map((c) => h("th", { scope: "col" }, visible(c))))), h("tbody", {})); found.push(h("div", { class: "wide" }, table)); }
      else if (!cells.every((c) => /^:?-+:?$/.test(c))) table.querySelector("tbody").append(h("tr", {}, cells.map((c, k) => (k ? h("td", {}, visible(c)) : h("th", { scope: "row" }, visible(c))))));
    } else {
      table = null;
      if (line.startsWith("## ")) found.push(h("h2", {}, visible(line.slice(3))));
      else if (line.trim()) found.push(h("p", { class: "note" }, visible(line.replace(/^- /, ""))));
    }
  }
  return found;
}

const SIDE_LABELS = { reward: "Weighted score", helpfulness: "Helpfulness", personalization: "Personalization", naturalness: "Naturalness", n_characters: "Characters", n_tokens: "Tokens", truncated: "Cut off", recites_profile: "Recites the profile" };

function mountResults(main) {
  const one = run(), s = one.summary, boxes = [];
  if (s) {
    const range = (x) => (x.low === null ? "" : `95 %: ${percent(x.low, 1)} to ${percent(x.high, 1)}`);
    const { win_rate: rate, length_controlled: lc } = s;
    boxes.push(["Win rate", percent(rate.win_rate, 1), range(rate)]);
    for (const [name, found] of Object.entries(lc || {})) {
      if (found.length_controlled_winrate !== null) boxes.push([`Length-controlled (${name})`, `${found.length_controlled_winrate.toFixed(1)} %`, found.notes?.length ? "unreliable, see below" : found.low === null ? "" : `95 %: ${number(found.low, 1)} to ${number(found.high, 1)} %`]);
    }
    const n = rate.wins + rate.ties + rate.losses;
    main.append(h("section", { class: "headlines" }, boxes.map(([label, value, note]) => h("div", { class: "headline" }, h("span", { class: "label" }, label), h("strong", {}, value), h("span", { class: "muted" }, note)))),
      h("section", { class: "split", "aria-label": "Verdicts" }, ["wins", "ties", "losses"].map((kind) => rate[kind] ? h("button", { class: kind, style: `flex-grow: ${rate[kind]}`, onclick: () => set({ view: "rows", verdict: { wins: "win", ties: "tie", losses: "loss" }[kind] }) }, h("b", {}, rate[kind]), ` ${kind}`) : null)),
      h("p", { class: "note muted" }, `${plural(n, "prompt")}: ${visible(s.generators.model)} against ${visible(s.generators.baseline)}` + (rate.left_out ? `; ${rate.left_out} without a verdict left out` : "")));
    const cell = (x, name) => (!x || x.mean === null ? "\u2013" : ["truncated", "recites_profile"].includes(name) ? percent(x.mean, 1) : `${number(x.mean)}${x.standard_error === null ? "" : ` \u00b1 ${number(x.standard_error)}`}`);
    main.append(h("section", {}, h("h2", {}, "Both sides"), h("table", { class: "grid narrow" }, h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, "Model"), h("th", { scope: "col" }, "Baseline"))),
      h("tbody", {}, Object.entries(SIDE_LABELS).filter(([name]) => s.model[name] && s.model[name].mean !== null).map(([name, label]) =>
        h("tr", {}, h("th", { scope: "row" }, label), h("td", {}, cell(s.model[name], name)), h("td", {}, cell(s.baseline[name], name))))))));
  }
  if (one.table) main.append(h("section", { class: "table" }, one.task === "annotation" ? null : h("h2", {}, "Table"), markdownTable(one.table)));
}

// -- rows --------------------------------------------------------------------------------------------------------------

const ORDERS = {
  __proto__: null,
  file: ["Order of the file", null],
  longer: ["Model longer than baseline", (r) => r.gap ?? null],
  shorter: ["Model shorter than baseline", (r) => (r.gap === null || r.gap === undefined ? null : -r.gap)],
  ahead: ["Furthest ahead in score", (r) => scoreGap(r)],
  behind: ["Furthest behind in score", (r) => (scoreGap(r) === null ? null : -scoreGap(r))],
};
function scoreGap(r) {
  const total = (s) => s.reward ?? (s.helpfulness === undefined || s.helpfulness === null ? null : DIMENSIONS.reduce((sum, d) => sum + s[d], 0));
  const [a, b] = r.sides.map(total);
  return a === null || b === null || a === undefined || b === undefined ? null : a - b;
}

function matchingRows(one) {
  const all = evaluationRows(one), words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all.map((_, i) => i).filter((i) => {
    const r = all[i];
    if (state.verdict !== "all" && r.verdict !== state.verdict) return false;
    if (state.group && String(r.group) !== state.group) return false;
    if (!words.length) return true;
    if (r.searchText === undefined) Object.defineProperty(r, "searchText", { value: [r.id, r.question, asText(r.persona ?? ""), r.answer, ...r.sides.flatMap((s) => [s.answer, s.critique])].filter(Boolean).join("\n").toLowerCase() });
    return words.every((w) => r.searchText.includes(w));
  });
  const value = (ORDERS[state.order] || ORDERS.file)[1];
  if (value) rows.sort((a, b) => (value(all[b]) ?? -Infinity) - (value(all[a]) ?? -Infinity) || a - b);
  return rows;
}

function sideBlock(side, other) {
  const body = side.answer === undefined || side.answer === null
    ? side.drop_reason || side.title === "label" || side.critique ? null : h("p", { class: "muted" }, "The text is not in this folder.")
    : other && state.pair === "diff" && other.answer && other.answer !== side.answer ? wordDiff(other.answer, side.answer) : said(side.answer);
  return h("section", { class: "side block" }, h("h3", {}, side.title, side.n_tokens ? h("span", { class: "side muted" }, plural(side.n_tokens, "token")) : null),
    side.drop_reason ? h("p", { class: "badges" }, h("span", { class: "badge bad" }, visible(side.drop_reason))) : null,
    side.persona ? personaBox(side.persona, "")[1] : null, body,
    side.critique ? [h("h4", {}, "Critique"), said(side.critique, "said critique-text")] : null);
}

function evaluationDetail(one, i) {
  const r = evaluationRows(one)[i], words = verdictWords(one);
  const swap = r.sides.length === 2 && r.sides.every((s) => s.answer) && r.sides[0].answer !== r.sides[1].answer;
  return h("article", { class: "detail" },
    h("header", {}, h("p", { class: "crumbs" }, h("button", { class: "quiet back", onclick: () => set({ row: "" }) }, "\u2190 List"), h("span", {}, visible(r.id)), r.group ? h("span", {}, visible(r.group)) : null),
      personaBox(r.persona, r.question ?? r.id),
      h("p", { class: "badges" }, h("span", { class: `badge verdict ${r.verdict}` }, `${VERDICT_MARKS[r.verdict]} ${words[r.verdict] || r.verdict}`),
        typeof r.preference === "number" && ![0, 0.5, 1].includes(r.preference) ? h("span", { class: "badge" }, `preferred with ${percent(r.preference)}`) : null,
        typeof r.gap === "number" ? h("span", { class: "badge" }, `${signed(r.gap, 0)} characters`) : null, r.note ? h("span", { class: "badge bad" }, visible(r.note)) : null)),
    r.answer ? h("section", { class: "block" }, h("h3", {}, "Judged answer"), said(r.answer)) : null,
    swap ? h("div", { class: "switches" }, segmented("pair", "Second side as", [["plain", "Texts"], ["diff", "Words that differ"]])) : null,
    h("div", { class: "sides" }, sideBlock(r.sides[0]), r.sides[1] ? sideBlock(r.sides[1], swap ? r.sides[0] : null) : null),
    scoreTable(r.sides, r.sides.map((s) => s.title), false));
}

function evaluationItem(one, i) {
  const r = evaluationRows(one)[i], gap = scoreGap(r);
  return h("a", { class: "item", href: "#", "data-row": i, onclick: (e) => { e.preventDefault(); set({ row: String(i) }); } },
    h("span", { class: "meta" }, h("span", { class: `flag verdict ${r.verdict}` }, `${VERDICT_MARKS[r.verdict]} ${verdictWords(one)[r.verdict] || r.verdict}`), h("span", { class: "muted" }, visible(r.group ?? r.id)), typeof r.gap === "number" ? h("span", { class: "muted" }, `${signed(r.gap, 0)} characters`) : ""),
    h("span", { class: "title", dir: "auto" }, visible(r.question ?? r.id)),
    h("span", { class: "figures" }, gap === null ? "" : h("span", { class: `delta ${gap > 0 ? "up" : gap < 0 ? "down" : "same"}` }, (gap > 0 ? "+" : "") + fixed(gap))),
    h("span", { class: "snippet muted", dir: "auto" }, visible(String(r.answer || r.sides[0].answer || "").slice(0, 160))));
}

views.rows = {
  mount(main) {
    const one = run(), words = verdictWords(one), all = evaluationRows(one);
    const groups = [...new Set(all.map((r) => r.group).filter(Boolean))].sort();
    const counts = Object.fromEntries(Object.keys(words).map((v) => [v, all.filter((r) => r.verdict === v).length]));
    let wait = 0;
    const choice = (name, label, options) => h("select", { id: name, "aria-label": label, onchange: (e) => set({ [name]: e.target.value, row: "" }) }, options.map(([value, text]) => h("option", { value, selected: state[name] === value }, text)));
    main.append(h("div", { class: "filters" }, h("div", { class: "controls" },
      h("input", { id: "q", type: "search", value: state.q, placeholder: "Search question, persona, answers", "aria-label": "Search", oninput: (e) => { clearTimeout(wait); wait = setTimeout(() => set({ q: e.target.value, row: "" }, true), 150); } }),
      choice("verdict", "Verdict", [["all", "All verdicts"], ...Object.entries(words).filter(([v]) => counts[v]).map(([v, text]) => [v, `${text || v} (${counts[v]})`])]),
      choice("order", "Order", Object.entries(ORDERS).filter(([k]) => !["longer", "shorter"].includes(k) || one.task === "win-rate").map(([k, [text]]) => [k, text])),
      groups.length > 1 && choice("group", "Group", [["", "All groups"], ...groups.map((g) => [String(g), visible(g)])]),
      h("button", { id: "save", class: "quiet", title: "These rows as JSON lines", onclick: () => saveRows(this.found.map((i) => all[i])) }, "Save rows")),
      h("p", { id: "count", class: "muted", "aria-live": "polite" })),
      one.agreement ? h("p", { class: "note muted" }, `${percent(one.agreement.parsed)} of ${one.agreement.judged} held-out judgements parse. Correlation of the weighted score with the label\u2019s: ${number(one.agreement.score_correlation)}. Equal scores: ` + DIMENSIONS.map((d) => `${d} ${percent(one.agreement[`exact_${d}`])}`).join(", ") + ".") : "",
      h("div", { class: "panes" }, h("div", { class: "list", id: "list" }), h("div", { class: "reader", id: "reader" })));
    this.fill();
  },
  fill() {
    const one = run(), rows = (this.found = matchingRows(one)), list = document.getElementById("list");
    list.replaceChildren();
    list.scrollTop = 0;
    document.getElementById("count").textContent = `${plural(rows.length, "row")} of ${evaluationRows(one).length.toLocaleString("en")}`;
    if (rows.length) this.list = growingList(list, rows.length, (k) => evaluationItem(one, rows[k]));
    else list.append(h("p", { class: "empty" }, "Nothing matches."));
    this.read();
  },
  read() {
    const one = run(), rows = this.found, wide = matchMedia("(min-width: 900px)").matches;
    const chosen = state.row !== "" && evaluationRows(one)[state.row] ? Number(state.row) : wide ? rows[0] : undefined;
    const reader = document.getElementById("reader");
    document.getElementById("main").classList.toggle("reading", state.row !== "");
    reader.replaceChildren(chosen === undefined ? "" : evaluationDetail(one, chosen));
    for (const item of document.querySelectorAll(".item[aria-current]")) item.removeAttribute("aria-current");
    this.at = rows.indexOf(chosen);
    if (this.at >= 0) {
      this.list.upTo(this.at);
      const item = document.querySelector(`.item[data-row="${chosen}"]`);
      item.setAttribute("aria-current", "true");
      if (wide) scrollInside(item, document.getElementById("list"));
      else if (state.row !== "") window.scrollTo(0, 0);
    }
  },
  update(changed) {
    if (["q", "verdict", "order", "group"].some((name) => changed.has(name))) this.fill();
    else this.read();
  },
  key(event) {
    const by = { j: 1, k: -1 }[event.key];
    if (by && this.found.length) set({ row: String(this.found[Math.max(0, Math.min(this.found.length - 1, (this.at ?? -1) + by))]) }, state.row !== "");
  },
};
